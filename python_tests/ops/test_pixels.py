"""The direct plan on pixels (channels_last, bfloat16), by instruction set: sizes that reach every kernel and each way
to cut the work."""

import pytest
import torch

import prunekernels as pk
from cases.conv import ConvCase, assert_same, assert_zero, capped, inputs, isas, run
from prunekernels import reference

if not pk.has_extension():
    pytest.skip("the pixel kernels are compiled", allow_module_level=True)

BF16, FORMAT = torch.bfloat16, "channels_last"
ISAS = [row["isa"] for row in pk.kernels() if row["operation"] == "pixels" and row["isa"] in isas()]
every_isa = pytest.mark.parametrize("isa", [*ISAS, "amx_model"])


def live(size, count, seed=0):
    """bool [size]: `count` live entries."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed + size))
    return torch.zeros(size, dtype=torch.bool).index_fill(0, order[:count], True)


def both(case, filters, channels):
    return {"filter_mask": live(case.k, filters), "input_mask": live(case.c, channels, 1)}


def check(case, isa, filters, channels, problem=None, **args):
    """Equal to the reference, on integers exactly; new memory is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    made, problem = both(case, filters, channels), problem or inputs(case, BF16, FORMAT)
    with capped(isa):
        chosen = chosen_plans(case, made)
        got = run(problem, case, "direct", **made, **args)
    want = reference.gradients(*problem, **case.conv_args, **made, **args)
    assert_same(got, [None if t is None else t.to(BF16).double() for t in want])
    return chosen


def chosen_plans(case, made):
    mask = pk.ConvMask(made["filter_mask"], input_mask=made["input_mask"])
    shape = ((case.n, case.c, case.h, case.w), (case.k, case.c, case.r, case.s))
    pair = {
        name: (v, v) if isinstance(v := getattr(case, name), int) else v for name in ("stride", "padding", "dilation")
    }
    with pk.plan.force("direct"):
        return [
            pk.plan.choose(d, *shape, mask, **pair, dtype=BF16, memory_format=torch.channels_last)
            for d in pk.plan.DIRECTIONS
        ]


SERVED = ["direct"] * 3


@every_isa
@pytest.mark.parametrize("filters", [5, 17])
@pytest.mark.parametrize(
    "pixels",
    [1, 13, 14, 15, 16, 17, 27, 28, 29, 31, 32, 33, 223, 224, 225, 255, 256, 257, 448, 449, 511, 512, 513],
)
def test_tiles_of_pixels(isa, filters, pixels):
    """Without neighbours all pixels are one row, which tasks of 16 tiles and blocks of 512 share out. Tiles of up to 16
    filters are larger."""
    assert check(ConvCase(n=1, c=9, k=20, h=1, w=pixels, r=1, s=1, padding=0), isa, filters, 6) == SERVED


@every_isa
@pytest.mark.parametrize("filters", [4, 18])
@pytest.mark.parametrize("width", [1, 2, 13, 14, 15, 16, 17, 27, 28, 29, 31, 32, 33, 43, 57, 65])
@pytest.mark.parametrize("taps", [(1, 3), (3, 3)])
def test_tiles_of_a_row(isa, filters, width, taps):
    """The last pair of an odd row has one pixel."""
    case = ConvCase(n=2, c=6, k=20, h=4, w=width, r=taps[0], s=taps[1], padding=(taps[0] // 2, 1))
    assert check(case, isa, filters, 3) == SERVED


@pytest.mark.thinned(3)
@every_isa
@pytest.mark.parametrize("filters", [1, 13, 14, 15, 16, 17, 28, 29, 31, 32, 33, 48, 49, 64, 65])
@pytest.mark.parametrize("channels", [1, 2, 8, 9, 15, 16, 17, 31, 32, 33, 34, 63, 64, 65])
@pytest.mark.parametrize("taps", [1, 3])
def test_tiles_of_filters_and_channels(isa, filters, channels, taps):
    case = ConvCase(n=1, c=channels + 3, k=filters + 5, h=3, w=5, r=taps, s=taps, padding=taps // 2)
    assert check(case, isa, filters, channels) == SERVED


@pytest.mark.thinned(2)
@every_isa
@pytest.mark.parametrize("width", [1, 2, 3, 6, 7, 8, 13, 14, 15, 17, 23])
@pytest.mark.parametrize("height", [2, 3, 7])
@pytest.mark.parametrize("taps", [(3, 3), (1, 3), (3, 1)])
def test_short_rows(isa, height, width, taps):
    """Tiles may go on from one row to the next: two threads have enough to do with an image each."""
    case = ConvCase(n=9, c=16, k=48, h=height, w=width, r=taps[0], s=taps[1], padding=(taps[0] // 2, taps[1] // 2))
    assert check(case, isa, 13, 5) == SERVED
    assert check(case, isa, 48, 7) == SERVED  # all filters, then all channels: in place if rows are computed one by one
    assert check(case, isa, 7, 16) == SERVED


@every_isa
@pytest.mark.parametrize("width", [16, 32, 48, 64, 96])
@pytest.mark.parametrize("dead", [0, 1, 15, 16])
@pytest.mark.parametrize("taps", [1, 3])
def test_results_of_nearly_all_channels_are_written_in_place(isa, width, dead, taps):
    """Where dead ones fill up the last 16, and those are whole."""
    case = ConvCase(n=2, c=width, k=width, h=3, w=15, r=taps, s=taps, padding=taps // 2)
    few = (width + 1) // 3
    assert check(case, isa, max(1, width - dead), few) == SERVED
    assert check(case, isa, few, max(1, width - dead)) == SERVED


@every_isa
@pytest.mark.parametrize("width", [3, 6, 15])
def test_strided_results_are_written_in_place(isa, width):
    case = ConvCase(n=2, c=48, k=32, h=5, w=width, stride=2)
    assert check(case, isa, 20, 39) == SERVED


@every_isa
@pytest.mark.parametrize("width", [1, 2, 3, 27, 28, 29, 30, 31, 32, 33, 34, 57])
@pytest.mark.parametrize("taps", [(1, 1), (1, 3), (3, 2)])
def test_tiles_of_a_strided_row(isa, width, taps):
    """Backward, every other pixel of a row is a tile's, and the last phase may have one less."""
    case = ConvCase(n=2, c=6, k=7, h=5, w=width, r=taps[0], s=taps[1], stride=2, padding=(taps[0] // 2, taps[1] // 2))
    assert check(case, isa, 4, 3) == SERVED


@every_isa
@pytest.mark.parametrize("live_channels", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("width", [1, 2, 3, 6, 11])
@pytest.mark.parametrize("columns", [1, 2, 3, 7])
def test_taps_of_a_row_are_one_run(isa, live_channels, width, columns):
    """The taps of a row and the live channels share vectors: fewer than one, one, and several."""
    case = ConvCase(n=3, c=9, k=5, h=3, w=width, r=2, s=columns, padding=(1, columns // 2))
    assert check(case, isa, 3, live_channels) == SERVED


GEOMETRIES = {
    "stride": {"stride": 2},
    "stride 1x1": {"stride": 2, "r": 1, "s": 1, "padding": 0},
    "stride 3": {"stride": 3, "h": 11, "w": 13},
    "stride 3, 1x1": {"stride": 3, "r": 1, "s": 1, "padding": 0, "h": 8, "w": 9},
    "stride 4 of 2 taps": {"stride": 4, "r": 2, "s": 2, "padding": 0, "h": 11, "w": 10},  # phases without taps
    "strides": {"stride": (1, 2), "h": 9},
    "stem": {"stride": 2, "r": 7, "s": 7, "padding": 3, "h": 13, "w": 16},
    "dilation": {"dilation": 2, "padding": 2},
    "stride, dilation": {"dilation": (1, 2), "stride": 2, "padding": (1, 2), "h": 9, "w": 9},
    "stride 2, dilation 3": {"dilation": 3, "stride": 2, "padding": 3, "h": 12, "w": 11},
    "stride 4, dilation 2": {"dilation": 2, "stride": 4, "padding": 2, "h": 14, "w": 15},
    "no padding": {"padding": 0},
    "more padding than taps": {"padding": 3},
    "more padding than taps, strided": {"padding": 4, "stride": 3, "s": 2},
    "uneven": {"r": 2, "s": 4, "padding": (1, 0)},
    "uneven, strided": {"r": 4, "s": 2, "padding": (0, 1), "stride": (2, 3), "h": 10, "w": 14},
    "tall": {"r": 5, "s": 1, "padding": (2, 0)},
    "one pixel": {"h": 3, "w": 3, "padding": 0},
    "fewer pixels than the stride": {"h": 2, "w": 1, "stride": 3, "r": 2, "s": 3, "padding": 1},
    "one row of inputs": {"h": 1, "w": 9},
    "padded 1x1": {"r": 1, "s": 1, "padding": 1},
    "padded 1x1, strided": {"r": 1, "s": 1, "padding": 1, "stride": 2, "w": 8},
}


@pytest.mark.thinned(2)
@every_isa
@pytest.mark.parametrize("width", [1, 2, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("images", [1, 2, 5, 40])
@pytest.mark.parametrize("taps", [(1, 2), (3, 3)])
def test_short_rows_share_tiles(isa, width, images, taps):
    """Tiles, and tasks, end within images; of 40, a task has more results than are scattered together."""
    torch.set_num_threads(1)
    case = ConvCase(n=images, c=43, k=41, h=3, w=width, r=taps[0], s=taps[1], padding=(taps[0] // 2, taps[1] // 2))
    assert check(case, isa, 34, 33) == SERVED


@every_isa
@pytest.mark.parametrize("width", [5, 15])
def test_large_weights_are_read_for_more_results(isa, width):
    case = ConvCase(n=1, c=270, k=262, h=3, w=width)
    assert check(case, isa, 259, 257) == SERVED


def spoil(case, isa, made):
    """Leaves NaN in the memory that the operators work in."""
    problem = [torch.full_like(t, float("nan")) for t in inputs(case, BF16, FORMAT)]
    with capped(isa):
        run(problem, case, "direct", **made)


@every_isa
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("live_ones", [(11, 7), (39, 35)])
def test_geometry(isa, name, live_ones):
    """Short rows of several blocks of results are computed from patches."""
    case = ConvCase(n=3, c=live_ones[1] + 13, k=live_ones[0] + 7, **GEOMETRIES[name])
    spoil(case, isa, both(case, *live_ones))
    assert check(case, isa, *live_ones) == SERVED


@every_isa
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_infinities_stay_where_they_belong(isa, name, place):
    """Pairs that have a second half for nothing, and what is read past a row, multiply nothing with an infinity."""
    case = ConvCase(n=2, c=8, k=6, **GEOMETRIES[name])
    made = both(case, 5, 3)
    x, weight, bias, grad = inputs(case, BF16, FORMAT)
    problems = [[x.clone(), weight, bias, grad], [x, weight, bias, grad.clone()]]
    for t, mask in ((problems[0][0], made["input_mask"]), (problems[1][3], made["filter_mask"])):
        pixels = t.permute(0, 2, 3, 1).view(-1, t.shape[1])
        pixels[{"first": 0, "middle": len(pixels) // 2, "last": -1}[place], mask.nonzero()[0]] = float("inf")
    with capped(isa):
        got = [run(problem, case, "direct", **made) for problem in problems]
    want = [reference.gradients(*problem, **case.conv_args, **made) for problem in problems]
    for which, result in ((0, 0), (0, 2), (1, 1)):  # y and the weight's gradient of x, the input's of grad_out
        assert torch.equal(got[which][result].isfinite(), want[which][result].isfinite())


@every_isa
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "case",
    [
        ConvCase(n=2, c=80, k=72, h=29, w=33),  # several blocks of rows, of tasks and of gradients
        ConvCase(n=1, c=40, k=33, h=40, w=40, stride=2),
        ConvCase(n=2, c=80, k=80, h=67, w=61, stride=2),
        ConvCase(n=5, c=70, k=40, h=17, w=19, r=1, s=1, padding=0),
        ConvCase(n=2, c=300, k=280, h=40, w=37, r=1, s=1, stride=2, padding=0),
    ],
    ids=str,
)
def test_blocks_of_rows(isa, threads, case):
    torch.set_num_threads(threads)
    check(case, isa, 3 * case.k // 4, case.c // 2)


@every_isa
@pytest.mark.parametrize("taps", [1, 3])
def test_a_vector_that_is_all_live_ends_an_odd_list(isa, taps):
    """Behind 33 channels, whose last 32 are a vector, is the half of a pair that must be zero."""
    case = ConvCase(n=2, c=64, k=64, h=3, w=9, r=taps, s=taps, padding=taps // 2)
    mask = torch.arange(64) >= 32
    mask[0] = True
    made = {"filter_mask": mask, "input_mask": mask}
    spoil(case, isa, made)
    problem = inputs(case, BF16, FORMAT)
    with capped(isa):
        got = run(problem, case, "direct", **made)
    want = reference.gradients(*problem, **case.conv_args, **made)
    assert_same(got, [t.to(BF16).double() for t in want])


@every_isa
def test_more_channels_than_are_prepared_at_a_time(isa):
    case = ConvCase(n=1, c=4200, k=4100, h=1, w=2, r=1, s=1, padding=0)
    problem = inputs(case, BF16, FORMAT)
    assert check(case, isa, 3, 5, problem) == SERVED
    assert check(case, isa, 4090, 2, problem) == SERVED


@every_isa
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_weights_of_either_layout(isa, layout):
    case = ConvCase(n=2, c=12, k=10)
    x, weight, bias, grad = inputs(case, BF16, FORMAT)
    kept = weight.contiguous() if layout == "nchw" else weight.contiguous(memory_format=torch.channels_last)
    check(case, isa, 6, 5, (x, kept, bias, grad))


@every_isa
@pytest.mark.parametrize("sizes", [(20, 9, 33, 17), (32, 19, 48, 35)], ids=["scattered", "in place"])
@pytest.mark.parametrize("taps", [1, 3])
def test_what_is_dead_does_not_show(isa, taps, sizes):
    """NaN in dead channels, filters and their gradients; infinities of a pixel stay with it and its neighbours, and out
    of dead channels."""
    filters, live_filters, channels, live_channels = sizes
    case = ConvCase(n=2, c=channels, k=filters, h=5, w=15, r=taps, s=taps, padding=taps // 2)
    made = both(case, live_filters, live_channels)
    x, weight, bias, grad = inputs(case, BF16, FORMAT)
    dead_in, dead_out = ~made["input_mask"], ~made["filter_mask"]
    x[:, dead_in] = weight[dead_out] = weight[:, dead_in] = grad[:, dead_out] = float("nan")
    bias[dead_out] = float("nan")
    with capped(isa):
        y, grad_x, grad_w, _ = run((x, weight, bias, grad), case, "direct", **made)
    for t in (y, grad_x, grad_w):
        assert bool(t.isfinite().all())
    (
        assert_zero(y[:, dead_out]),
        assert_zero(grad_x[:, dead_in]),
        assert_zero(grad_w[dead_out]),
        assert_zero(grad_w[:, dead_in]),
    )
    x[:], grad[:] = x.nan_to_num(0), grad.nan_to_num(0)
    x[0, int(made["input_mask"].nonzero()[0]), 2, 7] = float("inf")
    grad[0, int(made["filter_mask"].nonzero()[0]), 2, 7] = float("inf")
    with capped(isa):
        y, grad_x, _, _ = run((x, weight, bias, grad), case, "direct", **made)
    assert_zero(y[:, dead_out]), assert_zero(grad_x[:, dead_in])
    for t in (y, grad_x):
        spoiled = ~t.isfinite().all(1)
        reach = torch.zeros_like(spoiled)
        reach[0, 2 - taps // 2 : 3 + taps // 2, 7 - taps // 2 : 8 + taps // 2] = True
        assert bool(spoiled.any()) and not bool((spoiled & ~reach).any())


@every_isa
def test_scaled_gradients_and_nan(isa):
    """A scale of 0 gives exact zeros, whatever the gradient holds."""
    case = ConvCase(n=2, c=10, k=6, h=4, w=5)
    x, weight, bias, grad = inputs(case, BF16, FORMAT)
    grad[:, 1] = float("nan")
    scale = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 1.0])
    made = {"filter_mask": torch.ones(6, dtype=torch.bool), "input_mask": live(10, 5)}
    with capped(isa):
        grad_w = run((x, weight, bias, grad), case, "direct", **made, grad_scale=scale)[2]
    assert_zero(grad_w[1])
    assert bool(grad_w.isfinite().all())


@every_isa
def test_rounding_is_to_nearest_even(isa):
    """Sums are floats: only results are rounded."""
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, 9, 9, generator=gen).to(BF16).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(48, 64, 3, 3, generator=gen).to(BF16)
    keep = {"filter_mask": live(48, 30), "input_mask": live(64, 40)}
    with capped(isa), pk.plan.force("direct"):
        y = pk.masked_conv2d(x, weight, **keep, padding=1)
    want = reference.masked_conv2d(x, weight, **keep, padding=1)
    error = (y.double() - want).abs()
    assert bool((error <= want.abs() * 2**-8 * 1.01 + 1e-4).all())  # half a unit in the last place of 8 bits, and sums


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types_are_not_served(dtype):
    mask = pk.ConvMask(live(8, 4), in_channels=8)
    with pk.plan.force("direct"):
        plan = pk.plan.choose(
            "forward", (2, 8, 6, 6), (8, 8, 3, 3), mask, padding=(1, 1), dtype=dtype, memory_format=torch.channels_last
        )
    assert plan != "direct"


@pytest.mark.skipif("avx512bf16" not in ISAS, reason="this CPU has no AVX-512 BF16")
def test_the_scalar_kernels_are_no_candidates():
    """Without instructions for them they are far slower than the vendor's convolution."""
    mask = pk.ConvMask(live(64, 32), input_mask=live(64, 32))
    problem = ((16, 64, 14, 14), (64, 64, 3, 3), mask)
    options = {"padding": (1, 1), "dtype": BF16, "memory_format": torch.channels_last}
    with pk.plan.force("model"):
        best = pk.plan.choose("forward", *problem, **options)
        with capped("avx512vbmi2"):
            assert pk.plan.choose("forward", *problem, **options) != "direct"
    assert best in ("direct", "compact")
