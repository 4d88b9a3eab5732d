"""MaskedConvTranspose2d: equal to nn.ConvTranspose2d where nothing is dead, to zeros in it where something is."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import prunekernels as pk
from cases.conv import PLANS, assert_same, assert_zero, only
from cases.layers import integers
from prunekernels.live import recording

C, K = 4, 6
GEOMETRIES = [
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    {"kernel_size": (2, 3), "stride": (1, 2), "padding": (0, 1), "dilation": (2, 1)},
    {"kernel_size": 1},
    {"kernel_size": 3, "dilation": 3, "output_padding": 2},  # more than the stride: at full width
]
GROUPS = [1, 2]


def make(groups=1, masked=True, bias=True, **geometry):
    layer = pk.MaskedConvTranspose2d(C, K, groups=groups, bias=bias, **(geometry or GEOMETRIES[0]))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(integers(*parameter.shape))
    if masked:
        layer.set_masks(**masks(groups))
    return layer


def masks(groups=1):
    kernels = torch.arange(K * C // groups).view(K, -1) % 7 != 2
    return {"filter": ~only(K, 1, 4), "kernel": kernels, "input": ~only(C, 1)}


def live_entries(layer):
    """bool, of the weight's first two dimensions, written out kernel by kernel."""
    per_k, per_c = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    live = torch.zeros(layer.weight.shape[:2], dtype=torch.bool)
    for c in range(layer.in_channels):
        for j in range(per_k):
            k = c // per_c * per_k + j
            live[c, j] = bool(layer.filter_mask[k] & layer.kernel_mask[k, c % per_c] & layer.input_mask[c])
    return live


def expected(layer, x, grad, output_size=None):
    """(y, grad_x, grad_w, grad_b) of a plain layer with zeros for what is dead."""
    plain = nn.ConvTranspose2d(C, K, layer.kernel_size, layer.stride, layer.padding, layer.output_padding, layer.groups,
                               layer.bias is not None, layer.dilation, dtype=torch.float64)  # fmt: skip
    live = live_entries(layer)[:, :, None, None]
    with torch.no_grad():
        plain.weight.copy_(layer.weight * live)
        if layer.bias is not None:
            plain.bias.copy_(layer.bias * layer.filter_mask)
    x, grad = x.detach().double().requires_grad_(), grad.double()
    y = plain(x, output_size)
    grad_x, grad_w, *grad_b = torch.autograd.grad(y, (x, *plain.parameters()), grad)
    grad_b = grad_b[0] * layer.filter_mask if grad_b else None
    return y.detach(), grad_x, grad_w * live, grad_b


def run(layer, x, grad, *rest):
    y = layer(x, *rest)
    grads = torch.autograd.grad(y, (x, *layer.parameters()), grad)
    return (y, *grads, *([None] if layer.bias is None else []))


def test_is_a_transposed_convolution_all_live_at_birth():
    layer = pk.MaskedConvTranspose2d(C, K, 3, groups=2)
    assert isinstance(layer, nn.ConvTranspose2d) and layer.density == 1
    assert layer.kernel_mask.shape == (K, C // 2) and layer.weight.shape[:2] == (C, K // 2)
    assert layer.filters_first(layer.weight).shape == (K, C // 2, 3, 3)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_all_live_equals_the_plain_layer_bit_for_bit(geometry, groups):
    layer, plain = (cls(C, K, groups=groups, **geometry) for cls in (pk.MaskedConvTranspose2d, nn.ConvTranspose2d))
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, C, 5, 4, requires_grad=True)
    grad = torch.randn_like(plain(x))
    assert all(map(torch.equal, run(layer, x, grad), run(plain, x, grad)))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_masked_is_the_plain_layer_with_zeros(geometry, groups, layout, plan):
    layer = make(groups, **geometry).to(memory_format=layout)
    x = integers(2, C, 5, 4).contiguous(memory_format=layout).requires_grad_()
    grad = integers(*layer(x).shape)
    with pk.plan.force(plan):
        got = run(layer, x, grad)
    assert_same(got, expected(layer, x, grad))
    assert_zero(got[0][:, ~layer.filter_mask]), assert_zero(got[1][:, ~layer.input_mask])


@pytest.mark.parametrize("case", [{"bias": False}, {"groups": 2, "bias": False}], ids=str)
def test_without_bias(case):
    layer, x = make(**case), integers(2, C, 5, 4).requires_grad_()
    grad = integers(*layer(x).shape)
    assert_same(run(layer, x, grad), expected(layer, x, grad))


def test_depthwise():
    layer = pk.MaskedConvTranspose2d(4, 4, 2, stride=2, groups=4)
    layer.set_masks(filter=only(4, 0, 2), input=~only(4, 2))
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(layer(x), layer.to_conv()(x))
    assert_zero(layer(x)[:, [1, 3]])


def test_output_size_and_unbatched_input():
    layer, x = make(**GEOMETRIES[1]), integers(2, C, 5, 4).requires_grad_()
    grad = integers(2, K, 9, 8)
    assert_same(run(layer, x, grad, [9, 8]), expected(layer, x, grad, [9, 8]))
    assert torch.equal(layer(x[0]), layer(x)[0])


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("weight_grad", ["masked", "dense"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("geometry", [GEOMETRIES[1], GEOMETRIES[4]], ids=str)
def test_gradients_of_dead_weights(geometry, scaled, weight_grad, groups):
    layer = make(groups, **geometry)
    layer.set_masks(hard=~only(K, 4))
    layer.weight_grad = weight_grad
    layer.grad_scale = torch.arange(K).float() if scaled else None
    x = integers(2, C, 5, 4).requires_grad_()
    grad = integers(*layer(x).shape)
    got, want = run(layer, x, grad), list(expected(layer, x, grad))
    if weight_grad == "dense":
        whole = copy.deepcopy(layer)
        whole.set_masks(filter="all", kernel="all")
        whole.weight_grad, whole.grad_scale = "masked", None
        want[2] = expected(whole, x, grad)[2]  # hard-dead filters and dead inputs have none
    if scaled:
        factors = layer.grad_scale.view(groups, 1, -1).expand(-1, C // groups, -1).reshape(C, -1)
        want[2] = want[2] * factors[:, :, None, None]
    assert_same(got, want)


def test_dead_inputs_are_not_read():
    layer, x = make(), integers(2, C, 5, 4)
    x[:, ~layer.input_mask] = float("nan")
    assert not layer(x).isnan().any()


def test_dtypes_and_autocast():
    layer, x = make(), integers(2, C, 5, 4)
    want = layer(x)
    assert torch.equal(copy.deepcopy(layer).double()(x.double()).float(), want)
    assert copy.deepcopy(layer).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
    assert torch.equal(y.float(), want)
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("weight_grad", ["masked", "dense"])
def test_double_backward(weight_grad):
    layer, x = make().double(), torch.randn(2, C, 3, 3, dtype=torch.float64, requires_grad=True)
    layer.weight_grad = weight_grad
    grad = torch.randn(2, K, 6, 6, dtype=torch.float64, requires_grad=True)

    def of_input(x, grad):
        return torch.autograd.grad(layer(x), x, grad, create_graph=True)[0]

    def of_weight(x, grad):
        return torch.autograd.grad(layer(x), layer.weight, grad, create_graph=True)[0]

    assert torch.autograd.gradcheck(of_input, (x, grad)) and torch.autograd.gradcheck(of_weight, (x, grad))


@pytest.mark.parametrize("weight_grad", ["masked", "dense"])
@pytest.mark.parametrize("groups", GROUPS)
def test_transforms(groups, weight_grad):
    layer, x = make(groups), integers(3, C, 3, 3)
    layer.weight_grad = weight_grad
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    layer(x).square().sum().backward()
    grads = torch.func.grad(loss)(parameters, x)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for name, p in layer.named_parameters():
        assert torch.equal(grads[name], p.grad) and torch.equal(each[name].sum(0), p.grad)


@pytest.mark.parametrize("groups", GROUPS)
def test_export_trace_and_fx(groups):
    layer, x = make(groups).eval(), integers(2, C, 3, 3)
    want = layer(x)
    program = torch.export.export(nn.Sequential(layer), (x,))
    assert not any("prunekernels" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(x), want)
    assert torch.equal(torch.jit.trace(layer, x, check_trace=False)(x), want)
    graph = torch.fx.symbolic_trace(nn.Sequential(layer, nn.ReLU()))
    assert any(node.op == "call_module" and node.target == "0" for node in graph.graph.nodes)
    assert torch.equal(graph(x), want.relu())


@pytest.mark.parametrize("weight_grad", ["masked", "dense"])
def test_compiled_code_follows_the_masks(weight_grad):
    layer, x = make(), integers(2, C, 3, 3)
    layer.weight_grad = weight_grad
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        layer.zero_grad()
        compiled(x).sum().backward()
        got = layer.weight.grad.clone()
        layer.zero_grad()
        layer(x).sum().backward()
        assert torch.equal(compiled(x), layer(x)) and torch.equal(got, layer.weight.grad)
        layer.set_masks(filter="all", kernel="all", input="all")


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied):
    layer, x = make(), integers(2, C, 3, 3)
    other = copied(layer)
    assert type(other) is pk.MaskedConvTranspose2d and torch.equal(other(x), layer(x))
    other.set_masks(filter="all")
    assert not torch.equal(other(x), layer(x)) or copied is copy.copy


@pytest.mark.parametrize("groups", GROUPS)
def test_state_dict_with_and_without_masks(groups):
    layer, other, x = make(groups), make(groups, masked=False), integers(2, C, 3, 3)
    state = layer.state_dict()
    assert_zero(state["weight"][~live_entries(layer)]), assert_zero(state["bias"][~layer.filter_mask])
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x)) and torch.equal(other.kernel_mask, layer.kernel_mask)
    other.load_state_dict({name: state[name] for name in ("weight", "bias")})
    assert other.density == 1 and torch.equal(other(x), layer(x))


def test_meta_device():
    layer = pk.MaskedConvTranspose2d(C, K, 2, stride=2, device="meta")
    assert layer(torch.zeros(2, C, 3, 3, device="meta")).shape == (2, K, 6, 6)
    assert layer.to_empty(device="cpu").density == 1


@pytest.mark.parametrize("groups", GROUPS)
def test_convert_and_restore(groups):
    plain = nn.ConvTranspose2d(C, K, 2, groups=groups)
    model, x = nn.Sequential(plain), torch.randn(2, C, 3, 3)
    want = model(x)
    report = pk.convert(model)
    assert report.converted == ["0"] and type(model[0]) is pk.MaskedConvTranspose2d and model[0] is plain
    assert torch.equal(model(x), want)
    model[0].set_masks(**masks(groups))
    live, want = live_entries(model[0]), model(x)
    assert pk.restore(model).converted == ["0"] and type(model[0]) is nn.ConvTranspose2d
    assert_zero(model[0].weight[~live])
    torch.testing.assert_close(model(x), want)


def test_a_subclass():
    class Up(nn.ConvTranspose2d):
        def __init__(self, width):
            super().__init__(2 * width, width, 2, stride=2)

    model, x = nn.Sequential(Up(3)), torch.randn(2, 6, 3, 3)
    want = model(x)
    assert pk.convert(model).converted == ["0"] and isinstance(model[0], Up)
    assert torch.equal(model(x), want)
    pk.restore(model)
    assert type(model[0]) is Up


def test_what_torch_pruned():
    model, x = nn.Sequential(nn.ConvTranspose2d(C, K, 2, bias=False)), torch.randn(2, C, 3, 3)
    prune.ln_structured(model[0], "weight", 0.5, n=2, dim=1)
    want = model(x)
    assert pk.convert(model).pruned["0"] == "dead: 3 filters" and int(model[0].filter_mask.sum()) == 3
    torch.testing.assert_close(model(x), want)


def test_repr_and_plan():
    layer = make()
    assert layer.plan is None
    layer(integers(2, C, 3, 3))
    assert layer.plan.forward in PLANS and "filters=4/6" in repr(layer)


# ---- live mode


class Decoder(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.conv = pk.MaskedConv2d(3, C, 3, padding=1)
        self.up = pk.MaskedConvTranspose2d(C, K, 2, stride=2, groups=groups)
        self.plain = nn.ConvTranspose2d(K, 2, 3)

    def forward(self, x):
        return self.plain(self.up(self.conv(x).relu()).relu())


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_live_mode_computes_the_same(scaled, kernels, bias, groups):
    model = Decoder(groups)
    if not bias:
        model.up.bias = None
    model.conv.set_masks(filter=~only(C, 1, 2))
    model.up.set_masks(**{**masks(groups), **({} if kernels else {"kernel": "all"})})
    model.up.grad_scale = torch.arange(K).float() if scaled else None
    live, x = pk.flow(copy.deepcopy(model)), torch.randn(2, 3, 5, 5)
    with recording() as found:
        y = live(x)
    assert [row["op"] for row in found] == ([] if groups == 1 else ["conv_transpose2d (groups)"])
    torch.testing.assert_close(y, model(x))
    for each in (live, model):
        each(x).square().sum().backward()
    for (name, a), b in zip(live.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_live_mode_passes_on_live_filters():
    model = pk.flow(Decoder())
    model.conv.set_masks(filter=~only(C, 1, 2))
    model.up.set_masks(filter=only(K, 0, 3, 5))
    y = model.up(model.conv(torch.randn(2, 3, 5, 5)))
    assert type(y) is pk.LiveTensor and y.compact.shape == (2, 3, 10, 10)
    assert type(F.relu(y)) is pk.LiveTensor


@pytest.mark.parametrize("weight_grad", ["masked", "dense"])
def test_live_mode_with_nothing_live(weight_grad):
    model = Decoder()
    model.up.weight_grad = weight_grad
    model.conv.set_masks(filter=torch.zeros(C, dtype=torch.bool))
    live, x = pk.flow(copy.deepcopy(model)), torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(live(x), model(x))


def test_live_mode_with_numbers_padded_to_multiples():
    model = Decoder()
    model.conv.set_masks(filter=only(C, 1))
    model.up.set_masks(filter=only(K, 0, 3, 5))
    x = torch.randn(2, 3, 5, 5)
    want = model(x)
    pk.flow(model, align=4)
    y = model.up(model.conv(x))
    assert y.compact.shape[1] == 4 and not y.to_dense()[:, [1, 2, 4]].any()
    torch.testing.assert_close(model(x), want)
