"""The direct and sparse plans, by instruction set: sizes that reach every microkernel and every way to cut the work."""

import dataclasses
import itertools

import pytest
import torch

import prunekernels as pk
from cases.conv import KINDS, ConvCase, assert_same, capped, expected, inputs, isas, lay_out, masks, patterns, run
from prunekernels import reference

if not pk.has_extension():
    pytest.skip("the microkernels are compiled", allow_module_level=True)

LANES = {"scalar": 1, "avx2": 8, "avx512": 16}
ISAS = [row["isa"] for row in pk.kernels() if row["operation"] == "microkernels" and row["isa"] in isas()]
WIDE = [isa for isa in ISAS if LANES[isa] > 1]
PLANS = ("direct", "sparse")
# Few images: a vector holds neighbouring pixels. Nearly as many as a vector has lanes: it holds one pixel of each.
PIXELS = [(isa, 2) for isa in ISAS]
IMAGES = [(isa, LANES[isa] - 2) for isa in WIDE]

# Fewer: bands of the rows of each image fill the lanes.
BANDS = [(isa, n) for isa in WIDE for n in (1, 3, LANES[isa] // 2, LANES[isa] // 2 + 1)]

every_plan = pytest.mark.parametrize("plan", PLANS)


def with_images(case, n):
    return dataclasses.replace(case, n=n)


def check(case, pattern, plan, isa, problem=None, **args):
    """Equal to the reference (on integers, so exactly); new memory is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    made = masks(case, pattern) if isinstance(pattern, str) else pattern
    problem = problem or inputs(case)
    with capped(isa):
        got = run(problem, case, plan, **made, **args)
    known = isinstance(pattern, str) and not args
    assert_same(
        got, expected(case, pattern) if known else reference.gradients(*problem, **case.conv_args, **made, **args)
    )


def line_widths(isa):
    """Widths of 0 to one more than the most vectors of a tile, plus 1, some or all lanes of a last vector."""
    lanes, most = LANES[isa], 16 if isa == "avx512" else 8
    ends = sorted({1, (lanes + 1) // 3, lanes} - {0})
    return [(isa, lanes * v + end) for v in range(most + 1) for end in ends]


@every_plan
@pytest.mark.parametrize(("isa", "width"), [line for isa in ISAS for line in line_widths(isa)])
def test_tiles_of_a_line(isa, width, plan):
    """Group g has g + 1 live filters, so tiles have 1 to 8; in the input gradient its channels do the same."""
    case = ConvCase(n=1, c=20 * 8, k=20 * 20, h=1, w=width, r=1, s=1, padding=0, groups=20)
    check(case, "ragged", plan, isa)


@every_plan
@pytest.mark.parametrize(("isa", "n"), PIXELS)
@pytest.mark.parametrize("width", [1, 2, 3, 5, 7, 8, 9, 14, 15, 16, 17, 18, 31])
@pytest.mark.parametrize("kernel", [(3, 3), (3, 1), (1, 2)], ids=str)
def test_tiles_of_padded_rows(kernel, width, isa, n, plan):
    r, s = kernel
    case = ConvCase(n=n, c=9 * 3, k=9 * 8, h=4, w=width, r=r, s=s, padding=(r // 2, s // 2), groups=9)
    check(case, "ragged", plan, isa)


@pytest.mark.thinned(2)
@every_plan
@pytest.mark.parametrize(("isa", "n"), IMAGES)
@pytest.mark.parametrize("width", [*range(1, 10), 17])
@pytest.mark.parametrize("height", range(1, 6))
def test_tiles_of_images(height, width, isa, n, plan):
    """Of one filter, tiles of up to 4 rows and 8 columns; of several, lines that end with a row, or do not."""
    check(ConvCase(n=n, c=9 * 4, k=9 * 8, h=height, w=width, groups=9), "ragged", plan, isa)


@every_plan
@pytest.mark.parametrize(("isa", "n"), IMAGES)
@pytest.mark.parametrize(
    ("h", "w", "padding"),
    [(h, w, 0) for h in range(3, 7) for w in range(3, 7)] + [(h, w, 2) for h in (1, 2) for w in (1, 2)],
)
def test_windows_of_other_paddings(h, w, padding, isa, n, plan):
    """One tile of outputs, or of input gradients, but not from a plane with one cell of padding around it."""
    check(ConvCase(n=n, c=9, k=8, h=h, w=w, padding=padding), "kernel", plan, isa)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("isa", "n"), IMAGES)
@pytest.mark.parametrize("padding", [1, 0, 2, (1, 0)], ids=str)
@pytest.mark.parametrize("width", [*range(3, 17), 29])
@pytest.mark.parametrize("height", [3, 4, 6, 7, 9])
def test_windows_of_stride_2(height, width, padding, isa, n):
    """Tiles of up to 4 rows and 7 columns of outputs, of 4 and of 5 of the output's gradient."""
    check(ConvCase(n=n, c=5, k=6, h=height, w=width, stride=2, padding=padding), "kernel", "sparse", isa)


@pytest.mark.thinned(2)
@every_plan
@pytest.mark.parametrize(("isa", "n"), BANDS)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"stride": 2},
        {"stride": (3, 2), "padding": 2},
        {"dilation": 2, "padding": 2},
        {"stride": 2, "dilation": 2, "padding": 1},
        {"r": 2, "s": 2, "stride": 3, "padding": 0},
        {"r": 5, "s": 3, "padding": (4, 1)},
    ],
    ids=str,
)
@pytest.mark.parametrize(("h", "w"), [(7, 7), (16, 5), (33, 17)])
def test_bands_of_rows(h, w, sizes, isa, n, plan):
    """The last band of an image has fewer rows, or as many; images begin within a vector."""
    check(ConvCase(n=n, c=4, k=6, h=h, w=w, groups=2, **sizes), "all", plan, isa)


def dots():
    """Groups with each number of live filters up to 4 and of live channels up to 6."""
    group = torch.arange(24)[:, None]
    return {
        "filter_mask": (torch.arange(4) <= group // 6).flatten(),
        "input_mask": (torch.arange(6) <= group % 6).flatten(),
    }


@pytest.mark.thinned(2)
@every_plan
@pytest.mark.parametrize(("isa", "n"), IMAGES)
@pytest.mark.parametrize("size", [(1, 2), (2, 1), (2, 2), (2, 3), (3, 2), (2, 4)], ids=str)
@pytest.mark.parametrize(
    ("kernel", "padding"),
    [((3, 3), 1), ((3, 3), 2), ((5, 5), 2), ((4, 3), (1, 1)), ((2, 5), (1, 3)), ((3, 3), 3)],
    ids=str,
)
def test_planes_with_fewer_pixels_than_taps(kernel, padding, size, isa, n, plan):
    case = ConvCase(n=n, c=5, k=7, h=size[0], w=size[1], r=kernel[0], s=kernel[1], padding=padding)
    fits = all(size[i] + 2 * (padding if isinstance(padding, int) else padding[i]) >= kernel[i] for i in range(2))
    for pattern in ("kernel", "all") if fits else ():
        check(case, pattern, plan, isa)


@pytest.mark.thinned(2)
@every_plan
@pytest.mark.parametrize(("isa", "n"), PIXELS + IMAGES)
@pytest.mark.parametrize("width", [6, 16, 37])
@pytest.mark.parametrize(
    "sizes",
    [
        {"r": 1, "s": 1, "padding": 0},
        {"r": 1, "s": 1, "padding": 0, "stride": 2},
        {"r": 1, "padding": (0, 1)},
        {"r": 1, "padding": (0, 2)},  # rows of the output are as long as those of x with its padding
        {},
        {"stride": 2},
        {"dilation": 2, "padding": 2},
        {"r": 5, "s": 5, "padding": 2},
    ],
    ids=str,
)
def test_dots(sizes, width, isa, n, plan):
    check(ConvCase(n=n, c=24 * 6, k=24 * 4, h=3, w=width, groups=24, **sizes), dots(), plan, isa)


def geometries():
    """Kernels by strides by paddings, from none to more than any tap needs, over images down to one row or column."""
    kernels = [(1, 1), (2, 2), (3, 3), (1, 3), (3, 1), (3, 2), (5, 5)]
    strides, sizes = [1, 2, 3, (1, 2), (3, 2), (2, 9)], [(7, 9), (1, 9), (9, 1), (2, 3), (6, 6)]
    grid = itertools.product(kernels, strides, range(5), [1, 2, (2, 1)])
    for i, ((r, s), stride, padding, dilation) in enumerate(grid):
        h, w = sizes[i % len(sizes)]
        padding = [0, 1, (r, s - 1), (r - 1, s), (r + 1, s + 1)][padding]
        up, across = (padding, padding) if isinstance(padding, int) else padding
        down, right = (dilation, dilation) if isinstance(dilation, int) else dilation
        if (dilation == 1 or r * s > 1) and h + 2 * up > down * (r - 1) and w + 2 * across > right * (s - 1):
            yield ConvCase(c=3, k=4, h=h, w=w, r=r, s=s, stride=stride, padding=padding, dilation=dilation)


def unread(case):
    """No tap reaches x, of whose gradient the strides make one class only."""
    down, across = case.stride if isinstance(case.stride, tuple) else (case.stride, case.stride)
    if min(case.h, down) > 1 or min(case.w, across) > 1 or down == across == 1:
        return False
    x, weight = torch.ones(1, 1, case.h, case.w), torch.ones(1, 1, case.r, case.s)
    return not reference.masked_conv2d(x, weight, **case.conv_args).any()


GEOMETRIES = [case for case in geometries() if not unread(case)]
UNREAD = [case for case in geometries() if unread(case)]


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("isa", "n"), PIXELS + IMAGES)
@pytest.mark.parametrize(("i", "case"), list(enumerate(GEOMETRIES)), ids=str)
def test_geometry(i, case, isa, n):
    check(with_images(case, n), "all" if i % 3 else "kernel", PLANS[i // 3 % 2], isa)


@every_plan
@pytest.mark.parametrize(("isa", "n"), IMAGES)
@pytest.mark.parametrize("case", UNREAD, ids=str)
def test_images_that_no_tap_reads(case, isa, n, plan):
    check(with_images(case, n), "all", plan, isa)


@every_plan
@pytest.mark.parametrize(("isa", "n"), PIXELS)
@pytest.mark.parametrize("case", UNREAD, ids=str)
def test_pixels_that_no_tap_reads(case, isa, n, plan):
    check(with_images(case, n), "all", plan, isa)


CUTS = [
    ConvCase(n=1, c=3, k=5, h=24, w=5),
    ConvCase(n=1, c=3, k=5, h=25, w=5),
    ConvCase(n=1, c=3, k=5, h=41, w=5, stride=2),
    ConvCase(n=1, c=3, k=5, h=43, w=5, stride=(3, 1), padding=2),
    ConvCase(n=1, c=3, k=5, h=5, w=5),
    ConvCase(n=1, c=6, k=20, h=1, w=33, r=1, s=1, padding=0),
    ConvCase(n=1, c=6, k=20, h=26, w=9, r=1, s=1, padding=0),
    ConvCase(n=5, c=4, k=6, h=9, w=4, groups=2),
    ConvCase(n=6, c=4, k=6, h=16, w=20),
    ConvCase(n=15, c=4, k=6, h=5, w=4),
    ConvCase(n=15, c=4, k=6, h=25, w=4),
    ConvCase(n=15, c=4, k=6, h=33, w=15, stride=2),
    ConvCase(n=31, c=4, k=6, h=7, w=4, stride=(1, 3), padding=0),
]


@pytest.mark.thinned(2)
@every_plan
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("case", CUTS, ids=str)
def test_shares_of_the_threads(case, threads, isa, plan):
    """Blocks of rows, a shorter last one; shares of the filters; more threads than images, blocks or filters."""
    torch.set_num_threads(threads)
    check(case, "all", plan, isa)


LARGE = [
    ConvCase(n=1, c=2, k=3, h=97, w=101),
    ConvCase(n=1, c=2, k=3, h=131, w=70, stride=2, padding=2),
    ConvCase(n=2, c=3, k=2, h=91, w=101, r=1, s=1, padding=0),
    ConvCase(n=15, c=2, k=3, h=41, w=14),
    ConvCase(n=15, c=2, k=3, h=83, w=31, stride=2),
    ConvCase(n=15, c=40, k=12, h=41, w=3, r=5, s=2, padding=(2, 1)),
]


# Of the sparse plan: planes packed a few groups at a time, or a few channels; blocks that go on where one has ended.
STRETCHES = [
    ConvCase(n=8, c=3 * 48, k=3 * 5, h=14, w=14, groups=3),
    ConvCase(n=8, c=3 * 48, k=3 * 5, h=27, w=28, groups=3, stride=2),
    ConvCase(n=15, c=5 * 12, k=5 * 2, h=14, w=14, groups=5),
    ConvCase(n=15, c=130, k=7, h=7, w=56, stride=2),
    ConvCase(n=15, c=7, k=130, h=9, w=56, stride=2),
    ConvCase(n=15, c=257, k=3, h=6, w=28),
    ConvCase(n=15, c=130, k=3, h=6, w=28),
    ConvCase(n=15, c=3, k=130, h=6, w=28),
    ConvCase(n=15, c=100, k=3, h=6, w=37),
    ConvCase(n=8, c=130, k=6, h=13, w=29),
    ConvCase(n=15, c=257, k=3, h=5, w=28, dilation=2, padding=2),
    ConvCase(n=15, c=2, k=3, h=61, w=14, dilation=(3, 1), padding=(3, 1)),
    ConvCase(n=15, c=2, k=3, h=130, w=40, r=2, s=2, stride=3, padding=0),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("case", STRETCHES, ids=str)
def test_planes_packed_in_parts(case, threads, isa):
    torch.set_num_threads(threads)
    check(case, "all", "sparse", isa)


@every_plan
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_planes_of_several_blocks(case, isa, plan):
    check(case, "all", plan, isa)


@every_plan
@pytest.mark.parametrize("isa", WIDE)
@pytest.mark.parametrize("n", [5, 6, 7, 8, 9, 12, 13, 15, 16, 17, 23, 28, 33, 47])
def test_batches(n, isa, plan):
    check(ConvCase(n=n, c=3, k=5, h=5, w=6), "all", plan, isa)


MORE_KINDS = [*KINDS, ConvCase(c=12, k=9, groups=3, stride=2), ConvCase(c=3, k=6, groups=3, r=2, padding=(0, 1))]


@pytest.mark.thinned(2)
@every_plan
@pytest.mark.parametrize(("isa", "n"), PIXELS + IMAGES)
@pytest.mark.parametrize(("case", "pattern"), [(c, p) for c in MORE_KINDS for p in patterns(c)[1:]], ids=str)
def test_patterns(case, pattern, isa, n, plan):
    check(with_images(case, n), pattern, plan, isa)


@pytest.mark.thinned(2)
@every_plan
@pytest.mark.parametrize(("isa", "n"), PIXELS + IMAGES)
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("weight_grad", ["masked", "dense"])
@pytest.mark.parametrize("case", MORE_KINDS, ids=str)
def test_weight_gradients(case, weight_grad, scaled, isa, n, plan):
    args = {"grad_scale": (torch.arange(case.k) % 4) / 2} if scaled else {}
    check(with_images(case, n), "all", plan, isa, weight_grad=weight_grad, **args)


@pytest.mark.thinned(2)
@every_plan
@pytest.mark.parametrize(("isa", "n"), PIXELS + IMAGES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", MORE_KINDS, ids=str)
def test_filters_without_kernels(case, bias, isa, n, plan):
    """A live filter without live kernels gives its bias; a live channel that no live kernel reads gets gradient 0."""
    case = with_images(case, n)
    kernels = torch.ones(case.k, case.c // case.groups, dtype=torch.bool)
    kernels[1], kernels[case.k - 1] = False, False
    kernels[: case.k // case.groups, 0] &= case.c == case.groups
    x, weight, b, grad_out = inputs(case)
    check(case, {"kernel_mask": kernels}, plan, isa, (x, weight, b if bias else None, grad_out))


@every_plan
@pytest.mark.parametrize(("isa", "n"), PIXELS + IMAGES)
@pytest.mark.parametrize(
    ("layout", "which"),
    [("channels_last", 1), ("channels_last", 3), *itertools.product(["sliced", "expanded"], [0, 1, 3])],
)
def test_strides(layout, which, isa, n, plan):
    """Of x, weight or grad_out. Only a channels_last x would be computed by another plan."""
    case = ConvCase(n=n, c=4, k=6)
    problem = list(inputs(case))
    problem[which] = lay_out(problem[which], layout, expand=which == 3)
    check(case, masks(case, "all"), plan, isa, tuple(problem))


@every_plan
@pytest.mark.parametrize(("isa", "n"), PIXELS + IMAGES)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("case", [ConvCase(c=9, k=10, h=11, w=9), ConvCase(c=9, k=10, h=24, w=9, stride=2)], ids=str)
def test_the_same_bits_every_time(case, threads, isa, n, plan):
    case = with_images(case, n)
    torch.set_num_threads(threads)
    problem = inputs(case, integers=False)
    with capped(isa):
        first, *others = (run(problem, case, plan, **masks(case, "all")) for _ in range(3))
    for other in others:
        assert all(map(torch.equal, first, other))
