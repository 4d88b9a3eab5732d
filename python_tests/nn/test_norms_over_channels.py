"""MaskedLayerNorm and MaskedGroupNorm: what a plain norm computes of the live channels alone."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.conv import assert_zero

C = 12
MASKS = {
    "some": torch.tensor([1, 0, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1]).bool(),
    "even": torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1]).bool(),
    "a group gone": torch.tensor([1, 0, 1, 0, 0, 0, 1, 1, 0, 1, 1, 1]).bool(),
    "one live": torch.arange(C) == 7,
    "one dead": torch.arange(C) != 7,
    "all dead": torch.zeros(C, dtype=torch.bool),
    "all live": torch.ones(C, dtype=torch.bool),
}
FACTORS = {"affine": {}, "no bias": {"bias": False}, "no factors": {"affine": False}, "eps": {"eps": 1e-2}}
SHAPES = {
    "layer": [(4, C), (3, 5, C), (2, 3, 4, C), (C,), (0, 5, C), (1, C)],
    "group": [(4, C), (3, C, 5), (2, C, 3, 4), (2, C, 2, 3, 2), (0, C, 3, 4), (1, C, 1, 1)],
}
CASES = [(kind, shape) for kind, shapes in SHAPES.items() for shape in shapes]


def norm_of(kind, factors="affine", seed=0):
    args = dict(FACTORS[factors])
    if kind == "layer":
        affine = args.pop("affine", True)
        norm = pk.MaskedLayerNorm(C, elementwise_affine=affine, **args)
    else:
        if args.pop("bias", None) is False:
            norm = pk.MaskedGroupNorm(4, C, **args)
            norm.register_parameter("bias", None)
        else:
            norm = pk.MaskedGroupNorm(4, C, **args)
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(torch.rand(p.shape, generator=gen) + 0.5)
    return norm


def axis_of(kind, x):
    return 1 if kind == "group" else x.dim() - 1


def expected(kind, norm, x, mask):
    """By plain norms over the live channels, group by group; differentiable."""
    axis = axis_of(kind, x)
    weight, bias = norm.weight, norm.bias
    parts = []
    for group in [range(C)] if kind == "layer" else torch.arange(C).view(4, -1).tolist():
        live = [c for c in group if mask[c]]
        if live:
            at = torch.tensor(live)
            w, b = (None if p is None else p[at] for p in (weight, bias))
            part = x.index_select(axis, at)
            if kind == "layer":
                parts.append((at, F.layer_norm(part, (len(live),), w, b, norm.eps)))
            else:
                parts.append((at, torch.group_norm(part, 1, w, b, norm.eps)))
    y = x * 0
    for at, part in parts:
        y = y.index_copy(axis, at, part)
    return y


def run(norm, x, mask, forward, grad_out):
    leaf = x.clone().requires_grad_()
    y = forward(leaf)
    grads = [None] * 3
    if y.requires_grad:
        tensors = [leaf, norm.weight, norm.bias]
        found = torch.autograd.grad(y, [t for t in tensors if t is not None], grad_out, allow_unused=True)
        found = iter(found)
        grads = [None if t is None else next(found) for t in tensors]
    return y.detach(), grads


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_equals_the_norm_of_live_channels(kind, shape, name, factors):
    torch.manual_seed(0)
    norm, mask = norm_of(kind, factors).double(), MASKS[name]
    norm.set_mask(mask)
    x, grad_out = torch.randn(shape).double() + 3, torch.randn(shape).double()
    axis = axis_of(kind, x)
    want, want_grads = run(norm, x, mask, lambda x: expected(kind, norm, x, mask), grad_out)
    dead = (~mask).nonzero().flatten()
    x.index_fill_(axis, dead, float("nan"))
    grad_out.index_fill_(axis, dead, float("nan"))
    if x.numel() == 0 and name == "all live":
        return  # torch's own norms
    got, grads = run(norm, x, mask, norm, grad_out)
    assert got.shape == x.shape
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert_zero(got.index_select(axis, dead))
    for grad, want_grad, ax in zip(grads, want_grads, (axis, 0, 0), strict=True):
        if grad is not None:
            want_grad = torch.zeros_like(grad) if want_grad is None else want_grad
            torch.testing.assert_close(grad, want_grad, rtol=1e-8, atol=1e-8)
            assert_zero(grad.index_select(ax, dead))


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ["some", "even", "all live"])
def test_group_norm_keeps_the_memory_format(name, format):
    norm = norm_of("group")
    norm.set_mask(MASKS[name])
    x = torch.randn(2, C, 5, 7).contiguous(memory_format=format)
    y = norm(x)
    assert y.is_contiguous(memory_format=format)
    torch.testing.assert_close(y, expected("group", norm, x, MASKS[name]))


@pytest.mark.parametrize("kind", SHAPES)
def test_all_live_equals_the_plain_norm_bit_for_bit(kind):
    norm = norm_of(kind)
    plain = nn.LayerNorm(C) if kind == "layer" else nn.GroupNorm(4, C)
    plain.load_state_dict({k: v for k, v in norm.state_dict().items() if k != "channel_mask"})
    x = torch.randn(SHAPES[kind][2])
    assert torch.equal(norm(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", SHAPES)
def test_dtypes(kind, dtype):
    norm, mask = norm_of(kind).to(dtype), MASKS["some"]
    norm.set_mask(mask)
    x = torch.randn(SHAPES[kind][2]).to(dtype)
    y = norm(x)
    assert y.dtype == dtype and norm.channel_mask.dtype == torch.bool
    want = expected(kind, copy.deepcopy(norm).double(), x.double(), mask)
    torch.testing.assert_close(y.double(), want, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("name", ["some", "even", "all dead", "all live"])
@pytest.mark.parametrize("kind", SHAPES)
def test_autocast(kind, name):
    norm = norm_of(kind)
    norm.set_mask(MASKS[name])
    x = torch.randn(SHAPES[kind][2]).bfloat16()
    plain = nn.LayerNorm(C) if kind == "layer" else nn.GroupNorm(4, C)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
        assert y.dtype == plain(x).dtype
    torch.testing.assert_close(y.float(), expected(kind, norm, x.float(), MASKS[name]), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kind", SHAPES)
def test_transforms(kind, name):
    norm, mask = norm_of(kind).double(), MASKS[name]
    norm.set_mask(mask)
    x = torch.randn(SHAPES[kind][2]).double()
    want = expected(kind, norm, x, mask)
    parameters = dict(norm.named_parameters())
    call = lambda p, x: torch.func.functional_call(norm, p, x)  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(call, (None, 0))(parameters, torch.stack([x, 2 * x]))[0], want)
    grads = torch.func.grad(lambda p: call(p, x).square().sum())(parameters)
    found = [None, None]
    if want.requires_grad:
        found = torch.autograd.grad(want.square().sum(), list(parameters.values()), allow_unused=True)
    for grad, want_grad in zip(grads.values(), found, strict=True):
        torch.testing.assert_close(grad, torch.zeros_like(grad) if want_grad is None else want_grad)


@pytest.mark.parametrize("name", ["some", "all dead"])
@pytest.mark.parametrize("kind", SHAPES)
def test_gradcheck(kind, name):
    norm = norm_of(kind).double()
    norm.set_mask(MASKS[name])
    x = torch.randn(SHAPES[kind][1]).double().requires_grad_()
    leaves = (x, norm.weight.detach().requires_grad_(), norm.bias.detach().requires_grad_())

    def call(x, w, b):
        norm._parameters.update(weight=w, bias=b)
        return norm(x)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("kind", SHAPES)
def test_compiled_once_for_all_masks(kind):
    norm = norm_of(kind).double()
    x = torch.randn(SHAPES[kind][2]).double()
    torch._dynamo.reset()
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for mask in MASKS.values():
            norm.set_mask(mask)
            torch.testing.assert_close(compiled(x), expected(kind, norm, x, mask))


@pytest.mark.parametrize("name", ["some", "all live", "all dead"])
@pytest.mark.parametrize("kind", SHAPES)
def test_exported_and_traced(kind, name):
    norm, mask = norm_of(kind).eval(), MASKS[name]
    norm.set_mask(mask)
    x = torch.randn(SHAPES[kind][2])
    want = expected(kind, norm, x, mask)
    for strict in (False, True):
        torch.testing.assert_close(torch.export.export(norm, (x,), strict=strict).module()(x), want)
    torch.testing.assert_close(torch.jit.trace(norm, x)(x), want)
    traced = torch.fx.symbolic_trace(nn.Sequential(norm))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    torch.testing.assert_close(traced(x), want)


@pytest.mark.parametrize("kind", SHAPES)
def test_export_of_what_is_all_live_is_the_plain_norm(kind):
    norm = norm_of(kind).eval()
    x = torch.randn(SHAPES[kind][2])
    targets = [str(node.target) for node in torch.export.export(norm, (x,)).graph.nodes]
    assert f"aten.{kind}_norm.default" in targets


def test_meta_device():
    with torch.device("meta"):
        layer, group = pk.MaskedLayerNorm(C), pk.MaskedGroupNorm(4, C)
    assert layer(torch.empty(2, C, device="meta")).shape == (2, C)
    assert group(torch.empty(2, C, 3, device="meta")).shape == (2, C, 3)
    norm = layer.to_empty(device="cpu")
    assert norm.channel_mask.all()


@pytest.mark.parametrize("kind", SHAPES)
def test_mask_and_state(kind):
    norm, mask = norm_of(kind), MASKS["some"]
    x = torch.randn(SHAPES[kind][2])
    norm(x)
    norm.channel_mask.copy_(mask)
    torch.testing.assert_close(norm(x), expected(kind, norm, x, mask))
    assert "channels=8/12" in repr(norm)
    state = norm.state_dict()
    assert set(state) == {"weight", "bias", "channel_mask"}
    assert not state["weight"][~mask].any() and norm.weight.all()
    other = norm_of(kind, seed=1)
    other.load_state_dict(state)
    assert torch.equal(other(x), norm(x)) and torch.equal(other.channel_mask, mask)
    for copied in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert type(copied) is type(norm) and torch.equal(copied(x), norm(x))
        copied.set_mask("all")
        assert torch.equal(norm.channel_mask, mask)
    norm.zero_dead()
    assert not norm.weight[~mask].any()


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kind", SHAPES)
def test_from_norm_and_to_norm(kind, name):
    plain = (nn.LayerNorm(C, eps=1e-3) if kind == "layer" else nn.GroupNorm(4, C, eps=1e-3)).eval()
    cls = pk.MaskedLayerNorm if kind == "layer" else pk.MaskedGroupNorm
    norm = cls.from_norm(plain)
    assert type(norm) is cls and norm.weight is plain.weight and norm.eps == 1e-3 and not norm.training
    norm.set_mask(MASKS[name])
    back = norm.to_norm()
    x = torch.randn(SHAPES[kind][2])
    assert isinstance(back, type(plain)) and (type(back) is type(plain)) == (name == "all live")
    torch.testing.assert_close(back(x), norm(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(nn.Sequential(back))(x), norm(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(back))(x), norm(x))
    torch.testing.assert_close(torch.jit.script(back)(x), norm(x))
    assert plain.weight.all()


class LayerNorm2d(nn.LayerNorm):
    """As timm and torchvision have it."""

    def forward(self, x):
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)


class LayerNormAct2d(nn.LayerNorm):
    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x):
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return self.act(self.drop(y.permute(0, 3, 1, 2)))


class GroupNormAct(nn.GroupNorm):
    def __init__(self, channels):
        super().__init__(4, channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class ConvNextLayerNorm(nn.LayerNorm):
    """As transformers has it."""

    def __init__(self, channels, data_format="channels_first"):
        super().__init__(channels)
        self.data_format = data_format

    def forward(self, x):
        if self.data_format == "channels_last":
            return super().forward(x)
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


LayerNorm2d.__module__ = "torchvision.models.convnext"
ConvNextLayerNorm.__module__ = "transformers.models.convnext.modeling_convnext"
LayerNormAct2d.__module__ = GroupNormAct.__module__ = "timm.layers.norm_act"


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("cls", [LayerNorm2d, LayerNormAct2d, GroupNormAct, ConvNextLayerNorm])
def test_subclasses_of_libraries(cls, name, format):
    norm, mask = cls(C).double(), MASKS[name]
    with torch.no_grad():
        for p in norm.parameters():
            p.uniform_(0.5, 1.5)
    x = torch.randn(2, C, 3, 5).double().contiguous(memory_format=format)
    plain = copy.deepcopy(norm)
    assert pk.convert(norm).norms == [""] and isinstance(norm, cls) and torch.equal(norm(x), plain(x))
    norm.set_mask(mask)
    kind = "group" if cls is GroupNormAct else "layer"
    at = x if kind == "group" else x.permute(0, 2, 3, 1)
    want = expected(kind, norm, at, mask)
    want = want if kind == "group" else want.permute(0, 3, 1, 2)
    want = getattr(norm, "act", nn.Identity())(want)
    torch.testing.assert_close(norm(x), want)
    torch.testing.assert_close(torch.func.functional_call(norm, {}, x), want)
    torch.testing.assert_close(torch.func.vmap(norm)(x[None])[0], want)
    torch.testing.assert_close(torch.export.export(norm, (x,)).module()(x), want)
    live = pk.flow(nn.Sequential(norm))(x)
    torch.testing.assert_close(live, want)
    pk.flow(norm, False)
    back = norm.to_norm()
    assert isinstance(back, cls) and (type(back) is cls) == (name == "all live")
    torch.testing.assert_close(back(x), want)
    torch.testing.assert_close(copy.deepcopy(back)(x), want)
    if cls is LayerNorm2d:
        torch.testing.assert_close(torch.jit.script(back)(x), want)
    if name != "all live":
        with pytest.raises(ValueError, match="expected all channels live, got dead ones.*pk.shrink.*bake=True"):
            pk.restore(norm)
        assert type(norm).__name__ == f"Masked{cls.__name__}"
    pk.restore(norm, bake=True)
    torch.testing.assert_close(norm(x), want)
    assert not hasattr(norm, "channel_mask")


@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_a_layer_says_where_its_channels_are(data_format):
    norm, x = ConvNextLayerNorm(C, data_format).double(), torch.randn(2, C, 3, C).double()
    pk.convert(norm)
    norm.set_mask(torch.arange(C) % 3 > 0)
    at = x.permute(0, 2, 3, 1) if data_format == "channels_first" else x
    want = expected("layer", norm, at, norm.channel_mask)
    want = want.permute(0, 3, 1, 2) if data_format == "channels_first" else want
    torch.testing.assert_close(norm(x), want)
    torch.testing.assert_close(copy.deepcopy(norm.to_norm())(x), want)


def test_convert_names_what_it_leaves_alone():
    model = nn.Sequential(nn.LayerNorm((3, 4)), nn.LayerNorm(4), nn.GroupNorm(2, 4))
    report = pk.convert(model)
    assert report.norms == ["1", "2"] and list(report.skipped) == ["0"]
    assert "2 dimensions" in report.skipped["0"]
    assert type(model[1]) is pk.MaskedLayerNorm and type(model[2]) is pk.MaskedGroupNorm
    assert not pk.convert(nn.Sequential(nn.LayerNorm(4)), norms=False).norms
    model[1].set_mask(torch.arange(4) > 0)
    pk.restore(model, bake=True)
    report = pk.convert(model)
    assert report.norms == ["2"] and "for good" in report.skipped["1"]


def test_pruned_by_torch_keeps_its_numbers():
    """A channel that torch pruned still counts in the statistics, so it is no dead one."""
    norm = nn.GroupNorm(2, 6)
    torch.nn.utils.prune.l1_unstructured(norm, "weight", 2)
    x = torch.randn(2, 6, 3, 3)
    want = norm(x)
    report = pk.convert(norm)
    assert norm.channel_mask.all() and "no mask; 2 entries" in report.pruned[""]
    assert torch.equal(norm(x), want)


def test_optimizers_freeze_dead_channels():
    for kind in SHAPES:
        for make in (torch.optim.SGD, pk.optim.MaskedSGD):
            norm, mask = norm_of(kind), MASKS["some"]
            optimizer = make(norm.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
            pk.optim.bind(optimizer, norm)
            x = torch.randn(SHAPES[kind][2])
            norm(x).sum().backward()
            optimizer.step()
            norm.set_mask(mask)
            before = norm.weight.detach().clone()
            norm(x).square().sum().backward()
            optimizer.step()
            assert torch.equal(norm.weight[~mask], before[~mask]) and not torch.equal(norm.weight, before)


def test_averages():
    norm, mask = norm_of("layer"), MASKS["some"]
    average = torch.optim.swa_utils.AveragedModel(norm, use_buffers=True)
    norm.set_mask(mask)
    pk.copy_masks(norm, average)
    x = torch.randn(3, C)
    torch.testing.assert_close(average(x), norm(x))
    assert not average.module.weight[~mask].any()


def test_errors():
    with pytest.raises(ValueError, match="normalized_shape: expected one dimension, got \\[3, 4\\]"):
        pk.MaskedLayerNorm((3, 4))
    with pytest.raises(ValueError, match="from_norm: norm: expected one normalized dimension"):
        pk.MaskedLayerNorm.from_norm(nn.LayerNorm((3, 4)))
    for kind in SHAPES:
        norm = norm_of(kind)
        norm.set_mask(MASKS["some"])
        with pytest.raises(ValueError, match="input: expected 12 channels"):
            norm(torch.randn(2, 11, 11))
        with pytest.raises(ValueError, match="(?s)set_mask.*expected.*got"):
            norm.set_mask(MASKS["some"][:5])
