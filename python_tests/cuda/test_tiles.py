"""Every tile of igemm_* and block_sparse_*, which sizes of tests would not choose, on the emulator. On a GPU:
test_conv.py.
"""
# ruff: noqa: F811 (fixtures)

import pytest
import torch

from cases import tiles
from cases.conv import ConvCase, inputs, run
from cases.emulated_ops import events, library  # noqa: F401
from cases.tiles import CASES, DTYPES, TESTED

pytestmark = pytest.mark.slow  # compiles csrc/cuda


@TESTED
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_every_tile(name, vectors, dtype, plan, tile, grad_tile, splits, library, events):
    tiles.check(library, name, vectors, dtype, plan, tile, grad_tile, splits)


@TESTED
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype not in ("bf16", "f32")])
def test_every_tile_in_other_types(dtype, plan, tile, grad_tile, splits, library, events):
    tiles.check(library, "strided", False, dtype, plan, tile, grad_tile, splits)


@tiles.CUTS
@pytest.mark.parametrize("case", tiles.SPARSE_CASES, ids=str)
def test_every_cut_of_sparse_kernels(case, multiprocessors, library, events):
    tiles.check_cut(library, case, multiprocessors)


def test_nothing_stays_forced(library, events):
    case = ConvCase(n=1, c=16, k=16, h=3, w=3)
    with tiles.forced(library, "m128n128", "m64n64", 3, 7):
        pass
    with tiles.forced(library) as last:
        run(inputs(case, torch.bfloat16, "channels_last"), case, "direct", filter_mask=torch.arange(16) < 9)
        assert last() == ("m64n32", "m64n64", 1, 4)


def test_a_tile_that_is_not_there_raises(library, events):
    with pytest.raises(RuntimeError, match="block_sparse_fwd"):
        tiles.check(library, "strided", True, "bf16", "sparse", "m128n128", "m64n64", 1)
