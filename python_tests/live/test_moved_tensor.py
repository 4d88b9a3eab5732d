"""Rearranged live tensors in the hands of other code: attributes, autograd, hooks, compilers; and their values."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import prunekernels as pk
from cases.live import C, H, N, Operands, W, X, assert_as_plain
from live.test_moved import WHERES, groups, last
from prunekernels.live import LiveList, LiveTensor, channels_last_of, recording, wrap_last

ATTRIBUTES = {
    "shape": lambda m: m.shape, "size": lambda m: m.size(-1), "dim": lambda m: m.dim(), "dtype": lambda m: m.dtype,
    "stride": lambda m: m.stride(), "contiguous": lambda m: m.is_contiguous(), "numel": lambda m: m.numel(), "len": len,
    "requires_grad": lambda m: m.requires_grad, "leaf": lambda m: m.is_leaf,
    "has grad_fn": lambda m: m.grad_fn is not None, "made contiguous": lambda m: m.contiguous().is_contiguous(),
    "tolist": lambda m: m.tolist(), "numpy": lambda m: m.detach().numpy().tolist(),
    "item": lambda m: m[0, 0, 0, 2].item(), "hash": lambda m: len({m, m}), "iterate": lambda m: [t.tolist() for t in m],
    "deepcopy": lambda m: copy.deepcopy(m.detach()).tolist(),
    "pickle": lambda m: pickle.loads(pickle.dumps(m.detach())).tolist(), "data": lambda m: m.data.tolist(),
    "type": lambda m: m.type(), "equal": lambda m: torch.equal(m, m * 1),
    "dlpack": lambda m: torch.from_dlpack(m.detach()).tolist(), "zeros_like": lambda m: torch.zeros_like(m).shape,
    "new_zeros": lambda m: m.new_zeros(3).dtype, "storage": lambda m: m.detach().untyped_storage().nbytes(),
    "grad": lambda m: m.detach().grad,
}  # fmt: skip


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_is_what_the_full_width_tensor_is(name):
    got, want = (ATTRIBUTES[name](last(Operands(is_live).x)) for is_live in (True, False))
    assert got == want


def test_repr():
    m = last(Operands(True).x)
    assert repr(m).startswith("MovedTensor(4/6 live, tensor([[[[") and m.to_dense() is m.to_dense()


class SavesOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


FUNCTIONS = {
    "saves its output": lambda m: SavesOutput.apply(m),
    "twice": lambda m: SavesOutput.apply(SavesOutput.apply(m)).relu(),
    "back": lambda m: SavesOutput.apply(m).permute(0, 3, 1, 2) * 2,
    "before and after": lambda m: SavesOutput.apply(m) + m, "in place": lambda m: InPlace.apply(m * 1) * 3,
    "checkpoint": lambda m: checkpoint(torch.tanh, m, use_reentrant=False),
    "reentrant": lambda m: checkpoint(torch.tanh, m, use_reentrant=True),
    "written": lambda m: SavesOutput.apply((m * 1).relu_()),
    "scaled in place": lambda m: SavesOutput.apply(m.detach().mul_(m.sum())),
}  # fmt: skip


@pytest.mark.parametrize("where", ["last", "shuffled"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_autograd_functions(name, where):
    def f(o):
        result = FUNCTIONS[name](WHERES[where](o.x) if where == "last" else WHERES[where](o.x).flatten(3))
        (result * result * torch.arange(1.0, 1 + result.numel()).view(result.shape)).sum().backward()
        return [result.detach(), *(leaf.grad for leaf in o.leaves if leaf.grad is not None and leaf.grad.any())]

    assert_as_plain(f)


@pytest.mark.parametrize("view", [last, lambda x: x.flatten(2), lambda x: x], ids=["last", "flat", "itself"])
@pytest.mark.parametrize("when", ["before", "after", "between"])
@pytest.mark.parametrize("how", ["hook", "changing hook", "retain_grad"])
def test_hooks(how, when, view):
    """Of a tensor that is a view, or has views, gradients of these left out."""

    def f(o):
        m, seen, another = view(o.x), [], view(o.x)
        early = [] if when == "before" else [(m * m).relu()]
        if how == "retain_grad":
            m.retain_grad()
        else:
            m.register_hook(seen.append if how == "hook" else lambda grad: grad * 2)
        late = [] if when == "after" else [torch.sigmoid(m) + m * 3]
        total = sum(early + late) + another.sin()
        total.mul(torch.arange(1.0, total.numel() + 1).view(total.shape)).sum().backward(retain_graph=True)
        grads = [m.grad] if how == "retain_grad" else [torch.stack(seen).sum(0)] if seen else []
        # Elsewhere gradients are known only behind operations at full width.
        mask = view(torch.zeros(1, C, 1, 1).double().index_fill(1, torch.tensor(X), 1))
        leaf = o.leaves[0].grad.clone()
        o.leaves[0].grad = None
        return [*(grad * mask for grad in grads), leaf, total]

    assert_as_plain(f)


@pytest.mark.parametrize("how", ["attribute", "method"])
def test_a_detached_tensor_as_a_leaf(how):
    def f(o):
        m = last(o.x).detach()
        if how == "attribute":
            m.requires_grad = True
        else:
            assert m.requires_grad_() is m
        assert m.requires_grad and m.is_leaf and m.grad is None
        (m * m).relu().sum().backward()
        return m.grad

    assert_as_plain(f)


@pytest.mark.parametrize("inputs", ["one", "some"])
def test_gradients_of_a_moved_tensor(inputs):
    def f(o):
        m = last(o.x).relu()
        y = (m * m + m.sigmoid()) * 2
        (grad,) = torch.autograd.grad(y.square().sum(), m if inputs == "one" else [m], create_graph=True)
        mask = torch.zeros(C).double()
        mask[list(X)] = 1
        return grad * mask, (grad * mask).square().sum()

    assert_as_plain(f)


def test_second_gradients():
    def f(compact):
        m = wrap_last(compact, LiveList.of_mask(torch.tensor([True, False, True, True])))
        y = (m.tanh() * m.mean(1, True)).view(2, 3, 2, 2).softmax(2) * m.view(2, 3, 2, 2)
        return y.transpose(2, 3).reshape(2, 3, 4).to_dense()

    leaf = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, leaf) and torch.autograd.gradgradcheck(f, leaf)


def test_backward_from_a_moved_tensor():
    def f(o):
        y = last(o.x).square()
        y.backward(torch.ones(N, H, W, C).double(), retain_graph=True)
        torch.autograd.backward([y], [y.detach()])
        return o.leaves[0].grad.clone()

    assert_as_plain(f)


def test_compilers_and_transforms_get_full_width():
    m = last(Operands(True, grad=False).x)
    assert torch.equal(torch.compile(lambda t: t.relu() * 2, backend="eager")(m), m.to_dense().relu() * 2)
    assert torch.equal(torch.vmap(torch.sin)(m), m.to_dense().sin())
    assert torch.equal(torch.func.grad(lambda t: t.square().sum())(m), 2 * m.to_dense())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_autocast_and_short_types(dtype):
    def f(o):
        with torch.autocast("cpu", torch.bfloat16):
            m = last(o.x)
            y = F.linear(F.gelu(m), torch.ones(C, C))
            gate = groups(o.x).softmax(1)
        return y.dtype, (m * 2).dtype, gate.dtype, y, groups(o.x) * gate

    with torch.no_grad(), recording() as fallbacks:
        got, want = f(Operands(True, dtype=dtype, grad=False)), f(Operands(False, dtype=dtype, grad=False))
    assert got[:3] == want[:3] and not fallbacks
    for a, b in zip(got[3:], want[3:], strict=True):
        torch.testing.assert_close(a.to_dense() if isinstance(a, LiveTensor) else a, b, rtol=0.02, atol=0.02)


# ---- what norms and linear layers ask for ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(N, C), (N, H, C), (N, H, W, C)])
def test_values_of_channels_last(size):
    live = LiveList.of_mask(torch.arange(C) % 2 > 0)
    values = torch.randn(*size[:-1], 3, dtype=torch.float64, requires_grad=True)
    x = wrap_last(values, live)
    compact, got = channels_last_of(x)
    assert (
        x.shape == size
        and got is live
        and torch.equal(compact, values)
        and torch.equal(x.to_dense()[..., 1::2], values)
    )
    assert not x.to_dense()[..., ::2].any()
    compact.sum().backward()
    assert torch.equal(values.grad, torch.ones_like(values))


@pytest.mark.parametrize("gate", [False, True])
def test_layers_get_full_width(gate):
    """Of channels that are not in dimension 1."""
    m = last(Operands(True).x.float())
    m = m.sigmoid() if gate else m
    conv, norm = pk.MaskedConv2d(m.shape[1], 4, 1), pk.MaskedBatchNorm2d(m.shape[1])
    norm.set_mask(torch.arange(m.shape[1]) > 0)
    pk.flow(torch.nn.Sequential(conv, norm))
    for layer, op in ((conv, "conv2d"), (norm, "batch_norm")):
        with recording() as fallbacks:
            y = layer(m)
        why = "that hold 0.5" if gate else "in other dimensions"
        assert [row["op"] for row in fallbacks] == [f"{op} (channels {why})"]
        want = layer(m.to_dense())
        assert torch.equal(*(t.to_dense() if isinstance(t, LiveTensor) else t for t in (y, want)))


def test_values_elsewhere():
    x = Operands(True).x
    for other in (x, groups(x), x.transpose(1, 2), last(x).sigmoid(), x.to_dense(), torch.ones(3, 4)):
        assert channels_last_of(other) is None
    assert channels_last_of(last(x))[0].shape == (N, H, W, 4)
    assert channels_last_of(last(x)[:, 0])[0].shape == (N, W, 4)
    full = torch.ones(2, 3, 4)
    assert wrap_last(full, LiveList.all(4)) is full
    with pytest.raises(ValueError, match="2 dimensions"):
        wrap_last(torch.ones(3), LiveList.of_mask(torch.arange(4) > 0))


def test_no_copy_there_and_back():
    x = Operands(True, layout="channels_last").x
    there = last(x)
    assert channels_last_of(there)[0].is_contiguous() and there.is_contiguous()
    back = there.permute(0, 3, 1, 2)
    assert back.compact.data_ptr() == x.compact.data_ptr() and back.is_contiguous(memory_format=torch.channels_last)
