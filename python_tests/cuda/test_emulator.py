"""The emulator itself: it models instructions exactly, and it reports planted bugs."""

import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from cases.emulated import arrays, build
from cases.emulated.__main__ import sanitized_environment

pytestmark = pytest.mark.slow  # compiles the emulator

TESTS = pathlib.Path(__file__).parents[1]
ALL = 0xFFFFFFFF


@pytest.fixture(scope="module")
def lib():
    return build.load("emulator")


def words(values) -> np.ndarray:
    return arrays.guarded(values, np.uint32)


# ---- planted bugs: each kernel runs with the bug and without ----

RACE = "race: {} shared byte {}, which thread ({}, 0, 0) {} with no barrier"
PLANTED = {
    "missing_barrier": "thread (1, 0, 0): " + RACE.format("reads", 0, 0, "wrote"),
    "overwritten_while_read": "thread (33, 0, 0): " + RACE.format("writes", 132, 32, "read"),
    "two_writers": "thread (1, 0, 0): " + RACE.format("writes", 0, 0, "wrote"),
    "missing_syncwarp": RACE.format("reads", 120, 30, "wrote"),
    "barrier_not_reached": "barrier not reached by all threads: 63 of 64 wait there, 1 have returned",
    "barriers_of_two_kinds": "barriers of different kinds",
    "unwritten": "thread (5, 0, 0): reads shared byte 20, which was never written",
    "left_by_another_block": "block (1, 0, 0), thread (0, 0, 0): reads shared byte 0, which was never written",
    "out_of_range": "thread (63, 0, 0): reads shared bytes [256, 260) out of range: the block has 256",
    "misaligned_vector": "reads 16 shared bytes at 8: misaligned, must be a multiple of 16",
    "missing_wait": "reads shared byte 0 under an unfinished cp.async of thread (0, 0, 0)",
    "missing_commit": "reads shared byte 0 under an unfinished cp.async of thread (0, 0, 0)",
    "waits_for_too_few": "reads shared byte 256 under an unfinished cp.async of thread (0, 0, 0)",
    "no_barrier_after_wait": "thread (1, 0, 0): " + RACE.format("reads", 0, 0, "wrote"),
    "written_under_a_copy": "writes shared byte 0 under an unfinished cp.async of thread (0, 0, 0)",
    "misaligned_copy": "cp.async reads 16 global bytes at",
    "misaligned_copy_target": "cp.async writes 8 shared bytes at 4: misaligned, must be a multiple of 8",
    "half_a_warp": "__shfl_xor_sync entered by only part of its mask 0xffffffff: lane 16 has returned",
    "returned_early": "__shfl_xor_sync entered by only part of its mask 0xffffffff: lane 8 has returned",
    "two_collectives": "lane 16 is at __shfl_xor_sync of mask 0xffffffff",
    "not_in_its_mask": "thread (16, 0, 0): __shfl_xor_sync: lane 16 is not in its own mask 0x0000ffff",
    "off_by_one": "outside of every array",
    "too_deep": "overflows its stack",
    "product_not_waited_for": "products that the block has not waited for",
    "product_without_proxy_fence": "byte 6144, which thread (0, 0, 0) wrote without a fence.proxy.async since",
    "product_without_fence": "wgmma.m64n128k16.bf16: sums that no wgmma.fence has handed over",
    "product_without_barrier": "race: reads shared byte",
    "product_off_its_tile": "a tile at shared byte 128: its rows do not begin at a multiple of 1024",
    "product_overwritten": "a product's operands were overwritten before it was waited for",
}


def planted(lib, name, bug, n=64):
    from_, to = arrays.guarded(np.arange(n, dtype=np.float32)), arrays.poison(n)
    return *lib.status("pk_planted", name.encode(), bug, from_, to, n), to


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_reported(name, lib):
    status, report, _ = planted(lib, name, True)
    assert status == 719 and PLANTED[name] in report
    if " reached by " not in report and " entered by " not in report:  # the place of these is no single line
        assert re.search(r"\n  at cuda/emulator/planted_bugs.cu:\d+", report)


@pytest.mark.parametrize("name", PLANTED)
def test_without_the_bug_nothing_is_reported(name, lib):
    status, report, to = planted(lib, name, False)
    assert (status, report) == (0, "") and not np.isnan(to).any()


def test_a_step_into_the_slack_behind_an_array_is_seen(lib):
    planted(lib, "off_by_one", False, n=63)
    with pytest.raises(AssertionError, match="writes behind the last element"):
        planted(lib, "off_by_one", True, n=63)


@pytest.mark.parametrize("bug", [False, True])
def test_a_wrong_fragment_gives_a_wrong_product(bug, lib):
    rng = np.random.default_rng(0)
    from_, to = arrays.guarded(arrays.integers(rng, 192)), arrays.poison((16, 8))
    lib.call("pk_planted", b"wrong_fragment", bug, from_, to, 192)
    assert np.array_equal(to, from_[:128].reshape(16, 8) @ from_[128:].reshape(8, 8)) != bug


@pytest.mark.parametrize("element", ["bf16", "f16"])
def test_products_of_a_warpgroup(element, lib):
    """Lane and register of each sum, and where operands lie, by the PTX manual."""
    rng = np.random.default_rng(0)
    a, b, d = arrays.integers(rng, (64, 64)), arrays.integers(rng, (128, 64)), arrays.poison((4, 8, 4, 16, 2, 2))
    lib.call("pk_wgmma", arrays.narrow(a, element), arrays.narrow(b, element), d, ["bf16", "f16"].index(element))
    # [warp, group, t, j, half, pair] -> [row = 16 warp + 8 half + group, column = 8 j + 2 t + pair]
    got = d.transpose(0, 4, 1, 3, 2, 5).reshape(64, 128)
    assert np.array_equal(got, a @ b.T)


SANITIZED = """
import sys
from cases.emulated import arrays, build
name, bug, n = sys.argv[1], sys.argv[2] == "True", int(sys.argv[3])
build.load("emulator", sanitized=True).call("pk_planted", name.encode(), bug, arrays.poison(n), arrays.poison(n), n)
"""


@pytest.mark.parametrize("bug", [False, True])
@pytest.mark.parametrize(
    ("name", "n", "told"),
    [
        ("off_by_one", 63, "AddressSanitizer"),
        ("misaligned_global_vector", 64, "misaligned address"),
        ("missing_barrier", 64, "reads shared byte 248, which was never written"),
    ],
)
def test_sanitizers(name, n, told, bug):
    build.build(["emulator"], sanitized=True)
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, name, str(bug), str(n)],
        env=sanitized_environment(),
        cwd=TESTS,
        capture_output=True,
        text=True,
    )
    assert (told in done.stderr, done.returncode != 0) == (bug, bug), done.stderr


# ---- instructions ----


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("matrices", [2, 4])
def test_ldmatrix(matrices, transposed, lib):
    """Thread T's address is row T % 8 of matrix T / 8; it gets elements 2 (T % 4) and the next of row T / 4 of each."""
    rng = np.random.default_rng(matrices)
    halves = rng.integers(0, 1 << 16, (40, 8)).astype(np.uint16)  # rows of 16 bytes
    rows = rng.choice(40, 8 * matrices, replace=False)
    addresses = np.full(32, 7)  # the addresses of lanes that name no row are not read
    addresses[: 8 * matrices] = 16 * rows
    fragments = words(np.zeros((32, 4)))
    lib.call("pk_ldmatrix", words(halves.view(np.uint32)), words(addresses), fragments, 160, matrices, transposed)
    for m in range(matrices):
        matrix = halves[rows[8 * m : 8 * m + 8]]
        matrix = matrix.T if transposed else matrix
        want = matrix.reshape(32, 2).astype(np.uint32)
        assert np.array_equal(fragments[:, m], want[:, 0] | want[:, 1] << 16)


@pytest.mark.parametrize("bytes_", [4, 8, 16])
def test_cp_async(bytes_, lib):
    """A copy that is not valid writes zeros; neighbours swap pieces after the barrier."""
    rng = np.random.default_rng(bytes_)
    pieces, valid = words(rng.integers(0, 1 << 32, (64, bytes_ // 4))), arrays.guarded(rng.integers(0, 2, 64), np.int32)
    to = arrays.poison((64, bytes_ // 4), np.uint32)
    lib.call("pk_copy", pieces, valid, to, bytes_, 64)
    copied = np.where(valid[:, None], pieces, 0)
    assert np.array_equal(to, copied.reshape(32, 2, -1)[:, ::-1].reshape(to.shape))


def mma_m16n8k16_layout():
    """(row, column) of a's elements a0 ... a7, b's b0 ... b3 and d's d0 ... d3 in each lane, as the PTX manual says."""
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        a = [
            (
                group if 0 <= i < 2 or 4 <= i < 6 else group + 8,
                thread * 2 + (i & 1) if i < 4 else thread * 2 + (i & 1) + 8,
            )
            for i in range(8)
        ]
        b = [(thread * 2 + (i & 1) if i < 2 else thread * 2 + (i & 1) + 8, group) for i in range(4)]
        d = [(group if i < 2 else group + 8, thread * 2 + (i & 1)) for i in range(4)]
        yield lane, a, b, d


def mma_m16n8k8_tf32_layout():
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        a = [(group if i in (0, 2) else group + 8, thread if i in (0, 1) else thread + 4) for i in range(4)]
        b = [(thread if i == 0 else thread + 4, group) for i in range(2)]
        d = [(group if i < 2 else group + 8, thread * 2 + (i & 1)) for i in range(4)]
        yield lane, a, b, d


@pytest.mark.parametrize("element", ["bf16", "f16", "tf32"])
def test_mma(element, lib):
    rng = np.random.default_rng(1)
    depth, layout = (8, mma_m16n8k8_tf32_layout) if element == "tf32" else (16, mma_m16n8k16_layout)
    a, b, d = (arrays.integers(rng, shape, 8) / 8 for shape in ((16, depth), (depth, 8), (16, 8)))

    def fragment(matrix, places):
        elements = arrays.narrow([matrix[place] for place in places], element)
        return elements.view(np.uint32)

    registers = [words(np.zeros((32, 4))), words(np.zeros((32, 2)))]
    accumulators = arrays.guarded(np.zeros((32, 4), np.float32))
    for lane, of_a, of_b, of_d in layout():
        registers[0][lane], registers[1][lane] = fragment(a, of_a), fragment(b, of_b)
        accumulators[lane] = [d[place] for place in of_d]
    lib.call("pk_mma", *registers, accumulators, ["bf16", "f16", "tf32"].index(element))
    want = a @ b + d
    for lane, _, _, of_d in layout():
        assert list(accumulators[lane]) == [want[place] for place in of_d]


def test_mma_sees_19_bits_of_a_tf32(lib):
    a, b, d = words(np.zeros((32, 4))), words(np.zeros((32, 2))), arrays.guarded(np.zeros((32, 4), np.float32))
    a[0, 0] = np.float32(1 + 2**-10 + 2**-11).view(np.uint32)  # 12 of them after rounding, 11 without
    b[0, 0] = np.float32(1).view(np.uint32)
    lib.call("pk_mma", a, b, d, 2)
    assert d[0, 0] == 1 + 2**-10


def test_conversions(lib):
    rng = np.random.default_rng(2)
    every_half = np.arange(1 << 16, dtype=np.uint32)
    near = (every_half << 16) + rng.choice([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], 1 << 16)  # about every bf16
    middles = (every_half.astype(np.uint16).view(np.float16).astype(np.float32)).view(np.uint32)
    middles = middles + rng.choice([-1, 0, 1, 0xFFF, 0x1000, 0x1001], 1 << 16)  # about every f16
    bits = np.concatenate([every_half, near, middles]).astype(np.uint32)
    values, n = arrays.guarded(bits.view(np.float32)), len(bits)
    bf16, f16 = (arrays.poison(n, np.uint16) for _ in range(2))
    tf32, from_bf16, from_f16 = arrays.poison(n, np.uint32), arrays.poison(n), arrays.poison(n)
    lib.call("pk_convert", values, bf16, f16, tf32, from_bf16, from_f16, n)

    nan = np.isnan(values)
    with np.errstate(over="ignore", invalid="ignore"):
        assert np.array_equal(f16[~nan], values.astype(np.float16).view(np.uint16)[~nan])
    assert (f16[nan] == 0x7FFF).all() and (bf16[nan] == 0x7FFF).all() and np.isnan(tf32.view(np.float32)[nan]).all()
    low = bits.astype(np.uint16)
    assert np.array_equal(from_f16, low.view(np.float16).astype(np.float32), equal_nan=True)
    assert np.array_equal(from_bf16.view(np.uint32), low.astype(np.uint32) << 16)

    # Rounding, of what is finite: no other number of the type is nearer; bf16 breaks ties to even, tf32 away from zero.
    finite = np.isfinite(values) & (np.abs(values) < 1e38)
    exact = values[finite].astype(np.float64)
    for got, step, even in ((bf16[finite].astype(np.uint32) << 16, 1 << 16, True), (tf32[finite], 1 << 13, False)):
        rounded = got.view(np.float32).astype(np.float64)
        ties = 0
        for neighbour in (got + np.uint32(step), got - np.uint32(step)):
            same_sign = (neighbour ^ got) >> 31 == 0
            other = neighbour.view(np.float32).astype(np.float64)
            worse = np.where(same_sign, abs(rounded - exact) - abs(other - exact), -1)
            assert (worse <= 0).all()
            tie = worse == 0
            assert (got[tie] // step % 2 == 0 if even else abs(rounded[tie]) > abs(exact[tie])).all()
            ties += tie.sum()
        assert ties > 1000


def shuffled(kind, argument, width, lanes):
    """As the CUDA guide says: within segments of `width` lanes; a lane without a source keeps its own value."""
    for lane in range(lanes):
        segment = lane // width * width
        if kind == "index":
            yield segment + argument % width
        elif kind == "xor":
            yield lane ^ argument if lane ^ argument < segment + width else lane
        elif kind == "down":
            yield lane + argument if lane + argument < segment + width else lane
        else:
            yield lane - argument if lane - argument >= segment else lane


@pytest.mark.parametrize("width", [2, 8, 32])
@pytest.mark.parametrize("argument", [0, 1, 3, 16, 31])
@pytest.mark.parametrize("kind", ["index", "xor", "down", "up"])
def test_shuffles(kind, argument, width, lib):
    from_, to = arrays.guarded(np.arange(64) * 3 - 50), arrays.poison(64, np.int64)
    lib.call("pk_warp", from_, to, 64, ["index", "xor", "down", "up"].index(kind), argument, width, ALL)
    source = np.array(list(shuffled(kind, argument, width, 32)))
    assert np.array_equal(to, from_.reshape(2, 32)[:, source].flatten())


def test_a_lane_that_is_not_there_gives_garbage(lib):
    from_, to = arrays.guarded(np.arange(40)), arrays.poison(40, np.int64)
    lib.call("pk_warp", from_, to, 40, 1, 1, 32, 0xFFFFFF0F)  # lanes 4 to 7 leave; the second warp has 8
    assert to[0] == 1 and to[33] == 32
    lib.call("pk_warp", from_, to, 40, 0, 9, 32, ALL)
    assert to[0] == 9 and to[32] == -1


@pytest.mark.parametrize(("threads", "mask"), [(32, ALL), (64, 0x80000001), (40, 0xFF)])
@pytest.mark.parametrize("least", [-1, 20, 100])
def test_votes_of_a_warp(least, threads, mask, lib):
    values = np.arange(threads)[::-1]
    from_, lane = arrays.guarded(values), np.arange(threads) % 32
    takes_part = mask >> lane & 1 == 1
    for kind in ("ballot", "any", "all"):
        to = arrays.guarded(np.full(threads, -7))
        lib.call("pk_warp", from_, to, threads, 4 + ["ballot", "any", "all"].index(kind), least, 32, mask)
        for first in range(0, threads, 32):
            warp = slice(first, first + 32)
            yes = (values > least)[warp] & takes_part[warp]
            want = {
                "ballot": int((yes * (1 << lane[warp])).sum()),
                "any": yes.any(),
                "all": yes.sum() == takes_part[warp].sum(),
            }
            assert np.array_equal(to[warp], np.where(takes_part[warp], int(want[kind]), -7))


@pytest.mark.parametrize("threads", [1, 33, 256])
@pytest.mark.parametrize("yes", [0, 1, -1])
def test_votes_of_a_block(yes, threads, lib):
    from_, to = arrays.guarded(np.zeros(threads), np.int32), arrays.poison((3, threads), np.int32)
    from_[:yes] = 1
    lib.call("pk_votes", from_, to, threads)
    assert np.array_equal(to, np.repeat([[from_.any()], [from_.all()], [from_.sum()]], threads, 1))


ONE = (1, 1, 1)


@pytest.mark.parametrize(
    ("grid", "block", "shared", "accepted"),
    [
        ((3, 2, 4), (5, 3, 2), 0, True),
        ((0, 1, 1), ONE, 0, True),
        ((1, 65536, 1), ONE, 0, False),
        ((1, 1, 65536), ONE, 0, False),
        ((1 << 31, 1, 1), ONE, 0, False),
        (ONE, (1024, 1, 1), 0, True),
        (ONE, (1025, 1, 1), 0, False),
        (ONE, (32, 33, 1), 0, False),
        (ONE, (1, 1, 65), 0, False),
        (ONE, (0, 1, 1), 0, False),
        (ONE, ONE, 227 << 10, True),
        (ONE, ONE, (227 << 10) + 1, False),
    ],
)
def test_launches(grid, block, shared, accepted, lib):
    count = arrays.guarded([0], np.uint64)
    status, report = lib.status("pk_count", count, words(grid), words(block), shared)
    assert (status, report == "") == ((0, True) if accepted else (9, False))
    assert count[0] == np.prod(grid) * np.prod(block) * accepted
