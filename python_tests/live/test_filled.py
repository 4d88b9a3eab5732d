"""Live tensors whose dead channels hold a constant that is not zero, as the gates of squeeze-and-excite networks."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.live import (
    OTHER,
    C,
    H,
    N,
    Operands,
    W,
    X,
    assert_as_plain,
    assert_falls_back,
    assert_same_step,
    in_flow,
    step,
)
from prunekernels.live import LiveTensor, recording
from prunekernels.live.tensor import FilledTensor

MAKES = {
    "sigmoid": torch.sigmoid, "method": lambda x: x.sigmoid(), "F.sigmoid": F.sigmoid, "nn.Sigmoid": nn.Sigmoid(),
    "hardsigmoid": F.hardsigmoid, "nn.Hardsigmoid": nn.Hardsigmoid(), "expit": torch.special.expit,
    "logsigmoid": F.logsigmoid, "exp": torch.exp, "softplus": F.softplus, "softplus beta": nn.Softplus(2.0),
    "cos": torch.cos, "+ 1": lambda x: x + 1, "1 + x": lambda x: 1 + x, "add alpha": lambda x: torch.add(x, 1, alpha=2),
    "- 1": lambda x: x - 1, "1 - x": lambda x: 1 - x, "rsub": lambda x: torch.rsub(x, 3),
    "clamp": lambda x: x.clamp(1, 2), "clamp min": lambda x: torch.clamp(x, min=0.1),
    "clamp_min": lambda x: x.clamp_min(0.1), "pow": lambda x: x.pow(0), "2 ** x": lambda x: 2**x,
    "hardtanh": lambda x: F.hardtanh(x, 0.5, 1), "threshold": lambda x: F.threshold(x, 1, 7),
}  # fmt: skip
KEEPS = {
    "relu": F.relu, "tanh": torch.tanh, "relu6": F.relu6, "gelu": F.gelu, "sqrt": torch.sqrt, "log": torch.log,
    "rsqrt": torch.rsqrt, "pow": lambda g: g**2, "- 1": lambda g: g - 1, "1 - g": lambda g: 1 - g,
    "* 2": lambda g: g * 2, "2 * g": lambda g: 2 * g, "/ 6": lambda g: g / 6, "1 / g": lambda g: 1 / g,
    "neg": lambda g: -g, "sigmoid": torch.sigmoid, "clone": torch.clone, "contiguous": lambda g: g.contiguous(),
    "float": lambda g: g.float(), "bfloat16": lambda g: g.bfloat16().double(),
    "to": lambda g: g.to(torch.float32, copy=True), "cpu": lambda g: g.cpu(),
    "type_as": lambda g: g.type_as(torch.ones(1)), "detach": lambda g: g.detach(), "mean": lambda g: g.mean((2, 3)),
    "mean keepdim": lambda g: g.mean((2, 3), keepdim=True), "amax": lambda g: g.amax(3),
    "adaptive": lambda g: F.adaptive_avg_pool2d(g, 2), "max pool": lambda g: F.max_pool2d(g, 3, 2, 1),
    "view": lambda g: g.view(N, C, -1), "flatten": lambda g: g.flatten(1), "reshape": lambda g: g.reshape(N, C, W, H),
    "squeeze": lambda g: g.mean((2, 3), True).squeeze(), "unsqueeze": lambda g: g.unsqueeze(-1),
    "new dimensions": lambda g: g.amax(3)[:, :, :, None], "expand": lambda g: g.mean((2, 3), True).expand(-1, -1, H, W),
    "expand_as": lambda g: g.mean(3, True).expand_as(torch.ones(N, C, H, W)), "slice": lambda g: g[:, 1:4],
    "images": lambda g: g[torch.tensor([1, 1, 0])], "narrow": lambda g: g.narrow(1, 1, 4),
    "permute": lambda g: g.permute(0, 1, 3, 2), "chunk": lambda g: g.chunk(2, 1),
    "split": lambda g: g.split([1, 2, 3], 1), "transpose": lambda g: g.transpose(2, 3),
}  # fmt: skip


def written(x):
    x[:, 1] = 3.0
    return x


FULL_WIDTH = {
    "softmax": lambda g: g.softmax(1), "pad": lambda g: F.pad(g, (1, 1)),
    "avg pool": lambda g: F.avg_pool2d(g, 3, 1, 1), "sum": lambda g: g.sum((2, 3)), "sum of all": lambda g: g.sum(),
    "mean over channels": lambda g: g.mean(1, True), "log(0)": lambda g: (g - 0.5).abs().log().clamp(-9, 9),
    "mul_": lambda g: (g * 1).mul_(3),
    "nn.ReLU": lambda g: F.relu(g * 1, inplace=True),
    "+=": lambda g: (g * 1).add_(1), "clamp_": lambda g: (g * 1).clamp_(0.6, 1),
    "acos(1)": lambda g: (2 * g).clamp(-1, 1).detach().acos(), "compare": lambda g: g > 0.5, "int": lambda g: g.int(),
    "linear": lambda g: F.linear(g.flatten(1), torch.ones(3, C * H * W).double()),
    "conv": lambda g: F.conv2d(g, torch.ones(3, C, 1, 1).double()),
    "prelu": lambda g: F.prelu(g, torch.ones(1).double()),
    "* tensor": lambda g: g * torch.tensor(2.0).double(), "* map": lambda g: g * torch.ones(N, 1, H, W).double(),
    "* row": lambda g: g * torch.ones(W).double(), "dropout": lambda g: F.dropout(g, 0.0),
    "where": lambda g: torch.where(g > 1, g, 2.0),
    "interpolate": lambda g: F.interpolate(g, scale_factor=2),
    "norm": lambda g: F.batch_norm(g, None, None, training=True),
    "setitem": lambda g: written(g * 1), "einsum": lambda g: torch.einsum("nchw,nchv->nwv", g, g),
}  # fmt: skip
IN_PLACE = {  # where the constant stays what it is
    "relu_": lambda g: g.relu_(), "abs_": torch.abs_, "+= 0": lambda g: g.__iadd__(0),
    "clamp_": lambda g: g.clamp_(0, 1), "*= 1": lambda g: g.mul_(1), "-= 0": lambda g: g.sub_(0.0),
}  # fmt: skip
PRODUCTS = {
    "gate": lambda o: o.x * o.other.sigmoid(), "gate first": lambda o: o.other.sigmoid() * o.x,
    "swish": lambda o: o.x * o.x.sigmoid(), "glu": lambda o: o.more[:N] * o.other.sigmoid(),
    "pooled": lambda o: o.x * o.other.mean((2, 3), True).sigmoid(), "small": lambda o: o.small * o.other.sigmoid(),
    "hard": lambda o: torch.mul(o.x, F.hardsigmoid(o.other.mean((2, 3), keepdim=True))),
    "by hand": lambda o: o.x * (F.relu6(o.other + 3.0) / 6.0),
    "1 / (1 + exp)": lambda o: o.x * (1 / (1 + torch.exp(-o.other))),
    "view": lambda o: o.x * o.other.mean((2, 3)).sigmoid().view(N, C, 1, 1),
    "other= ": lambda o: torch.mul(o.x, other=o.other.exp()),
    "expand_as": lambda o: o.x * o.other.mean((2, 3)).sigmoid()[:, :, None, None].expand_as(o.x),
    "1 + gate": lambda o: o.x * (1 + o.other.sigmoid()), "1 - gate": lambda o: (1 - o.other.sigmoid()) * o.x,
    "gates": lambda o: o.x * (o.other.sigmoid() * o.line.mean(2)[..., None, None].sigmoid()),
    "sum of gates": lambda o: o.x * (o.x.sigmoid() + o.other.exp()),
    "gate + x": lambda o: o.x * (o.other.sigmoid() - o.same),
    "x - gate": lambda o: o.same * (o.x - o.other.exp()), "divided": lambda o: o.x / o.other.exp(),
    "gate / gate": lambda o: o.x * (o.x.sigmoid() / o.other.exp()), "in place": lambda o: o.x.mul_(o.other.sigmoid()),
    "*=": lambda o: o.x.__imul__(o.other.mean((2, 3), True).sigmoid()), "/=": lambda o: o.x.div_(o.other.exp()),
    "no channels": lambda o: o.none * o.x.sigmoid(), "constant gate": lambda o: o.x * o.none.sigmoid(),
    "rows": lambda o: o.flat * o.flat_other.sigmoid(), "lines": lambda o: o.line * o.line_other.sigmoid(),
    "zero again": lambda o: (o.x + 1) - 1, "difference": lambda o: o.x.sigmoid() - o.other.sigmoid(),
    "highway": lambda o: o.x * o.other.sigmoid() + (1 - o.other.sigmoid()) * o.same,
}  # fmt: skip
WIDE = {  # with an operand that has all channels: nothing falls back, the result is a plain tensor
    "plain * gate": lambda o: o.plain * o.x.sigmoid(), "gate * plain": lambda o: o.x.sigmoid() * o.plain,
    "plain * pooled": lambda o: o.plain * o.x.mean((2, 3), True).sigmoid(),
    "gate / plain": lambda o: o.x.exp() / o.plain, "plain + gate": lambda o: o.plain + o.x.sigmoid(),
    "gate - channel gate": lambda o: o.x.sigmoid() - o.channel_gate,
    "plain in place": lambda o: (o.plain * 1).mul_(o.x.sigmoid()),
}  # fmt: skip
MIXED = {
    "x - narrow": lambda o: o.x.sigmoid() * o.narrow[:, :1],
    "gate.mul_(x)": lambda o: (o.x.sigmoid() * 1).mul_(o.other),
    "float * double": lambda o: o.x.sigmoid().float() + o.other,
    "rank": lambda o: o.x.sigmoid() * o.column, "cat of images": lambda o: torch.cat([o.x, o.other.sigmoid()]),
    "where": lambda o: torch.where(o.x > 0, o.x, o.other.sigmoid()),
    "addcmul": lambda o: torch.addcmul(o.x, o.x, o.other.exp()),
    "out": lambda o: torch.mul(o.x, o.other.exp(), out=torch.empty(0).double()) if not o.grad else o.x.exp() @ o.row,
}  # fmt: skip


CATS = {
    "gates": lambda o: torch.cat([o.x.sigmoid(), o.other.sigmoid()], 1),
    "x and gate": lambda o: torch.cat([o.x, o.other.exp()], 1),
    "gate and x": lambda o: torch.cat([o.other.sigmoid(), o.x, o.x], 1),
    "and plain": lambda o: torch.cat([o.x.exp(), o.plain], 1),
    "plain first": lambda o: torch.cat([o.plain, o.x.exp()], -3),
    "two constants": lambda o: torch.cat([o.x.exp(), o.other.sigmoid()], 1),
    "images": lambda o: torch.cat([o.x.sigmoid(), o.other.sigmoid(), o.more.sigmoid()]),
    "pixels": lambda o: torch.cat([o.x.sigmoid(), o.other.sigmoid()], 3),
    "plain images": lambda o: torch.cat([o.x.exp(), o.plain]),
    "pooled": lambda o: torch.cat([o.x.mean((2, 3)).sigmoid(), o.other.mean((2, 3)).sigmoid()], 1),
    "stack": lambda o: torch.stack([o.x.sigmoid(), o.other.sigmoid()], 1).sum(1),
}  # fmt: skip


def assert_filled(f, **args):
    results, fallbacks = assert_as_plain(f, **args)
    assert not fallbacks and results and all(type(t) is FilledTensor for t in results), (fallbacks, results)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("name", MAKES)
def test_a_constant_in_dead_channels(name, layout):
    assert_filled(lambda o: MAKES[name](o.x), layout=layout)


@pytest.mark.parametrize("name", MAKES)
def test_at_other_ranks(name):
    assert_filled(lambda o: (MAKES[name](o.flat), MAKES[name](o.line)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["sigmoid", "+ 1", "threshold"])
def test_without_gradients(name, mode):
    with mode():
        assert_filled(lambda o: MAKES[name](o.x), grad=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_constant_is_rounded_as_the_channels_are(dtype):
    x = Operands(True, dtype=dtype).x
    dense = x.to_dense()
    for f in (torch.exp, lambda t: (t + 0.1) * 3 - 0.3, lambda t: ((t + 1) / 3).to(torch.bfloat16).double()):
        assert torch.equal(f(x).to_dense()[:, 1], f(dense)[:, 1])


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("name", KEEPS)
def test_what_keeps_a_constant(name, layout):
    if layout == "nchw" or name not in ("view", "reshape"):
        assert_filled(lambda o: KEEPS[name](o.x.sigmoid()), layout=layout)


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place(name):
    def f(o):
        gate = o.x.sigmoid() * 1
        shown = gate.view(N, C, -1)
        assert IN_PLACE[name](gate) is gate
        return gate, shown

    assert_filled(f)


@pytest.mark.parametrize("name", FULL_WIDTH)
def test_without_a_rule(name):
    assert_falls_back(lambda o: FULL_WIDTH[name](o.x.sigmoid()))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_live(name, layout):
    results, fallbacks = assert_as_plain(PRODUCTS[name], layout=layout)
    assert not fallbacks and type(results[0]) is LiveTensor


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("name", CATS)
def test_cat(name, layout):
    results, fallbacks = assert_as_plain(CATS[name], layout=layout)
    assert not fallbacks and (type(results[0]) is torch.Tensor) == (name == "plain images")


def test_a_cat_keeps_the_constant_of_most_channels():
    o = Operands(True)
    y = torch.cat([o.x, o.other.sigmoid()], 1)  # 2 and 3 of 6 are dead
    assert y.fill == 0.5 and y.live.count == 6 + 3
    assert torch.cat([o.other, o.x.sigmoid()], 1).fill == 0


def test_a_product_has_the_list_of_its_live_operand():
    o = Operands(True)
    assert (o.x * o.other.sigmoid()).live is o.x.live and (o.other.sigmoid() * o.x).live is o.x.live
    assert (o.x + 1).live is o.x.live and (o.x.sigmoid() + o.other).live is o.x.live.union(o.other.live)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("name", WIDE)
def test_a_plain_operand_has_all_channels(name, layout):
    results, fallbacks = assert_as_plain(WIDE[name], layout=layout)
    assert not fallbacks and type(results[0]) is torch.Tensor


@pytest.mark.parametrize("name", MIXED)
def test_other_operands(name):
    assert_falls_back(MIXED[name])


INFINITE = {
    "log": torch.log, "rsqrt": torch.rsqrt, "sqrt": torch.sqrt, "1 / x": lambda x: 1 / x,
    "asin": lambda x: (x + 1).asin(),
    "overflow": lambda x: x + 1e400, "gate / x": lambda x: x.sigmoid() / x,
}  # fmt: skip


@pytest.mark.parametrize("name", INFINITE)
def test_what_is_infinite_is_shown(name):
    """Infinite constants, and constants with infinite slopes, are computed at full width."""
    x, f = Operands(True, grad=False).x * 0.1, INFINITE[name]
    with recording() as fallbacks:
        y = f(x)
    assert fallbacks and type(y) is torch.Tensor
    torch.testing.assert_close(y, f(x.to_dense()), equal_nan=True)


def test_nan_of_a_gate_stays_out_of_dead_channels():
    o = Operands(True)
    gate = (o.other * torch.nan).sigmoid()
    y = (o.x * gate).to_dense()
    both = [c for c in X if c in OTHER]
    assert y[:, both].isnan().all() and not y[:, [c for c in range(C) if c not in both]].isnan().any()


def test_is_a_tensor_of_full_width():
    gate = Operands(True).x.sigmoid()
    assert isinstance(gate, LiveTensor) and gate.fill == 0.5 and gate.shape == (N, C, H, W)
    assert torch.equal(gate.to_dense()[:, 1], torch.full((N, H, W), 0.5).double())
    assert gate.to_dense() is gate.to_dense() and "0.5000" in repr(gate)
    for clone in (copy.deepcopy(gate.detach()), pickle.loads(pickle.dumps(gate.detach()))):
        assert torch.equal(clone.to_dense() if isinstance(clone, LiveTensor) else clone, gate.to_dense())


@pytest.mark.parametrize("change", ["relu_", "setitem", "add_", "zero_"])
@pytest.mark.parametrize("alias", ["view", "slice", "detach"])
def test_aliases_see_what_was_written(alias, change):
    def f(o):
        gate = o.x.sigmoid()
        shown = {"view": lambda g: g.view(N, C, -1), "slice": lambda g: g[:, 1:4], "detach": lambda g: g.detach()}[
            alias
        ](gate)
        {"setitem": lambda: gate.__setitem__((slice(None), slice(1, 3)), 7), "add_": lambda: gate.add_(1)}.get(
            change, getattr(gate, change, None)
        )()
        return gate, shown, gate * 2, shown * 3

    with torch.no_grad():
        assert_as_plain(f, grad=False)


@pytest.mark.parametrize("how", ["hook", "retain_grad", "grad"])
def test_gradients_of_a_gate(how):
    def gradient(o):
        seen, gate = [], o.x.sigmoid()
        y = gate * 2
        if how == "hook":
            gate.register_hook(seen.append)
        elif how == "retain_grad":
            gate.retain_grad()
        z = (y * o.same).sum() + (gate * o.other).sum()
        if how == "grad":
            return torch.autograd.grad(z, gate)[0]
        z.backward()
        return sum(seen) if how == "hook" else gate.grad

    got, want = gradient(Operands(True)), gradient(Operands(False))
    live = list(X)  # elsewhere a live tensor has no gradient
    got = got.to_dense() if isinstance(got, LiveTensor) else got
    assert torch.allclose(got[:, live], want[:, live], rtol=1e-12, atol=1e-12)


def test_below_the_rules():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    assert_as_plain(lambda o: Double.apply(o.x.sigmoid()))
    with torch.no_grad():
        compiled = torch.compile(lambda x: x.relu() * 2, backend="eager")
        gate = Operands(True, grad=False).x.sigmoid()
        assert torch.equal(compiled(gate), gate.to_dense().relu() * 2)
        assert torch.equal(torch.vmap(torch.sin)(gate), gate.to_dense().sin())


class Excite(nn.Module):
    """Two residual blocks with squeeze-and-excite; masks of the gate and of what it multiplies may differ."""

    def __init__(self, gate, width=12):
        super().__init__()
        self.gate = gate
        self.first, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.deep, self.deep_norm = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width)
        self.reduce, self.expand = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)
        self.last = nn.Conv2d(width, 5, 1)

    def forward(self, x):
        x = F.silu(self.norm(self.first(x)))
        y = F.silu(self.deep_norm(self.deep(x)))
        y = y * self.gate(self.expand(F.relu(self.reduce(y.mean((2, 3), keepdim=True)))))
        return self.last(x + y)


GATES = {
    "sigmoid": nn.Sigmoid(), "hardsigmoid": nn.Hardsigmoid(), "by hand": lambda x: F.relu6(x + 3) / 6,
    "1 + tanh": lambda x: 1 + torch.tanh(x), "broadcast": lambda x: x.flatten(1).sigmoid().view(x.shape[0], -1, 1, 1),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("masks", ["joint", "apart", "gate alone"])
@pytest.mark.parametrize("gate", GATES)
def test_squeeze_and_excite(gate, masks, training):
    torch.manual_seed(0)
    net = Excite(GATES[gate]).double().train(training)
    pk.convert(net)
    keep = torch.arange(12) % 3 > 0
    if masks != "gate alone":
        for conv, norm in ((net.first, net.norm), (net.deep, net.deep_norm)):
            conv.set_masks(filter=keep), norm.set_mask(keep)
    net.expand.set_masks(filter=keep if masks == "joint" else torch.arange(12) % 2 > 0)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    want = step(copy.deepcopy(net), x)
    with recording(net) as fallbacks:
        got = step(in_flow(net), x)
    assert not fallbacks
    assert_same_step(got, want)


def test_second_gradients():
    def penalty(o):
        y = (o.x * o.other.mean((2, 3), True).sigmoid()).tanh() * o.other.exp()
        grads = torch.autograd.grad(y.sum(), o.leaves[:3], create_graph=True, allow_unused=True)
        return torch.autograd.grad(
            sum(g.square().sum() for g in grads if g is not None), o.leaves[:3], allow_unused=True
        )

    for got, want in zip(penalty(Operands(True)), penalty(Operands(False)), strict=True):
        assert (got is None) == (want is None)
        assert got is None or torch.allclose(got, want, rtol=1e-12, atol=1e-12)


def test_layers_behind_a_gate_read_full_width():
    net = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.Sigmoid(), nn.Conv2d(6, 6, 1), nn.Sigmoid(), nn.BatchNorm2d(6), nn.Sigmoid()
    )
    pk.convert(net.double())
    net[0].set_masks(filter=torch.arange(6) % 2 > 0)
    net[2].set_masks(filter=torch.arange(6) % 3 > 0)
    net[4].set_mask(torch.arange(6) % 3 > 0)
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    want = step(copy.deepcopy(net), x)
    network = in_flow(net)
    with recording(network) as fallbacks:
        got = step(network, x)
    assert_same_step(got, want)
    assert {(row["op"], row["module"]) for row in fallbacks} == {
        ("conv2d (channels that hold 0.5)", "2"),
        ("batch_norm (channels that hold 0.5)", "4"),
    }
    assert type(network(x)) is torch.Tensor  # the caller gets a plain tensor
