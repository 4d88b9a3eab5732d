"""Every rule of live mode against the same function of the full-width tensor."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cases.live import OTHER, C, H, N, W, assert_as_plain, assert_falls_back, assert_flows
from prunekernels.live import LiveTensor

ACTIVATIONS = {
    "relu": torch.relu, "relu method": lambda x: x.relu(), "F.relu": F.relu, "nn.ReLU": nn.ReLU(), "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2), "silu": F.silu, "gelu": F.gelu, "gelu tanh": nn.GELU("tanh"),
    "hardswish": F.hardswish, "tanh": torch.tanh, "F.tanh": F.tanh, "elu": F.elu, "celu": F.celu, "selu": F.selu,
    "mish": F.mish, "softsign": F.softsign, "tanhshrink": F.tanhshrink, "softshrink": F.softshrink,
    "hardshrink": F.hardshrink, "abs": abs, "neg": lambda x: -x, "square": torch.square, "sign": torch.sign,
    "sin": torch.sin, "sinh": torch.sinh, "asinh": torch.asinh, "erf": torch.erf, "expm1": torch.expm1,
    "log1p": lambda x: x.abs().log1p(), "atan": torch.atan, "floor": torch.floor, "round": torch.round,
    "hardtanh": F.hardtanh, "hardtanh bounds": nn.Hardtanh(-0.5, 3), "clamp": lambda x: x.clamp(-1, 1),
    "clamp min": lambda x: torch.clamp(x, min=0), "clamp max": lambda x: x.clamp(max=1),
    "clip": lambda x: x.clip(0, 6), "clamp_min": lambda x: x.clamp_min(0), "clamp_max": lambda x: x.clamp_max(2.0),
    "pow": lambda x: x.pow(2), "**": lambda x: x**3,
    "prelu": lambda x: F.prelu(x, torch.tensor([0.3], dtype=x.dtype)),
    "prelu by channel": lambda x: F.prelu(x, torch.arange(C, dtype=x.dtype)),
    "dropout off": lambda x: F.dropout(x, 0.5, False),
    "dropout2d off": lambda x: F.dropout2d(x if x.dim() == 4 else x[..., None, None], 0.5, False),
    "dropout of nothing": nn.Dropout(0), "identity": nn.Identity(), "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(), "double": lambda x: x.double(), "to": lambda x: x.to(torch.float32),
    "to device": lambda x: x.to("cpu"), "float": lambda x: x.float(), "bfloat16": lambda x: x.bfloat16(),
    "channels last": lambda x: x.to(memory_format=torch.channels_last), "type_as": lambda x: x.type_as(torch.ones(1)),
    "detach": lambda x: x.detach(),
}  # fmt: skip
SPACE = {
    "max pool": lambda x: F.max_pool2d(x, 2), "nn.MaxPool2d": nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "avg pool": lambda x: F.avg_pool2d(x, 3, 2, 1), "nn.AvgPool2d": nn.AvgPool2d(2, count_include_pad=False),
    "lp pool": lambda x: F.lp_pool2d(x.abs() + x.square(), 2, 2).detach(), "adaptive avg": nn.AdaptiveAvgPool2d(1),
    "adaptive avg tuple": nn.AdaptiveAvgPool2d((3, None)), "adaptive max": nn.AdaptiveMaxPool2d((2, 3)),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, (7, 5), mode="bilinear", align_corners=False),
    "bicubic": lambda x: F.interpolate(x, scale_factor=0.5, mode="bicubic", antialias=True),
    "nn.Upsample": nn.Upsample(scale_factor=2, mode="bilinear"), "mean": lambda x: x.mean((2, 3)),
    "mean keepdim": lambda x: x.mean([-1, -2], keepdim=True), "mean dim": lambda x: torch.mean(x, dim=(2, 3)),
    "mean axis": lambda x: x.mean(axis=3), "mean one": lambda x: x.mean(-1), "sum": lambda x: x.sum((2, 3)),
    "sum dtype": lambda x: torch.sum(x, 2, dtype=torch.float32), "amax": lambda x: x.amax((2, 3)),
    "amin": lambda x: torch.amin(x, 3), "var": lambda x: x.var((2, 3)), "biased var": lambda x: x.var((2, 3), False),
}  # fmt: skip
SHAPE = {
    "flatten": lambda x: x.flatten(1), "torch.flatten": lambda x: torch.flatten(x, 1), "nn.Flatten": nn.Flatten(),
    "flatten space": lambda x: x.flatten(2), "flatten start_dim": lambda x: x.flatten(start_dim=2, end_dim=3),
    "view": lambda x: x.view(N, -1), "view list": lambda x: x.view([x.size(0), C * H * W]),
    "view space": lambda x: x.contiguous().view(N, C, -1), "reshape": lambda x: x.reshape(N, C, W, H),
    "torch.reshape": lambda x: torch.reshape(x, (N, -1)), "view_as": lambda x: x.view_as(torch.ones(N, C * H * W)),
    "squeeze": lambda x: x.mean((2, 3), keepdim=True).squeeze(), "squeeze dim": lambda x: x[..., :1].squeeze(-1),
    "squeeze dims": lambda x: torch.squeeze(x.mean((2, 3), True), (2, 3)), "squeeze nothing": lambda x: x.squeeze(2),
    "unsqueeze": lambda x: x.unsqueeze(-1), "torch.unsqueeze": lambda x: torch.unsqueeze(x, 2),
    "transpose": lambda x: x.transpose(2, 3), "permute": lambda x: x.permute(0, 1, 3, 2),
    "expand": lambda x: x.mean((2, 3), True).expand(-1, -1, H, W),
    "expand_as": lambda x: x.mean(3, True).expand_as(x), "pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "pad value": lambda x: F.pad(x, (1, 1), "constant", 0), "pad channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 3)),
    "pad both": lambda x: F.pad(x, (1, 1, 0, 0, 0, 2)), "reflect": lambda x: F.pad(x, (1, 2, 1, 0), mode="reflect"),
    "replicate": nn.ReplicationPad2d(2), "circular": lambda x: F.pad(x, (1, 1, 1, 1), "circular"),
    "nn.ZeroPad2d": nn.ZeroPad2d(1), "narrow": lambda x: x.narrow(1, 1, 4),
    "narrow space": lambda x: torch.narrow(x, -1, 2, 3), "narrow from the end": lambda x: x.narrow(1, -4, 3),
    "slice batch": lambda x: x[1:], "slice channels": lambda x: x[:, 1:4], "slice open": lambda x: x[:, -2:],
    "slice space": lambda x: x[:, :, ::2, 1:-1], "slice dots": lambda x: x[..., 1:], "slice all": lambda x: x[...],
    "no index": lambda x: x[()], "number behind": lambda x: x[:, :, 0, 0], "dots and number": lambda x: x[..., -1],
    "new dimension behind": lambda x: x[:, :, None], "images": lambda x: x[torch.tensor([1, 1, 0])],
    "image mask": lambda x: x[torch.tensor([True, False])], "chunk batch": lambda x: x.chunk(2),
    "chunk channels": lambda x: torch.chunk(x, 3, 1), "chunk space": lambda x: x.chunk(4, dim=-1),
    "split": lambda x: x.split(1), "split channels": lambda x: x.split(4, 1),
    "split sizes": lambda x: torch.split(x, [1, 2, 3], dim=1), "split space": lambda x: torch.split(x, [1, 3], 2),
}  # fmt: skip
IN_PLACE = {
    "relu_": lambda x: x.relu_(), "torch.relu_": torch.relu_, "F.relu": lambda x: F.relu(x, inplace=True),
    "nn.ReLU6": nn.ReLU6(inplace=True), "hardswish": nn.Hardswish(inplace=True), "silu": nn.SiLU(inplace=True),
    "leaky_relu_": F.leaky_relu_, "elu": nn.ELU(inplace=True), "clamp_": lambda x: x.clamp_(-1, 1),
    "mul_": lambda x: x.mul_(2), "*=": lambda x: x.__imul__(0.5), "div_": lambda x: x.div_(4),
    "neg_": lambda x: x.neg_(), "/=": lambda x: x.__itruediv__(4), "dropout": lambda x: F.dropout(x, 0.0, True, True),
    "tanh_": torch.tanh_, "+= 0": lambda x: x.__iadd__(0), "-= 0": lambda x: x.sub_(0.0),
    "clamp_min_": lambda x: x.clamp_min_(-0.5),
}  # fmt: skip
FULL_WIDTH = {
    "softmax": lambda x: x.softmax(1), "mean of all": lambda x: x.mean(),
    "largest of channels": lambda x: x.amax(1), "sum over batch": lambda x: x.sum(0), "max": lambda x: x.max(),
    "clamp tensor": lambda x: x.clamp(torch.zeros(()).double()),
    "layer_norm": lambda x: F.layer_norm(x, (W,)),
    "group_norm": lambda x: F.group_norm(x, 2), "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "batch_norm eval": lambda x: F.batch_norm(x, torch.ones(C).double(), torch.ones(C).double()),
    "indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "pixel_shuffle": lambda x: F.pixel_shuffle(x[:, :4], 2), "view batch": lambda x: x.view(-1),
    "flatten all": lambda x: x.flatten(),
    "pad with 1": lambda x: F.pad(x, (1, 1), value=1), "pad batch": lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0)),
    "pad cuts": lambda x: F.pad(x, (0, 0, 0, 0, -1, 0)),
    "new dimension": lambda x: x[:, None], "image": lambda x: x[0], "channel": lambda x: x[:, 2],
    "channels": lambda x: x[:, [0, 3]], "steps": lambda x: x[:, ::2], "by mask": lambda x: x[x > 0],
    "stack": lambda x: torch.stack([x]), "roll": lambda x: x.roll(1, 1),
    "where": lambda x: torch.where(x > 0, x, 1.0), "unbind": lambda x: x.unbind(1),
    "repeat": lambda x: x.repeat(1, 2, 1, 1), "matmul": lambda x: x @ torch.ones(W, 2).double(),
    "einsum": lambda x: torch.einsum("nchw,nchv->nwv", x, x), "expand": lambda x: x.expand(3, N, C, H, W),
    "int": lambda x: x.int(), "cumsum": lambda x: x.cumsum(1), "instance_norm": lambda x: F.instance_norm(x),
    "normalize": lambda x: F.normalize(x, dim=1), "1-D max pool": lambda x: F.max_pool2d(x.flatten(2), 2),
    "flip": lambda x: x.flip(1), "T": lambda x: x.mean((2, 3)).T,
    "log_softmax": lambda x: F.log_softmax(x.mean((2, 3)), 1), "grid": lambda x: F.unfold(x, 2),
}  # fmt: skip


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("name", ACTIVATIONS | SPACE)
def test_what_keeps_zero_flows(name, layout):
    assert_flows(lambda o: (ACTIVATIONS | SPACE)[name](o.x), layout=layout)


@pytest.mark.parametrize("name", SHAPE)
def test_shapes_flow(name):
    assert_flows(lambda o: SHAPE[name](o.x))


@pytest.mark.parametrize("name", [name for name in SHAPE if "view" not in name])
def test_shapes_in_channels_last(name):
    assert_flows(lambda o: SHAPE[name](o.x), layout="channels_last")


@pytest.mark.parametrize("name", ACTIVATIONS | SPACE | SHAPE)
def test_nothing_live(name):
    assert_as_plain(lambda o: (ACTIVATIONS | SPACE | SHAPE)[name](o.x), x=())


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if not name.startswith(("prelu", "channels last"))])
def test_activations_of_rows(name):
    assert_flows(lambda o: ACTIVATIONS[name](o.flat))


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place(name):
    def f(o):
        before, result = o.x, IN_PLACE[name](o.x)
        assert result is before
        return result, o.x * 2

    assert_flows(f)


@pytest.mark.parametrize("name", FULL_WIDTH)
def test_without_a_rule(name):
    assert_falls_back(lambda o: FULL_WIDTH[name](o.x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["softmax", "view batch", "relu_", "flatten", "mean", "mul_"])
def test_without_gradients(name, mode):
    with mode():
        assert_as_plain(lambda o: (FULL_WIDTH | IN_PLACE | SHAPE | SPACE)[name](o.x), grad=False)


WRONG = {
    "squeeze": lambda x: x.squeeze(7), "unsqueeze": lambda x: x.unsqueeze(9), "mean": lambda x: x.mean((2, 8)),
    "flatten": lambda x: x.flatten(1, 9), "cat": lambda x: torch.cat([x, x], 9),
    "narrow": lambda x: x.narrow(1, 9, 1), "narrow dim": lambda x: x.narrow(7, 0, 1),
    "split": lambda x: x.split([1, 2], 1), "chunk": lambda x: x.chunk(2, 7), "transpose": lambda x: x.transpose(2, 9),
    "index": lambda x: x[:, :, :, :, 0], "view": lambda x: x.view(N, 7), "reshape": lambda x: x.reshape(N, -1, -1),
    "linear": lambda x: F.linear(x.mean((2, 3)), torch.ones(3, 9).double()),
    "wide linear": lambda x: F.linear(x.mean((2, 3)), torch.ones(3, 4).double()),
    "conv": lambda x: F.conv2d(x, torch.ones(3, 9, 1, 1).double()), "add": lambda x: x + torch.ones(N, 7, H, W),
    "mul": lambda x: x * torch.ones(N, 7, 1, 1), "prelu": lambda x: F.prelu(x, torch.ones(3).double()),
    "reflect": lambda x: F.pad(x, (9, 9, 9, 9), mode="reflect"), "transpose_": lambda x: x.transpose_(1, 2),
    "expand": lambda x: x.expand(-1, -1, 9, 9),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_torch_refuses_is_refused(name):
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        assert_as_plain(lambda o: WRONG[name](o.x) if o.live else None)


READERS = {
    "linear": lambda o, w: F.linear(o.flat, w), "linear bias": lambda o, w: F.linear(o.flat, w, w[:, 0]),
    "linear keywords": lambda o, w: F.linear(o.flat, weight=w, bias=w[:, 1]),
    "conv2d": lambda o, w: F.conv2d(o.x, w[:, :, None, None]),
    "conv2d all": lambda o, w: F.conv2d(o.x, w[:, :, None, None].expand(-1, -1, 3, 3), w[:, 0], 2, 1, 1),
    "conv2d keywords": lambda o, w: F.conv2d(o.x, weight=w[:, :, None, None], padding="same"),
}  # fmt: skip


@pytest.mark.parametrize("live", [(0, 2, 3, 5), ()])
@pytest.mark.parametrize("name", READERS)
def test_weights_that_read_live_channels(name, live):
    def f(o):
        weight = o.values(3, C)
        return READERS[name](o, weight)

    results, fallbacks = assert_as_plain(f, x=live)
    assert type(results[0]) is not LiveTensor and (not live or not fallbacks)


OPERANDS = ["same", "other", "none", "plain"]
SUMS = {
    "+": lambda a, b: a + b, "-": lambda a, b: a - b, "add": torch.add, "sub": torch.sub,
    "alpha": lambda a, b: torch.add(a, b, alpha=-3), "sub alpha": lambda a, b: a.sub(b, alpha=2),
    "subtract": torch.subtract, "keyword": lambda a, b: a.add(other=b),
}  # fmt: skip


@pytest.mark.thinned(2)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("second", OPERANDS)
@pytest.mark.parametrize("first", ["x", *OPERANDS])
@pytest.mark.parametrize("name", ["+", "-", "alpha"])
def test_sums(name, first, second, layout):
    results, fallbacks = assert_as_plain(lambda o: SUMS[name](getattr(o, first), getattr(o, second)), layout=layout)
    assert not fallbacks
    assert (type(results[0]) is LiveTensor) == ("plain" not in (first, second))


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("operands", [("flat", "flat_other"), ("line", "line_other"), ("x", "other")])
def test_sums_of_any_rank(name, operands):
    assert_flows(lambda o: SUMS[name](*(getattr(o, operand) for operand in operands)))


PRODUCTS = {
    "x * 2": lambda o: o.x * 2, "2 * x": lambda o: 2 * o.x, "x / 4": lambda o: o.x / 4,
    "x * scalar": lambda o: o.x * o.scalar, "scalar * x": lambda o: o.scalar * o.x,
    "x / scalar": lambda o: o.x / o.scalar, "x * same": lambda o: o.x * o.same, "x * x": lambda o: o.x * o.x,
    "x * other": lambda o: o.x * o.other, "other * x": lambda o: o.other * o.x, "x * plain": lambda o: o.x * o.plain,
    "plain * x": lambda o: o.plain * o.x, "x * [N, C, 1, 1]": lambda o: o.x * o.channel_gate,
    "[N, C, 1, 1] * x": lambda o: o.channel_gate * o.x, "x * [N, 1, H, W]": lambda o: o.x * o.pixel_gate,
    "x * [C, 1, 1]": lambda o: o.x * o.column, "x * [1, C, 1, 1]": lambda o: o.x * o.column[None],
    "x * [W]": lambda o: o.x * o.row, "x / [W]": lambda o: o.x / o.row, "x / [C, 1, 1]": lambda o: o.x / o.column,
    "x * small": lambda o: o.x * o.small, "small * x": lambda o: o.small * o.x,
    "other * small": lambda o: o.other * o.small, "small * plain": lambda o: o.small * o.plain,
    "flat * [C]": lambda o: o.flat * o.column.flatten(), "flat * other": lambda o: o.flat * o.flat_other,
    "x * mask": lambda o: o.x * (o.plain > 0), "x * int": lambda o: o.x * o.plain.long(),
    "multiply": lambda o: torch.multiply(o.x, 3), "x * none": lambda o: o.x * o.none,
    "small * [N, 1, H, W]": lambda o: o.small * o.pixel_gate, "one image's": lambda o: o.x * o.small[:1],
    "swish": lambda o: o.x * o.plain.sigmoid(), "other * [C, 1, 1]": lambda o: o.column * o.other,
    "expanded gate": lambda o: o.x * o.channel_gate.expand_as(o.x),
    "expanded map": lambda o: o.x * o.pixel_gate.expand_as(o.x),
    "by rows": lambda o: o.x * o.row[:, None][:H].expand(C, H, W),
    "expanded small": lambda o: o.small * o.channel_gate.expand(-1, -1, H, W),
    "one number": lambda o: o.x * o.scalar.expand(N, C, H, W),
    "div rounded": lambda o: torch.div(o.x, 2, rounding_mode="floor"), "mul keyword": lambda o: o.x.mul(other=o.same),
    "drop path": lambda o: o.x.div(0.5) * torch.ones(N, 1, 1, 1).double(),
    "drop path of new": lambda o: o.x * o.x.new_ones((N, 1, 1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name, layout):
    assert_flows(PRODUCTS[name], layout=layout)


OVER_CHANNELS = {
    "mean": lambda x: x.mean(1), "mean keepdim": lambda x: x.mean(1, keepdim=True),
    "sum": lambda x: torch.sum(x, (1, -1)[: x.dim() - 1]), "of an image": lambda x: x.mean(list(range(1, x.dim()))),
    "of all": lambda x: x.sum((0, 1)), "dtype": lambda x: x.sum(1, dtype=torch.float32),
}  # fmt: skip


@pytest.mark.parametrize("operand", ["x", "flat", "line"])
@pytest.mark.parametrize("name", OVER_CHANNELS)
def test_sums_over_channels_are_of_live_ones(name, operand):
    results, fallbacks = assert_as_plain(lambda o: OVER_CHANNELS[name](getattr(o, operand)))
    assert not fallbacks and type(results[0]) is torch.Tensor
    assert_as_plain(lambda o: OVER_CHANNELS[name](getattr(o, operand)), x=())


CATS = {
    "channels": lambda o: torch.cat((o.x, o.other), 1), "three": lambda o: torch.cat([o.x, o.none, o.x], dim=1),
    "with plain": lambda o: torch.cat((o.plain, o.x), 1), "plain last": lambda o: torch.cat((o.x, o.plain), -3),
    "other width": lambda o: torch.concat((o.narrow, o.x), 1), "batch": lambda o: torch.cat((o.x, o.same)),
    "batch of two lists": lambda o: torch.cat((o.x, o.more, o.other), 0),
    "space": lambda o: torch.cat((o.other, o.x), 3), "rows": lambda o: torch.cat((o.flat, o.flat_other), 1),
    "rows of a batch": lambda o: torch.cat((o.flat, o.flat_other)),
    "dense block": lambda o: torch.cat((torch.cat((o.x, o.other), 1).relu(), o.x), 1),
    "concatenate": lambda o: torch.concatenate((o.x, o.x), 1),
}  # fmt: skip


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("name", CATS)
def test_cat(name, layout):
    assert_flows(CATS[name], layout=layout)


JOINS_IN_PLACE = {
    "+=": lambda a, b: a.__iadd__(b), "add_": lambda a, b: a.add_(b, alpha=2), "sub_": lambda a, b: a.sub_(b),
    "*=": lambda a, b: a.__imul__(b),
}  # fmt: skip
ALIASES = {
    "view": lambda x: x.view(N, -1), "detach": lambda x: x.detach(), "slice": lambda x: x[:, :3],
    "part": lambda x: x[:, 2:4], "row": lambda x: x[:, :, 1], "of a view": lambda x: x.view(N, C, -1)[:, 1:5],
    "narrow": lambda x: x.narrow(1, 1, 4), "transpose": lambda x: x.transpose(2, 3),
    "chunk": lambda x: x[1:].chunk(2, 3)[1],
}  # fmt: skip


@pytest.mark.parametrize("second", OPERANDS)
@pytest.mark.parametrize("name", JOINS_IN_PLACE)
def test_joins_in_place(name, second):
    def f(o):
        y = o.x
        assert JOINS_IN_PLACE[name](y, getattr(o, second)) is y
        return y, y.relu()

    results, fallbacks = assert_as_plain(f)
    assert not fallbacks and type(results[0]) is LiveTensor


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("name", JOINS_IN_PLACE)
def test_joins_of_a_plain_tensor_in_place(name, layout):
    """Nothing falls back: the result has all channels."""

    def f(o):
        y = o.plain * 1
        assert JOINS_IN_PLACE[name](y, o.other) is y
        return y

    results, fallbacks = assert_as_plain(f, layout=layout)
    assert not fallbacks and type(results[0]) is torch.Tensor


@pytest.mark.parametrize("change", ["same", "other", "plain", "relu_", "number", "sigmoid_", "setitem"])
@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_see_what_was_written(alias, change):
    def f(o):
        # With gradients torch refuses to write to one of several views that an operation returns.
        with torch.set_grad_enabled("chunk" not in alias):
            y, shown = o.x, ALIASES[alias](o.x)
            shown.to_dense() if o.live else None
            write(y, o)
            return y, shown, y * 2, shown * 3

    def write(y, o):
        if change in OTHERS:
            y.add_(getattr(o, change))
        elif change == "setitem":
            y[:, 1:3] = 7
        else:
            y.add_(1) if change == "number" else getattr(y, change)()

    OTHERS = ("same", "other", "plain")
    assert_as_plain(f, grad="chunk" not in alias)


@pytest.mark.parametrize("change", ["other", "relu_", "number", "setitem"])
@pytest.mark.parametrize("alias", [name for name in ALIASES if name not in ("chunk", "detach")])
def test_writing_to_an_alias(alias, change):
    def f(o):
        y, shown = o.x, ALIASES[alias](o.x)
        if change == "other":
            shown += ALIASES[alias](o.other)
        elif change == "setitem":
            shown[:1] = 3
        else:
            shown.relu_() if change == "relu_" else shown.add_(1)
        return y, shown, y * 2

    assert_as_plain(f)


def test_views_of_what_is_gone_see_each_other():
    def f(o):
        a = (o.x * 2).view(N, C, -1)
        b = a[:, 1:]
        a += 1
        return a, b, b * 2

    assert_as_plain(f)


def test_padding_channels_copies():
    def f(o):
        wider = F.pad(o.x, (0, 0, 0, 0, 0, 2))
        wider.mul_(2)
        return o.x, wider

    assert_flows(f)


def test_the_other_operand_is_as_it_was():
    def f(o):
        total = o.none
        total += o.x
        total.relu_()
        return total, o.x

    assert_flows(f)


def test_a_rule_that_needs_another_list_after_the_first():
    assert_flows(lambda o: (o.x + o.other)[:, 1:].narrow(1, 0, 4) * 2 - o.more[:2, 1:5], other=OTHER)


def test_out_is_written_at_full_width():
    out = torch.empty(N, C, H, W, dtype=torch.float64)
    assert_as_plain(lambda o: [torch.tanh(o.x, out=out), torch.add(o.x, o.other, out=out)][0].clone(), grad=False)
