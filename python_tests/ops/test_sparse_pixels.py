"""The sparse plan on pixels (channels_last, bfloat16), by instruction set: blocks of kernels, large and small."""

import pytest
import torch

import prunekernels as pk
from cases.conv import ConvCase, assert_same, assert_zero, capped, inputs, isas, run
from prunekernels import reference

if not pk.has_extension():
    pytest.skip("the quad kernels are compiled", allow_module_level=True)

BF16, FORMAT = torch.bfloat16, "channels_last"
ISAS = [row["isa"] for row in pk.kernels() if row["operation"] == "quads" and row["isa"] in isas()]
every_isa = pytest.mark.parametrize("isa", [*ISAS, "amx_model"])

# Of 16 and 32 results, of quads, and of what is between and below.
BLOCKS = [(16, 32), (32, 16), (8, 8), (4, 4), (4, 2), (3, 5), (1, 1)]
every_block = pytest.mark.parametrize("block", BLOCKS, ids=lambda block: "x".join(map(str, block)))


def block_mask(case, block, keep, seed=0):
    """bool [K, C]: about `keep` of the blocks; the first and the last are live, the one in a third corner is dead."""
    rows, columns = (-(-size // part) for size, part in zip((case.k, case.c), block, strict=True))
    grid = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < keep
    grid[0, 0] = grid[-1, -1] = True
    grid[0, -1] = False
    return grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: case.k, : case.c].contiguous()


def chosen_plans(case, made):
    mask = pk.ConvMask(made.get("filter_mask"), made["kernel_mask"], made.get("input_mask"))
    shape = ((case.n, case.c, case.h, case.w), (case.k, case.c, case.r, case.s))
    pair = {
        name: (v, v) if isinstance(v := getattr(case, name), int) else v for name in ("stride", "padding", "dilation")
    }
    with pk.plan.force("sparse"):
        return [
            pk.plan.choose(d, *shape, mask, **pair, dtype=BF16, memory_format=torch.channels_last)
            for d in pk.plan.DIRECTIONS
        ]


def check(case, isa, made, problem=None, **args):
    """Equal to the reference, on integers exactly; new memory is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    problem = problem or inputs(case, BF16, FORMAT)
    with capped(isa):
        assert chosen_plans(case, made) == ["sparse"] * 3
        got = run(problem, case, "sparse", **made, **args)
    want = reference.gradients(*problem, **case.conv_args, **made, **args)
    assert_same(got, [None if t is None else t.to(BF16).double() for t in want])


@every_isa
@every_block
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("taps", [1, 3])
def test_blocks(isa, block, keep, taps):
    case = ConvCase(n=3, c=96, k=80, h=7, w=9, r=taps, s=taps, padding=taps // 2)
    check(case, isa, {"kernel_mask": block_mask(case, block, keep)})


@pytest.mark.thinned(3)
@every_isa
@pytest.mark.parametrize("block", [(16, 32), (4, 4), (1, 1)], ids=str)
@pytest.mark.parametrize("filters", [2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 49, 65])
@pytest.mark.parametrize("channels", [2, 3, 5, 15, 16, 17, 31, 32, 33, 63, 65])
@pytest.mark.parametrize("taps", [1, 3])
def test_filters_and_channels(isa, block, filters, channels, taps):
    """The last quad, pair and block have fewer; groups of a block's size and one more."""
    case = ConvCase(n=1, c=channels, k=filters, h=4, w=5, r=taps, s=taps, padding=taps // 2)
    size = tuple(min(part, (total + 1) // 2) for part, total in zip(block, (filters, channels), strict=True))
    check(case, isa, {"kernel_mask": block_mask(case, size, 0.5)})


@every_isa
@pytest.mark.parametrize("block", [(16, 32), (4, 4)], ids=str)
@pytest.mark.parametrize("width", [1, 2, 7, 13, 14, 15, 16, 17, 29, 30, 31, 32, 33, 63, 64, 65, 96, 97, 112])
@pytest.mark.parametrize("taps", [1, 3])
def test_widths(isa, block, width, taps):
    """Vectors of 16 positions, tiles of 6 vectors, blocks of 32 positions."""
    case = ConvCase(n=2, c=64, k=48, h=3, w=width, r=taps, s=taps, padding=taps // 2)
    check(case, isa, {"kernel_mask": block_mask(case, block, 0.5)})


GEOMETRIES = {
    "stride": {"stride": 2},
    "stride 1x1": {"stride": 2, "r": 1, "s": 1, "padding": 0},
    "stride 3": {"stride": 3, "h": 8, "w": 8, "padding": 0},
    "strides": {"stride": (1, 2), "h": 9},
    "dilation": {"dilation": 2, "padding": 2},
    "stride, dilation": {"dilation": (1, 2), "stride": 2, "padding": (1, 2), "h": 9, "w": 9},
    "no padding": {"padding": 0},
    "more padding than taps": {"padding": 3},
    "uneven": {"r": 2, "s": 4, "padding": (1, 0)},
    "tall": {"r": 5, "s": 1, "padding": (2, 0)},
    "one pixel": {"h": 3, "w": 3, "padding": 0},
    "one column of inputs": {"h": 2, "w": 1},
    "one column of inputs, stride": {"h": 2, "w": 1, "stride": 2},
    "one row of inputs": {"h": 1, "w": 9},
    "padded 1x1": {"r": 1, "s": 1, "padding": 1},
}


@every_isa
@pytest.mark.parametrize("block", [(16, 16), (4, 4), (1, 1)], ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometry(isa, block, name):
    case = ConvCase(n=3, c=36, k=35, **GEOMETRIES[name])
    check(case, isa, {"kernel_mask": block_mask(case, block, 0.4)})


@every_isa
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("block", [(16, 32), (4, 4)], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        ConvCase(n=2, c=96, k=80, h=40, w=41),  # several blocks of rows, of tasks and of gradients
        ConvCase(n=1, c=64, k=64, h=40, w=40, stride=2),
        ConvCase(n=5, c=96, k=64, h=17, w=19, r=1, s=1, padding=0),
        ConvCase(n=37, c=64, k=32, h=4, w=4),  # of images
        ConvCase(n=70, c=64, k=48, h=3, w=3, r=1, s=1, padding=0),
        ConvCase(n=20, c=64, k=32, h=5, w=7, padding=(2, 0)),  # more zeros above and below than beside
    ],
    ids=str,
)
def test_blocks_of_rows_and_images(isa, threads, block, case):
    torch.set_num_threads(threads)
    check(case, isa, {"kernel_mask": block_mask(case, block, 0.3)})


@every_isa
@pytest.mark.parametrize("dead", [0.25, 0.75])
@pytest.mark.parametrize("together", [1, 2, 4])
@pytest.mark.parametrize("block", [(16, 32), (4, 4)], ids=str)
def test_dead_filters_and_channels(isa, block, together, dead):
    """Alone, in pairs and in fours: pairs of live channels lie together, or do not. Blocks are of what is live."""
    case = ConvCase(n=2, c=72, k=88, h=6, w=9)

    def live(size, seed):
        lots = torch.rand(size // together, generator=torch.Generator().manual_seed(seed)) >= dead
        return lots.repeat_interleave(together)

    filters, channels = live(case.k, 1), live(case.c, 2)
    small = ConvCase(c=int(channels.sum()), k=int(filters.sum()))
    block = tuple(min(part, (total + 1) // 2) for part, total in zip(block, (small.k, small.c), strict=True))
    kernels = torch.zeros(case.k, case.c, dtype=torch.bool)
    kernels[filters.nonzero(), channels.nonzero()[:, 0]] = block_mask(small, block, 0.5)
    check(case, isa, {"filter_mask": filters, "kernel_mask": kernels, "input_mask": channels})


@every_isa
@every_block
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_weights_of_either_layout(isa, block, layout):
    case = ConvCase(n=2, c=40, k=36)
    x, weight, bias, grad = inputs(case, BF16, FORMAT)
    kept = weight.contiguous() if layout == "nchw" else weight.contiguous(memory_format=torch.channels_last)
    check(case, isa, {"kernel_mask": block_mask(case, block, 0.4)}, (x, kept, bias, grad))


@every_isa
@every_block
@pytest.mark.parametrize("taps", [1, 3])
def test_what_is_dead_does_not_show(isa, block, taps):
    """NaN in dead kernels, channels, filters and their gradients."""
    case = ConvCase(n=2, c=66, k=68, h=5, w=15, r=taps, s=taps, padding=taps // 2)
    kernels = block_mask(case, block, 0.3)
    kernels[5:9] = kernels[:, 2:5] = False
    x, weight, bias, grad = inputs(case, BF16, FORMAT)
    dead_in, dead_out = ~kernels.any(0), ~kernels.any(1)
    x[:, dead_in] = weight[~kernels] = float("nan")
    with capped(isa):
        constant = run((x, weight, bias, grad), case, "sparse", kernel_mask=kernels)[0]
    assert torch.equal(constant[:, dead_out], bias[dead_out].view(1, -1, 1, 1).expand_as(constant[:, dead_out]))
    bias[dead_out] = grad[:, dead_out] = float("nan")
    with capped(isa):
        made = {"filter_mask": ~dead_out, "kernel_mask": kernels}
        y, grad_x, grad_w, _ = run((x, weight, bias, grad), case, "sparse", **made)
    for t in (constant, y, grad_x, grad_w):
        assert bool(t.isfinite().all())
    assert_zero(y[:, dead_out])
    assert_zero(grad_x[:, dead_in])
    assert_zero(grad_w[~kernels])


@every_isa
@pytest.mark.parametrize("block", [(16, 32), (4, 4)], ids=str)
def test_scaled_gradients_and_nan(isa, block):
    """A scale of 0 gives exact zeros, whatever the gradient holds."""
    case = ConvCase(n=2, c=64, k=32, h=4, w=5)
    x, weight, bias, grad = inputs(case, BF16, FORMAT)
    kernels = block_mask(case, block, 0.6)
    kernels[1, 0] = True
    grad[:, 1] = float("nan")
    scale = torch.linspace(0.5, 2, 32)
    scale[1] = 0
    with capped(isa):
        grad_w = run((x, weight, bias, grad), case, "sparse", kernel_mask=kernels, grad_scale=scale)[2]
    assert_zero(grad_w[1])
    assert_zero(grad_w[~kernels])
    assert bool(grad_w[2:].isfinite().all())


@every_isa
@pytest.mark.parametrize("block", [(16, 32), (4, 4), (1, 1)], ids=str)
def test_rounding_is_to_nearest_even(isa, block):
    """Sums are floats: only results are rounded."""
    gen = torch.Generator().manual_seed(0)
    case = ConvCase(n=2, c=64, k=48, h=9, w=9)
    x = torch.randn(2, 64, 9, 9, generator=gen).to(BF16).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(48, 64, 3, 3, generator=gen).to(BF16)
    kernels = block_mask(case, block, 0.4)
    with capped(isa), pk.plan.force("sparse"):
        y = pk.masked_conv2d(x, weight, kernel_mask=kernels, padding=1)
    want = reference.masked_conv2d(x, weight, kernel_mask=kernels, padding=1)
    error = (y.double() - want).abs()
    assert bool((error <= want.abs() * 2**-8 * 1.01 + 1e-4).all())  # half a unit in the last place of 8 bits, and sums


@pytest.mark.parametrize(
    "made",
    [
        {"dtype": torch.float16},
        {"groups": 2},
        {"memory_format": torch.contiguous_format},
        {"kernels": torch.ones(8, 8, dtype=torch.bool)},  # nothing to skip that direct would not
    ],
    ids=str,
)
def test_what_is_not_served(made):
    groups = made.get("groups", 1)
    kernels = made.get("kernels", torch.eye(8, dtype=torch.bool)[:, : 8 // groups])
    filters = torch.arange(8) < 6
    mask = pk.ConvMask(filters, kernels, in_channels=8, groups=groups)
    with pk.plan.force("sparse"):
        plan = pk.plan.choose(
            "forward", (2, 8, 6, 6), (8, 8 // groups, 3, 3), mask, padding=(1, 1), groups=groups,
            dtype=made.get("dtype", BF16), memory_format=made.get("memory_format", torch.channels_last),
        )  # fmt: skip
    assert plan != "sparse"


@pytest.mark.skipif("avx512bf16" not in ISAS, reason="this CPU has no AVX-512 BF16")
def test_the_model_tells_blocks_from_single_kernels():
    """As many kernels are live; those of blocks are skipped, single ones leave nothing to skip. A key of the cache says
    which they are."""
    case = ConvCase(n=16, c=128, k=128, h=14, w=14)
    shape = ((case.n, case.c, case.h, case.w), (case.k, case.c, 3, 3))
    options = {"padding": (1, 1), "dtype": BF16, "memory_format": torch.channels_last}
    plans = {}
    for block in ((16, 32), (4, 4), (1, 1)):
        mask = pk.ConvMask(kernel_mask=block_mask(case, block, 0.5), in_channels=128)
        with pk.plan.force("model"):
            plans[block] = [pk.plan.choose(d, *shape, mask, **options) for d in pk.plan.DIRECTIONS]
    assert plans[16, 32] == plans[4, 4] == ["sparse"] * 3
    assert "sparse" not in plans[1, 1]
