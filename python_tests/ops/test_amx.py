"""AMX without a CPU that has it: the model of its instructions by numpy and by the CPU's own arithmetic, and compiled
kernels against the model. Whole convolutions on the model: test_pixels.py."""

import platform
import subprocess

import numpy as np
import pytest

import prunekernels as pk
from cases import amx
from cases.conv import isas

pytestmark = pytest.mark.slow


def bfloat16(values):
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def integers(*size, top, seed=0):
    return np.random.default_rng(seed).integers(-top, top + 1, size).astype(np.float32)


@pytest.mark.parametrize("pairs", [1, 2, 15, 16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (15, 16), (16, 15), (16, 16)])
def test_dot(rows, columns, pairs):
    """Integers: any order of sums gives the same."""
    a, b, c = integers(rows, 2 * pairs, top=9), integers(2 * pairs, columns, top=9, seed=1), integers(16, 16, top=99)
    tiles = amx.Tiles((rows, rows, pairs), (4 * columns, 4 * pairs, 4 * columns))
    tiles.load(0, c)
    tiles.load(1, bfloat16(a))
    tiles.load(2, bfloat16(b.reshape(pairs, 2, columns).transpose(0, 2, 1).reshape(pairs, -1).copy()))
    tiles.dot(0, 1, 2)
    want = np.full((16, 16), -1, np.float32)
    want[:rows, :columns] = c[:rows, :columns] + a @ b
    assert np.array_equal(tiles.store(0, np.full((16, 16), -1, np.float32)), want)


def dot_of(c, a, b):
    """One number of a dot product: a and b are lists of pairs."""
    pairs = len(a) // 2
    tiles = amx.Tiles((1, 1, pairs), (4, 4 * pairs, 4))
    tiles.load(0, np.float32([[c]]))
    tiles.load(1, bfloat16([a]))
    tiles.load(2, bfloat16(b).reshape(pairs, 2))
    tiles.dot(0, 1, 2)
    return float(tiles.store(0, np.zeros((1, 1), np.float32))[0, 0])


@pytest.mark.parametrize(
    ("c", "a", "want"),
    [
        (-(2.0**24), [2.0**24, 1.0], 0.0),  # the two of a pair are added to each other before the sum: 1 is lost
        (-(2.0**24), [2.0**24, 0.0, 1.0, 0.0], 0.0),  # even ones first
        (0.0, [2.0**24, 1.0, -(2.0**24), 0.0], 1.0),  # apart from odd ones
        (1.0, [2.0**24, 0.0, 0.0, -(2.0**24)], 1.0),  # and the sum comes last
    ],
)
def test_order_of_sums(c, a, want):
    assert dot_of(c, a, [1.0] * len(a)) == want


TINY = 2.0**-126


@pytest.mark.parametrize(
    ("c", "a", "b", "want"),
    [
        (0.0, [TINY / 2, 0.0], [2.0**100, 1.0], 0.0),  # a subnormal factor is zero
        (TINY / 2, [TINY, 0.0], [1.0, 1.0], TINY),  # and so is a subnormal sum
        (0.0, [TINY, 0.0], [0.5, 1.0], 0.0),  # results too: of products,
        (0.0, [TINY, TINY], [1.5, -1.0], 0.0),  # of the two sums of products,
        (1.5 * TINY, [TINY, 0.0], [-1.0, 1.0], 0.0),  # and at the end
    ],
)
def test_subnormal_numbers_are_zero(c, a, b, want):
    assert dot_of(c, a, b) == want


def test_nan_and_infinity_pass():
    assert np.isnan(dot_of(0.0, [np.inf, 0.0], [0.0, 0.0])) and np.isnan(dot_of(np.nan, [0.0, 0.0], [0.0, 0.0]))
    assert dot_of(0.0, [np.inf, 1.0], [-2.0, 1.0]) == -np.inf


def test_rows_are_loaded_and_stored_at_a_distance():
    numbers = np.arange(16 * 32, dtype=np.int32).reshape(16, 32)
    tiles = amx.Tiles((3,), (12,))
    tiles.load(0, numbers)
    got = tiles.store(0, np.full((16, 20), -1, np.int32))
    assert np.array_equal(got[:3, :3], numbers[:3, :3])
    assert (got[3:] == -1).all() and (got[:, 3:] == -1).all()
    tiles.load(0, numbers[5:], stride=0)
    assert (tiles.store(0, got)[:3, :3] == numbers[5, :3]).all()


def test_loading_goes_on_where_it_stopped():
    """start_row: a page fault in the middle. Rows before it stay, and it is zero afterwards."""
    tiles = amx.Tiles((4,), (4,), start_row=2)
    tiles.load(0, np.int32([[1], [2], [3], [4]]))
    assert tiles.configuration()[1] == 0
    assert tiles.store(0, np.full((4, 1), -1, np.int32)).ravel().tolist() == [0, 0, 3, 4]


def test_configuration():
    made = amx.config((16, 3), (64, 8))
    tiles = amx.Tiles()
    tiles.configure(made)
    assert np.array_equal(tiles.configuration(), made)
    tiles.load(0, np.ones((16, 16), np.int32))
    tiles.configure(made)  # zeroes
    assert not tiles.store(0, np.ones((16, 16), np.int32)).any()
    tiles.release()
    assert not tiles.configuration().any()


def with_byte(at, value):
    made = amx.config((16, 3), (64, 8))
    made[at] = value
    return made


@pytest.mark.parametrize(
    "wrong",
    [
        amx.config((16,), (64,), palette=2),
        amx.config((17,), (64,)),
        amx.config((16,), (65,)),
        amx.config((0,), (64,)),
        amx.config((16,), (0,)),
        with_byte(2, 1),
        with_byte(15, 1),
        with_byte(40, 1),
        with_byte(63, 1),
    ],
)
def test_wrong_configurations(wrong):
    with pytest.raises(ValueError, match="ldtilecfg"):
        amx.Tiles().configure(wrong)


@pytest.mark.parametrize("t", [-1, 1, 8])
def test_tiles_that_are_not_configured(t):
    array = np.zeros((16, 16), np.int32)
    for tiles in (amx.Tiles(), amx.Tiles((2,), (4,))):
        with pytest.raises(ValueError, match="tilezero"):
            tiles.zero(t)
        with pytest.raises(ValueError, match="tileloadd"):
            tiles.load(t, array)
        with pytest.raises(ValueError, match="tilestored"):
            tiles.store(t, array)
        with pytest.raises(ValueError, match="tdpbf16ps"):
            tiles.dot(0, t, 2)


@pytest.mark.parametrize(
    ("rows", "row_bytes", "operands"),
    [
        ((4, 4, 2), (8, 8, 8), (0, 0, 2)),
        ((4, 4, 2), (8, 8, 8), (0, 1, 1)),
        ((4, 4, 2), (8, 8, 8), (2, 1, 2)),
        ((4, 5, 2), (8, 8, 8), (0, 1, 2)),  # rows
        ((4, 4, 2), (8, 8, 12), (0, 1, 2)),  # columns
        ((4, 4, 3), (8, 8, 8), (0, 1, 2)),  # pairs
        ((4, 4, 1), (6, 4, 6), (0, 1, 2)),  # half numbers
    ],
)
def test_wrong_shapes(rows, row_bytes, operands):
    with pytest.raises(ValueError, match="tdpbf16ps"):
        amx.Tiles(rows, row_bytes).dot(*operands)


def test_half_numbers_and_starts_behind_the_end():
    for tiles in (amx.Tiles((4,), (6,)), amx.Tiles((4,), (8,), start_row=4)):
        with pytest.raises(ValueError, match="tileloadd"):
            tiles.load(0, np.zeros((4, 2), np.int32))
        with pytest.raises(ValueError, match="tilestored"):
            tiles.store(0, np.zeros((4, 2), np.int32))


def any_bits(count, seed, exponents=(0, 255)):
    """Floats of any bits with exponents in that range."""
    gen = np.random.default_rng(seed)
    sign_and_fraction = gen.integers(0, 2**32, count, dtype=np.uint32) & np.uint32(0x807FFFFF)
    exponent = gen.integers(exponents[0], exponents[1] + 1, count).astype(np.uint32)
    return (sign_and_fraction | exponent << 23).view(np.float32)


def assert_same_bits(got, want):
    nan = np.isnan(want)
    assert np.array_equal(np.isnan(got), nan)
    assert np.array_equal(got[~nan].view(np.uint32), want[~nan].view(np.uint32))


def needs(what, name):
    if platform.machine() != "x86_64" or not amx.cpu_has(what):
        pytest.skip(f"this CPU has no {name} to compare with")


def test_arithmetic_is_that_of_a_cpu_that_flushes_subnormal_numbers():
    needs("fma", "fused multiply-add")
    for exponents in ((0, 255), (0, 40), (55, 75)):
        a, b, c = (any_bits(1 << 18, seed, exponents) for seed in range(3))
        c = np.where(np.arange(c.size) % 2, c, any_bits(c.size, 3, (0, 3)))  # sums near the smallest normal number
        assert_same_bits(amx.arithmetic("multiply_add", a, b, c), amx.arithmetic("cpu_multiply_add", a, b, c))
        assert_same_bits(amx.arithmetic("add", a, c), amx.arithmetic("cpu_add", a, c))


def test_results_that_round_up_to_the_smallest_normal_number():
    """What is below it by less than a quarter of its last place is not subnormal, the rest is."""
    needs("fma", "fused multiply-add")
    below = 2.0 ** np.arange(-160.0, -140.0, 0.25)
    b = np.float32(-below * 2.0**100)
    a, c = np.full_like(b, 2.0**-100), np.full_like(b, TINY)
    for sign in (1, -1):
        got = amx.arithmetic("multiply_add", a, sign * b, sign * c)
        assert_same_bits(got, amx.arithmetic("cpu_multiply_add", a, sign * b, sign * c))
        assert np.count_nonzero(got) not in (0, len(got))


def test_narrowing_is_that_of_the_cpu():
    needs("bf16", "AVX-512 BF16")
    for exponents in ((0, 255), (0, 1), (255, 255)):
        numbers = any_bits(1 << 16, 0, exponents)
        got, want = (amx.arithmetic(name, numbers, result=np.uint16) for name in ("narrow", "cpu_narrow"))
        assert np.array_equal(got, want)


def test_compiled_instructions_do_what_the_model_does():
    """By an AMX CPU if this is one, else each is trapped and decoded. Vectors beside them need AVX-512 BF16."""
    if not {"amx", "avx512bf16"} & set(isas()):
        pytest.skip("this CPU has no AVX-512 BF16")
    done = subprocess.run([amx.program()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    trapped = int(done.stdout.split()[0])
    assert (trapped == 0) == ("amx" in isas())


@pytest.mark.skipif("amx" not in isas(), reason="this CPU has no AMX, or Linux does not let this process use it")
def test_the_best_row_of_a_cpu_with_amx():
    assert pk.build_info()["isa"] == "amx"
