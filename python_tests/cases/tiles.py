"""Tiles, slices and numbers of multiprocessors that tests force on the CUDA kernels, and problems that fill more than
one of the largest.
"""

import contextlib
import ctypes
import itertools

import pytest
import torch

from cases.conv import ConvCase, assert_same, inputs, run
from prunekernels import reference

TILES = ("m128n128", "m128n64", "m64n32", "w128n128")  # as enum IgemmTile counts them
GRAD_TILES = ("m128n128", "m64n64")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {"bf16": BF16, "f16": F16, "tf32": F32, "f32": F32}


@contextlib.contextmanager
def forced(library, tile=None, grad_tile=None, splits=-1, multiprocessors=-1):
    """library: the compiled operators, loaded by ctypes. Gives a function that tells what the last calls took."""
    numbers = [TILES.index(tile) if tile else -1, GRAD_TILES.index(grad_tile) if grad_tile else -1]
    arguments = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int]
    force = lambda *values: library.pk_force_tiles(*(t(v) for t, v in zip(arguments, values, strict=True)))  # noqa: E731

    def last():
        four = (ctypes.c_int64 * 4)()
        library.pk_last_tiles(four)
        return TILES[four[0]] if four[0] >= 0 else None, GRAD_TILES[four[1]] if four[1] >= 0 else None, *four[2:]

    force(*numbers, splits, multiprocessors)
    try:
        yield last
    finally:
        force(-1, -1, -1, -1)


def listed(count, live, vectors):
    """bool [count]: so many live ones, in whole runs of 8 or scattered."""
    order = torch.randperm(count // 8 if vectors else count, generator=torch.Generator().manual_seed(count))
    mask = torch.zeros(count, dtype=torch.bool)
    if vectors:
        mask.view(-1, 8)[order[: live // 8]] = True
    else:
        mask[order[:live]] = True
    return mask


# Results of more than 128 channels, forward and backward; 144 pixels; odd counts unless there are vectors.
CASES = {
    "many filters": (ConvCase(n=2, c=32, k=184, h=9, w=8), 23, 136),
    "many channels": (ConvCase(n=2, c=184, k=32, h=9, w=8), 133, 24),
    "strided": (ConvCase(n=2, c=72, k=72, h=17, w=16, r=1, s=1, padding=0, stride=2), 65, 72),
}


def problem(name, vectors, plan):
    """A case and its masks."""
    case, channels, filters = CASES[name]
    if vectors:
        channels, filters = (live // 8 * 8 for live in (channels, filters))
    made = {"filter_mask": listed(case.k, filters, vectors), "input_mask": listed(case.c, channels, vectors)}
    if plan == "sparse":  # blocks of dead kernels, which some tiles have to themselves
        made["kernel_mask"] = (torch.arange(case.k)[:, None] // 16 + 3 * (torch.arange(case.c) // 8)) % 4 != 1
    return case, made


def choices():
    """(plan, tile, grad_tile, splits) for every tile of every family."""
    for plan in ("direct", "sparse"):
        tiles = TILES if plan == "direct" else TILES[1:3]  # with lists there is no large one
        for i, (tile, grad_tile) in enumerate(itertools.product(tiles, GRAD_TILES)):
            yield plan, tile, grad_tile, (1, 2, 5)[i % 3]


TESTED = pytest.mark.parametrize(("plan", "tile", "grad_tile", "splits"), list(choices()))


def check(library, name, vectors, dtype, plan, tile, grad_tile, splits, there=lambda value: value):
    """That the numbers are the reference's. there: moves tensors to the device."""
    if tile == "w128n128" and dtype not in ("bf16", "f16"):
        pytest.skip("warpgroups multiply elements of two bytes")
    case, made = problem(name, vectors, plan)
    of = DTYPES[dtype]
    operands = inputs(case, of, "channels_last")
    want = [t.to(of).double() for t in reference.gradients(*operands, **made, **case.conv_args)]
    with (
        forced(library, tile, grad_tile, splits, multiprocessors=132) as last,
        torch.backends.cudnn.flags(enabled=True, allow_tf32=dtype == "tf32"),
    ):
        got = run(there(operands), case, plan, **there(made))
        taken = last()
        assert taken == (tile, grad_tile, splits, 132), taken
    assert_same([t.cpu() for t in got], want)


# ---- sparse_*: how they cut their work depends on the number of multiprocessors

SPARSE_CASES = [
    ConvCase(n=2, c=9, k=40, h=9, w=8),
    ConvCase(n=2, c=40, k=9, h=9, w=8, stride=2),
    ConvCase(n=2, c=12, k=20, h=9, w=8, r=1, s=1, padding=0),
    ConvCase(n=1, c=6, k=7, h=20, w=19, r=5, s=5, padding=2),
    ConvCase(n=3, c=6, k=7, h=8, w=9, r=2, s=2, stride=2),
]
CUTS = pytest.mark.parametrize("multiprocessors", [1, 132, 100_000])


def check_cut(library, case, multiprocessors, there=lambda value: value):
    """That sparse_* give the reference's numbers where so many multiprocessors share the work."""
    kernels = torch.rand((case.k, case.c), generator=torch.Generator().manual_seed(0)) < 0.4
    made = {"kernel_mask": kernels, "input_mask": torch.arange(case.c) != 2, "filter_mask": torch.arange(case.k) != 1}
    operands = inputs(case)
    want = reference.gradients(*operands, **made, **case.conv_args)
    with forced(library, multiprocessors=multiprocessors) as last:
        got = run(there(operands), case, "sparse", **there(made))
        assert last()[3] == multiprocessors
    assert_same([t.cpu() for t in got], want)
