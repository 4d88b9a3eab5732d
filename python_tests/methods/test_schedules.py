"""Values by epoch, against tables and the equations they come from."""

import math
from functools import partial

import pytest

from prunekernels.methods import schedules as s

# T = 200, rate 0.4, alpha from 1 to 1e-5: hard share, alpha, cubic and exponential pruned share
TABLE = {
    10: (0.156, 0.562, 0.062, 0.170),
    25: (0.342, 0.237, 0.137, 0.300),
    50: (0.587, 0.056, 0.235, 0.375),
    100: (0.879, 3.2e-3, 0.352, 0.398),
    150: (0.985, 1.8e-4, 0.394, 0.400),
}


@pytest.mark.parametrize("epoch", TABLE)
def test_table(epoch):
    got = s.cubic(1.0, epoch, 200), s.decay(1.0, epoch, 200), s.cubic(0.4, epoch, 200), s.exponential(0.4, epoch, 200)
    assert got == pytest.approx(TABLE[epoch], rel=0.02, abs=5e-4)


@pytest.mark.parametrize(
    ("share", "epoch", "expected"),
    [(3 / 4, 25, 0.30), (3 / 4, 50, 0.375), (1 / 4, 25, 0.10), (1 / 4, 50, 0.179), (1 / 4, 100, 0.289)],
)
def test_asymptotic(share, epoch, expected):
    assert s.asymptotic(0.4, epoch, 200, share=share) == pytest.approx(expected, abs=5e-4)


def test_asymptotic_is_full_early_if_asked():
    shares = [s.asymptotic(0.4, epoch, 20, full_from=0.9) for epoch in range(20)]
    assert shares[18:] == [0.4, 0.4] and shares[17] == s.asymptotic(0.4, 17, 20) < 0.4


def test_asymptotic_quarter_has_the_known_constant():
    k = s._rate_of_rise(1 / 4, 1 / 8)
    assert math.exp(-k) == pytest.approx(0.1467, abs=5e-5)


@pytest.mark.parametrize(("epochs", "left"), [(10, 0.467), (200, 0.498)])
def test_progressive_off_by_one(epochs, left):
    assert 1 - s.progressive(0.5, epochs - 1, epochs, off_by_one=True) == pytest.approx(left, abs=5e-4)


@pytest.mark.parametrize("off_by_one", [False, True])
@pytest.mark.parametrize("epoch", [0, 3, 8, 9])
def test_progressive_is_the_released_formula(epoch, off_by_one):
    C0, P, E = 64, 0.7, 10
    rate = (math.log(C0) - math.log(C0 * (1 - P))) / E
    remain = C0 * math.exp(-rate * (epoch + 1 + off_by_one))  # epochs from 1
    assert C0 * (1 - s.progressive(P, epoch, E, off_by_one=off_by_one)) == pytest.approx(remain)


RISING = {
    "linear": s.linear,
    "cubic": s.cubic,
    "asymptotic": s.asymptotic,
    "quarter": partial(s.asymptotic, share=1 / 4),
    "exponential": s.exponential,
    "progressive": s.progressive,
}


@pytest.mark.parametrize("epochs", [1, 2, 7, 200])
@pytest.mark.parametrize("name", RISING)
def test_rises_from_nothing_to_exactly_final(name, epochs):
    values = [RISING[name](0.7, epoch, epochs) for epoch in range(-1, epochs + 2)]
    assert values == sorted(values) or max(a - b for a, b in zip(values, values[1:], strict=False)) < 1e-12
    assert values[0] == 0 and values[epochs] == values[-1] == 0.7


def test_forced_values():
    assert s.cubic(0.4, 190, 200, full_from=0.95) == 0.4 != s.cubic(0.4, 189, 200, full_from=0.95)
    assert s.exponential(0.4, 180, 200) == 0.4 != s.exponential(0.4, 179, 200)
    assert s.decay(1.0, 179, 200) > 0 == s.decay(1.0, 180, 200)
    assert s.decay(1.0, 200, 200, zero_from=2) == pytest.approx(1e-5, rel=1e-6)
    assert s.decay(0.0, 3, 200) == 0 and s.decay(0.5, -1, 200) == s.decay(0.5, 0, 200) == 0.5


def test_constant():
    assert s.constant(0.4, -1, 200) == s.constant(0.4, 3, 200) == 0.4


def test_share_must_lie_between():
    with pytest.raises(ValueError, match=r"asymptotic: share: expected between at = 0.125 and 1, got 0.1"):
        s.asymptotic(0.5, 3, 10, share=0.1)
