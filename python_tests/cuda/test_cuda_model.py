"""make cuda-model: what it reads of machine code, what the emulator counts, and how both become times."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest

import cuda_model
import loops
import sass
import traffic
from cases.emulated.igemm_problems import Problem
from machine import H100
from roofline import instructions, times

CODE = """\
	.section	.text._Z3mulv,"ax",@progbits
_Z3mulv:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0020*/              @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0030*/                   LDSM.16.M88.4 R4, [R3] ;
.L_x_3:
        /*0040*/             @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0050*/              @!P2 BRA `(.L_x_3) ;
        /*0060*/                   HMMA.16816.F32 R8, R80.reuse, R36, R8 ;
        /*0070*/                   HMMA.16816.F32 R12, R80, R38, R12 ;
        /*0080*/               @P0 BRA `(.L_x_2) ;
        /*0090*/                   BRA `(.L_x_4) ;
.L_x_4:
        /*00a0*/                   EXIT ;
	.section	.text._Z4copyv,"ax",@progbits
.L_x_5:
        /*0000*/                   LDG.E.U16 R2, desc[UR4][R2.64] ;
        /*0010*/                   STG.E.U16 desc[UR4][R4.64], R2 ;
        /*0020*/               @P0 BRA `(.L_x_5) ;
	.section	.text._Z4onceV,"ax",@progbits
        /*0000*/                   EXIT ;
"""


def test_main_loops():
    mul, copy, once = sass.parse(CODE)
    assert (mul.name, len(mul.instructions)) == ("_Z3mulv", 11)
    assert mul.main_loop() == Counter({"mma": 2, "branch": 2, "ldmatrix": 1, "other": 1})
    assert copy.main_loop() == Counter({"global load": 1, "global store": 1, "branch": 1})
    assert once.main_loop() is None


def kernel(registers=100, **kinds):
    return loops.Kernel(Counter(kinds), registers)


class TestLoopTable:
    KERNELS = {"mul<float>": kernel(mma=4, other=20), "copy": kernel(other=9)}  # noqa: RUF012

    def test_what_is_written_is_read(self):
        text = loops.table(self.KERNELS, "13.0")
        assert loops.read_table(text) == {"mul<float>": (6.0, 100)} and "# nvcc 13.0" in text
        assert loops.problems(self.KERNELS, loops.read_table(text)) == []

    @pytest.mark.parametrize(
        ("now", "told"),
        [
            ({"mul<float>": kernel(mma=4, other=21)}, "6.25 instructions a product, 6.00 in loops.txt"),
            ({"mul<float>": kernel(101, mma=4, other=20)}, "101 registers, 100 in loops.txt"),
            ({"mul<float>": kernel(mma=4, other=20), "add": kernel(mma=1)}, "add: not in loops.txt"),
            ({}, "mul<float>: in loops.txt, but not compiled"),
        ],
    )
    def test_what_is_worse_is_told(self, now, told):
        (problem,) = loops.problems(now, {"mul<float>": (6.0, 100)})
        assert told in problem

    def test_what_is_better_is_fine(self):
        assert loops.problems({"mul<float>": kernel(99, mma=4, other=10)}, {"mul<float>": (6.0, 100)}) == []

    def test_the_committed_table_names_kernels(self):
        known = loops.read_table(loops.TABLE.read_text())
        assert len(known) > 50 and all(each > 1 and registers > 0 for each, registers in known.values())


def test_times():
    moved = traffic.Traffic(load_requests=10, store_requests=2, loaded_sectors=3e6, store_sectors=1e6,
                            distinct_sectors=3e6, shared_wavefronts=132e3, products=100)  # fmt: skip
    found = times(H100, moved, Counter({"mma": 2, "other": 18}))
    assert found.shared == pytest.approx(1e3 / 1755)
    assert found.dram == pytest.approx(3e6 * 32 / 3000e3) and (found.bound, found.total) == ("dram", found.dram)
    assert found.l2 == pytest.approx(4e6 * 32 / 5500e3)
    assert instructions(moved, Counter({"mma": 2, "other": 18})) == 1000
    assert instructions(moved, Counter({"global load": 2, "global store": 1, "other": 9})) == 12 * 4
    assert H100.floor(0, 3350e3) == 1 and H100.floor(4096 * 132 * 1755, 0) == pytest.approx(1)


@pytest.mark.slow  # compiles the emulator
class TestTraffic:
    def test_a_copy_of_whole_vectors(self):
        """Half the channels, in runs of 16: each sector is asked for once."""
        lists = traffic.spread(32, 64, runs=True)
        lists.index[:] = np.arange(32)
        lists.slot[:] = np.where(np.arange(64) < 32, np.arange(64), -1)
        found = traffic.channel_copy(True, 1, 256, lists)
        read, written = 256 * 32 * 2 / 32, 256 * 32 * 2 / 32
        assert found.store_sectors == written
        assert read <= found.loaded_sectors <= read + 32  # and the lists
        assert found.products == found.shared_wavefronts == 0

    def test_single_channels_share_sectors(self):
        lists = traffic.spread(32, 64, runs=False)
        found = traffic.channel_copy(True, 1, 256, lists)
        assert 256 * 64 * 2 / 32 - 256 <= found.loaded_sectors <= 256 * 64 * 2 / 32 + 64
        assert found.load_sectors > 1.5 * found.loaded_sectors  # several requests meet in a sector

    @pytest.mark.parametrize("tile", range(3))
    def test_products_and_conflicts(self, tile):
        """Vectors of a convolution lie free of bank conflicts, as igemm_warp.cuh says."""
        pixels, channels = ((128, 128), (128, 64), (64, 32))[tile]
        problem = Problem(n=1, c=64, h=16, w=16, k=256)
        lists = [traffic.spread(count, 2 * count, runs=True) for count in (128, 32)]
        found = traffic.convolution(problem, *lists, False, tile)
        blocks = 256 / pixels * 128 / channels
        assert found.products == blocks * (pixels / 16) * (channels / 8) * 2  # 32 channels: two products deep
        assert found.conflicts == 1
        assert found.store_sectors >= 256 * 256 * 2 / 32

    @pytest.mark.parametrize("runs", [False, True])
    def test_an_unpacked_gradient_moves_what_its_floor_counts(self, runs):
        """The layer whose slices are counted has as many live filters and channels as the one of the floor."""
        problem, splits = Problem(n=1, c=64, h=1, w=1, k=256), 2
        filters, inputs = (traffic.spread(live, 2 * live, runs) for live in (128, 32))
        found = traffic.unpacked(problem, filters, inputs, splits)
        floor = splits * 128 * 32 * 4 + 256 * 64 * 2
        assert floor <= found.distinct_sectors * 32 <= 1.08 * floor  # and the mask table

    @pytest.mark.parametrize("adds", [False, True])
    def test_norms_move_what_their_floor_counts(self, adds):
        """Each pass over the tensor once, whatever the order."""
        tensor, lists = 448 * 64 * 2 / 32, 40  # sectors
        passes = [*traffic.norm_forward(448, 64, adds), *traffic.norm_backward(448, 64)]
        for moved, (read, written) in zip(passes, [(1, 0), (1 + adds, 1), (2, 0), (2, 1)], strict=True):
            assert moved.distinct_sectors == (read + written) * tensor
            assert moved.store_sectors == written * tensor
            assert read * tensor <= moved.loaded_sectors <= read * tensor + lists

    def test_few_images_tell_of_many(self):
        problem, lists = Problem(n=64, c=32, h=7, w=7, k=64), [traffic.spread(n, 2 * n, runs=True) for n in (32, 16)]
        guessed = cuda_model._of_images(problem, lambda cut: traffic.convolution(cut, *lists, False, 1))
        counted = traffic.convolution(problem, *lists, False, 1)
        for field in dataclasses.fields(traffic.Traffic):
            assert getattr(guessed, field.name) == pytest.approx(getattr(counted, field.name), rel=0.08), field.name


def test_problems_of_a_suite():
    found = dict(cuda_model.problems("resnet50", 128))
    assert len(found) == len(set(found.values())) > 15
    assert found["resnet50:conv3_1.3x3"] == Problem(128, 128, 56, 56, 128, 3, 3, (2, 2), (1, 1))


def test_the_best_plan():
    def launch(us):
        return cuda_model.Launch("k", traffic.Traffic(), times(H100, traffic.Traffic(distinct_sectors=us * 3000e3 / 32),
                                                               Counter()), us / 2)  # fmt: skip

    row = cuda_model.Row("layer", "forward", "vectors", [launch(3)], [launch(1), launch(2)], 1.0, math.inf)
    assert (row.ours, row.compact) == (pytest.approx(3), pytest.approx(4)) and row.best[0] == "direct"
    assert row.direct[0].share == pytest.approx(0.5)
