"""MaskedLinear: equal to nn.Linear where nothing is dead, to the reference where something is, in every mode."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.conv import PLANS, assert_same, assert_zero
from cases.layers import FILTERS, HARD, INPUTS, KERNELS, bools, integers
from prunekernels import reference
from prunekernels.live import recording

SHAPES = [(5, 4), (4,), (2, 3, 4), (2, 3, 2, 4), (0, 4), (1, 4)]
LIVE = FILTERS[:, None] & KERNELS & INPUTS


def make(masked=True, **args):
    layer = pk.MaskedLinear(4, 6, **args)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(integers(*parameter.shape))
    if masked:
        layer.set_masks(filter=FILTERS, kernel=KERNELS, input=INPUTS)
    return layer


def expected(x, layer, grad_out, **args):
    """The reference's numbers, of a 1x1 convolution of images of one pixel."""
    image, grad = (t.detach().reshape(-1, t.shape[-1], 1, 1) for t in (x, grad_out))
    weight = layer.weight.detach()[:, :, None, None]
    y, grad_x, grad_w, grad_b = reference.gradients(image, weight, layer.bias, grad, **args)
    y, grad_x = (t.reshape(like.shape) for t, like in ((y, grad_out), (grad_x, x)))
    return y, grad_x, grad_w[:, :, 0, 0], grad_b


def run(layer, x, grad_out):
    y = layer(x)
    leaves = [x, layer.weight, *([] if layer.bias is None else [layer.bias])]
    grads = torch.autograd.grad(y, leaves, grad_out)
    return (y, *grads, *([] if layer.bias is not None else [None]))


def test_is_a_linear_all_live_at_birth():
    layer = pk.MaskedLinear(4, 6)
    assert isinstance(layer, nn.Linear) and (layer.out_channels, layer.in_channels, layer.groups) == (6, 4, 1)
    assert layer.kernel_mask.shape == (6, 4) and layer.filter_mask.shape == (6,) and layer.input_mask.shape == (4,)
    assert layer.density == 1 and layer.weight_grad == "masked" and layer.grad_scale is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_live_equals_linear_bit_for_bit(shape, bias):
    layer, plain = pk.MaskedLinear(4, 6, bias), nn.Linear(4, 6, bias)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(shape, requires_grad=True)
    grad = torch.randn(*shape[:-1], 6)
    for a, b in zip(run(layer, x, grad), run(plain, x, grad), strict=True):
        assert a is b or torch.equal(a, b)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masked_is_the_reference(shape, bias, plan):
    layer, x = make(bias=bias), integers(*shape).requires_grad_()
    grad = integers(*shape[:-1], 6)
    masks = {"filter_mask": FILTERS, "kernel_mask": KERNELS, "input_mask": INPUTS}
    with pk.plan.force(plan):
        got = run(layer, x, grad)
    assert got[0].is_contiguous()
    assert_same(got, expected(x, layer, grad, **masks))
    assert_zero(got[0][..., ~FILTERS]), assert_zero(got[1][..., ~INPUTS]), assert_zero(got[2][~LIVE])


@pytest.mark.parametrize("weight_grad", ["masked", "dense"])
@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_of_dead_weights(weight_grad, scaled):
    layer, x = make(), integers(5, 4).requires_grad_()
    layer.set_masks(hard=HARD)
    layer.weight_grad = weight_grad
    args = {"grad_scale": torch.arange(6).float()} if scaled else {}
    layer.grad_scale = args.get("grad_scale")
    grad = integers(5, 6)
    got = run(layer, x, grad)
    masks = {"filter_mask": FILTERS & HARD, "kernel_mask": KERNELS, "input_mask": INPUTS}
    want = list(expected(x, layer, grad, **masks, weight_grad=weight_grad, **args))
    if weight_grad == "dense":
        want[2] = want[2] * HARD[:, None]
    assert_same(got, want)


def test_strided_inputs():
    layer = make()
    x = integers(2, 4, 3, 5).permute(0, 2, 3, 1)
    assert torch.equal(layer(x), layer(x.contiguous()))
    x = integers(5, 8)[:, ::2]
    assert torch.equal(layer(x), layer(x.contiguous()))


def test_dead_inputs_are_not_read():
    layer, x = make(), integers(5, 4)
    x[:, ~INPUTS] = float("nan")
    assert not layer(x).isnan().any()


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"MaskedLinear: input: expected \[..., 4\], got \[2, 5\]"):
        make()(torch.zeros(2, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    layer, x = make().to(dtype), integers(5, 4).to(dtype)
    want = F.linear(x.double(), (layer.weight * LIVE).double(), (layer.bias * FILTERS).double())
    assert layer(x).dtype == dtype and torch.equal(layer(x).double(), want)


def test_autocast():
    layer, x = make(), integers(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert torch.equal(y.float(), layer(x)) and layer.weight.grad.dtype == torch.float32


def test_double_backward():
    layer, x = make().double(), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = layer.weight.detach().clone().requires_grad_()

    def run(x, weight):
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    assert torch.autograd.gradgradcheck(run, (x, weight))


@pytest.mark.parametrize("weight_grad", ["masked", "dense"])
def test_transforms(weight_grad):
    layer, x = make(), integers(5, 4)
    layer.weight_grad = weight_grad
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    layer(x).square().sum().backward()
    grads = torch.func.grad(loss)(parameters, x)
    assert all(torch.equal(grads[name], p.grad) for name, p in layer.named_parameters())
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    assert all(torch.equal(each[name].sum(0), p.grad) for name, p in layer.named_parameters())


def test_export_trace_and_fx():
    layer, x = make().eval(), integers(5, 4)
    want = layer(x)
    program = torch.export.export(nn.Sequential(layer), (x,))
    assert not any("prunekernels" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(x), want)
    assert torch.equal(torch.jit.trace(layer, x, check_trace=False)(x), want)
    graph = torch.fx.symbolic_trace(nn.Sequential(layer, nn.ReLU()))
    assert any(node.op == "call_module" and node.target == "0" for node in graph.graph.nodes)
    assert torch.equal(graph(x), want.relu())


def test_compiled_code_follows_the_masks():
    layer, x = make(), integers(5, 4)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    layer.set_masks(filter="all", kernel="all", input="all")
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied):
    layer, x = make(), integers(5, 4)
    other = copied(layer)
    assert type(other) is pk.MaskedLinear and torch.equal(other(x), layer(x))
    assert torch.equal(other.kernel_mask, KERNELS)


def test_state_dict_with_and_without_masks():
    layer, other, x = make(), pk.MaskedLinear(4, 6), integers(5, 4)
    state = layer.state_dict()
    assert_zero(state["weight"][~LIVE]), assert_zero(state["bias"][~FILTERS])
    other.load_state_dict(state)
    assert torch.equal(other.kernel_mask, KERNELS) and torch.equal(other(x), layer(x))
    other.load_state_dict({name: state[name] for name in ("weight", "bias")})
    assert other.density == 1 and torch.equal(other(x), layer(x))


def test_meta_device():
    layer = pk.MaskedLinear(4, 6, device="meta")
    assert layer(torch.zeros(2, 3, 4, device="meta")).shape == (2, 3, 6)
    assert layer.to_empty(device="cpu").density == 1


def test_from_linear_and_back():
    plain = nn.Linear(4, 6)
    layer, x = pk.MaskedLinear.from_linear(plain), torch.randn(5, 4)
    assert layer.weight is plain.weight and type(plain) is nn.Linear
    layer.set_masks(filter=FILTERS, kernel=KERNELS, input=INPUTS)
    back = layer.to_linear()
    assert type(back) is nn.Linear and set(back.state_dict()) == {"weight", "bias"}
    torch.testing.assert_close(back(x), layer(x))
    assert_zero(back.weight[~LIVE])


def test_repr_and_plan():
    layer = make()
    assert layer.plan is None
    layer(integers(5, 4))
    assert layer.plan.forward in PLANS and f"kernels={int(LIVE.sum())}/24" in repr(layer)


# ---- live mode


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = pk.MaskedConv2d(3, 4, 3)
        self.hidden = pk.MaskedLinear(4, 6)
        self.last = pk.MaskedLinear(6, 5)

    def forward(self, x):
        x = self.conv(x).relu().mean((2, 3))
        return self.last(self.hidden(x).relu())


def head():
    model = Head()
    model.conv.set_masks(filter=INPUTS)
    model.hidden.set_masks(filter=FILTERS, input=INPUTS)
    model.last.set_masks(input=FILTERS, filter=bools(1, 1, 0, 1, 1))
    return model


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_live_mode_computes_the_same(kernels, scaled):
    model = head()
    if kernels:
        model.hidden.set_masks(kernel=KERNELS)
    if scaled:
        model.hidden.grad_scale = torch.arange(6).float()
    live, x = pk.flow(copy.deepcopy(model)), torch.randn(2, 3, 6, 6)
    with recording() as found:
        y = live(x)
    assert not found
    torch.testing.assert_close(y, model(x))
    for each in (live, model):
        each(x).square().sum().backward()
    for (name, a), b in zip(live.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_live_mode_passes_on_live_rows():
    model = pk.flow(head())
    x = model.conv(torch.randn(2, 3, 6, 6)).mean((2, 3))
    y = model.hidden(x)
    assert type(y) is pk.LiveTensor and y.shape == (2, 6) and y.compact.shape == (2, int(FILTERS.sum()))


def test_live_mode_with_nothing_live():
    model = head()
    model.conv.set_masks(filter=torch.zeros(4, dtype=torch.bool))
    live, x = pk.flow(copy.deepcopy(model)), torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(live(x), model(x))


def test_live_mode_with_numbers_padded_to_multiples():
    model, x = head(), torch.randn(2, 3, 6, 6)
    model.hidden.set_masks(filter=bools(1, 0, 1, 0, 0, 1))
    want = model(x)
    pk.flow(model, align=4)
    y = model.hidden(model.conv(x).mean((2, 3)))
    assert y.compact.shape == (2, 4) and not y.to_dense()[:, [1, 3, 4]].any()
    torch.testing.assert_close(model(x), want)
