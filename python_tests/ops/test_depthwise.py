"""The direct plan of depthwise layers, by instruction set: sizes that reach every tile and all ways to cut the work."""

import dataclasses
import itertools

import pytest
import torch

import prunekernels as pk
from cases.conv import ConvCase, assert_same, capped, inputs, isas, lay_out, masks, only, run
from prunekernels import reference

if not pk.has_extension():
    pytest.skip("the depthwise kernels are compiled", allow_module_level=True)

LANES = {"scalar": 1, "avx2": 8, "avx512": 16}
ISAS = [row["isa"] for row in pk.kernels() if row["operation"] == "depthwise" and row["isa"] in isas()]

every_isa = pytest.mark.parametrize("isa", ISAS)
every_layout = pytest.mark.parametrize("layout", ["nchw", "channels_last"])
# In channels_last live channels are gathered; 16 to 64 channels, few of them dead, are computed where they lie.
layouts_and_channels = pytest.mark.parametrize(
    ("layout", "c"), [("nchw", 3), ("channels_last", 3), ("channels_last", 19)]
)


def case(c=3, n=2, **sizes):
    return ConvCase(n=n, c=c, k=c, groups=c, **sizes)


def check(case, isa, made=None, layout="nchw", **args):
    """Equal to the reference (on integers, so exactly); new memory is filled with NaN, and so are dead operands."""
    torch.use_deterministic_algorithms(True)
    if made is None:
        made = {"filter_mask": ~only(19, 1, 17)} if case.c == 19 else masks(case, "all")
    x, weight, bias, grad_out = inputs(case, layout=layout)
    want = reference.gradients(x, weight, bias, grad_out, **made, **case.conv_args, **args)
    if not args:
        filters, kernels, channels = (made.get(f"{of}_mask") for of in ("filter", "kernel", "input"))
        live = reference.live_masks(weight, filters, kernels, channels, case.groups)[2].flatten()
        x[:, ~live] = weight[~live] = torch.nan
        if filters is not None:
            grad_out[:, ~filters] = torch.nan
    with capped(isa):
        assert_same(run((x, weight, bias, grad_out), case, "direct", **made, **args), want)


def widths(isa):
    """One vector to more than a tile has, with some or all lanes of the last."""
    lanes = LANES[isa]
    return sorted({1, 2, lanes - 1, lanes, lanes + 1, 2 * lanes, 3 * lanes - 1, 4 * lanes, 4 * lanes + 1, 7 * lanes})


@layouts_and_channels
@pytest.mark.thinned(2)
@pytest.mark.parametrize(("isa", "w"), [(isa, w) for isa in ISAS for w in widths(isa) if w])
@pytest.mark.parametrize("h", range(1, 10))
def test_tiles(h, w, isa, layout, c):
    check(case(c, h=h, w=w), isa, layout=layout)


@layouts_and_channels
@pytest.mark.thinned(2)
@every_isa
@pytest.mark.parametrize("stride", [1, 2, 3, (1, 2), (2, 1), (3, 2)], ids=str)
@pytest.mark.parametrize("kernel", [(r, s) for r in range(1, 8) for s in (1, 2, 3, 5)], ids=str)
def test_kernels_and_strides(kernel, stride, isa, layout, c):
    """Parts of one to five rows, and more than one part in a column."""
    r, s = kernel
    check(case(c, h=13, w=37, r=r, s=s, stride=stride, padding=(r // 2, s // 2)), isa, layout=layout)


def geometries():
    """Paddings from none to more than any tap needs, over images down to one row or column."""
    sizes = [(7, 9), (1, 9), (9, 1), (2, 3), (6, 6)]
    grid = itertools.product([(1, 1), (2, 2), (3, 3), (1, 3), (5, 5)], [1, 2, 3, (2, 9)], range(5), [1, 2, (2, 1)])
    for i, ((r, s), stride, padding, dilation) in enumerate(grid):
        h, w = sizes[i % len(sizes)]
        up, across = [(0, 0), (1, 1), (r, s - 1), (r - 1, s), (r + 1, s + 1)][padding]
        down, right = (dilation, dilation) if isinstance(dilation, int) else dilation
        if h + 2 * up > down * (r - 1) and w + 2 * across > right * (s - 1):
            yield case(h=h, w=w, r=r, s=s, stride=stride, padding=(up, across), dilation=dilation)


@layouts_and_channels
@pytest.mark.thinned(2)
@every_isa
@pytest.mark.parametrize("geometry", list(geometries()), ids=str)
def test_geometry(geometry, isa, layout, c):
    check(dataclasses.replace(geometry, c=c, k=c, groups=c), isa, layout=layout)


@layouts_and_channels
@every_isa
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [(131, 80), (40, 700)], ids=str)
def test_planes_in_blocks_of_rows(size, stride, isa, layout, c):
    whole = case(c, n=1, h=size[0], w=size[1], r=5, stride=stride, padding=(2, 1))
    check(whole, isa, {"filter_mask": ~only(c, 1)}, layout)


@every_layout
@every_isa
@pytest.mark.parametrize("r", [3, 5])
@pytest.mark.parametrize("live", [1, 2, 7, 8, 9, 17, 33])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_planes_that_are_packed_together(n, live, r, isa, layout):
    """In channels_last: whole vectors without a live channel, and more than one vector of live ones."""
    mask = only(40, *torch.randperm(40, generator=torch.Generator().manual_seed(live))[:live].tolist())
    check(case(c=40, n=n, h=5, w=6, r=r, s=r, padding=r // 2), isa, {"input_mask": mask}, layout)


@every_layout
@every_isa
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 3, 8])
def test_threads(n, threads, isa, layout):
    """Few live channels: images are shared out, too."""
    torch.set_num_threads(threads)
    check(case(c=20, n=n, h=6, w=11), isa, {"filter_mask": only(20, 3, 11)}, layout)


@every_layout
@every_isa
def test_soft_weight_gradients_and_scales(isa, layout):
    scale = torch.tensor([0.0, 1, 2, 0.5, 0, 1])
    check(case(c=6), isa, {"filter_mask": only(6, 0, 2, 5)}, layout, weight_grad="dense", grad_scale=scale)


@every_layout
@every_isa
def test_infinities_stay_with_their_channel_and_window(isa, layout):
    """What lies beside a row in a packed plane is multiplied by nothing that counts."""
    x, weight = torch.ones(1, 2, 4, 19), torch.ones(2, 1, 3, 3)
    x[0, 0, 2, 3] = torch.inf
    x = lay_out(x, layout)
    with capped(isa), pk.plan.force("direct"):
        y = pk.masked_conv2d(x, weight, padding=1, groups=2, filter_mask=only(2, 0))
        w = weight.clone().requires_grad_()
        pk.masked_conv2d(x, w, padding=1, groups=2, filter_mask=only(2, 0)).backward(torch.ones(1, 2, 4, 19))
    far = torch.ones(4, 19, dtype=torch.bool)
    far[1:4, 2:5] = False
    assert y[0, 0].isinf()[~far].all() and y[0, 0].isfinite()[far].all() and not y[0, 1].any()
    assert w.grad[0].isinf().all() and not w.grad[1].any()


@every_layout
def test_the_plan_that_serves(layout):
    mask = pk.ConvMask(only(32, *range(0, 32, 2)), None, None, out_channels=32, in_channels=32, groups=32)
    sizes, args = ((8, 32, 28, 28), (32, 1, 3, 3)), {"padding": (1, 1), "groups": 32}
    args["memory_format"] = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    for direction in ("forward", "grad_input", "grad_weight"):
        with pk.plan.force("direct"):
            assert pk.plan.choose(direction, *sizes, mask, **args) == "direct"
        with pk.plan.force("model"):
            assert pk.plan.choose(direction, *sizes, mask, **args) == "direct"


@every_layout
def test_live_mode_has_them_too(layout):
    net = torch.nn.Sequential(pk.MaskedConv2d(5, 24, 1), pk.MaskedConv2d(24, 24, 3, padding=1, groups=24, bias=False))
    for layer in net:
        layer.set_masks(filter=torch.arange(24) % 3 > 0)
    net[1].set_masks(input=torch.arange(24) % 3 > 0)
    x = lay_out(torch.randn(2, 5, 9, 8), layout)
    assert pk.plan.has_other_plans(lay_out(torch.empty(2, 16, 9, 8), layout), groups=16)
    want = net(x)
    pk.flow(net)
    with pk.plan.force("direct"):
        torch.testing.assert_close(net(x).to_dense(), want)
