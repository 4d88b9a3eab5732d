"""Paired comparison of two series of numbers, a pair for each seed: Student's t and the exact sign-flip test."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SIGN_FLIPS_UP_TO = 12  # pairs: 4096 ways to flip signs
_TINY, _TOLERANCE = 1e-300, 1e-15


@dataclass(frozen=True)
class Paired:
    """The mean of the differences, its standard error and two-sided p-values. None: too few pairs to tell."""

    pairs: int
    mean: float
    error: float | None
    p_t: float | None
    p_signs: float | None

    def __str__(self) -> str:
        if self.error is None:
            return f"{self.mean:+.2f}"
        p = "" if self.p_t is None else f", p {self.p_t:.2g}"
        return f"{self.mean:+.2f} ± {self.error:.2f}{p}"


def paired(differences: Sequence[float]) -> Paired | None:
    """Asks whether the mean of differences is 0; None where there are none.

    p_t is Student's paired t. p_signs is the share of all ways to flip signs of the differences whose mean lies at
    least as far from 0: exact, whatever the distribution, but with n pairs never below 2 / 2^n.
    """
    n = len(differences)
    if n == 0:
        return None
    mean = statistics.mean(differences)
    if n == 1:
        return Paired(1, mean, None, None, None)
    error = statistics.stdev(differences) / math.sqrt(n)
    if error:
        p_t = student_p(mean / error, n - 1)
    else:
        p_t = 0.0 if mean else 1.0
    return Paired(n, mean, error, p_t, sign_flip_p(differences) if n <= SIGN_FLIPS_UP_TO else None)


def sign_flip_p(differences: Sequence[float]) -> float:
    """The share of all 2^n sign flips whose sum is at least as far from 0."""
    bound = abs(sum(differences)) - 1e-9 * sum(map(abs, differences))  # equal sums differ by rounding
    sums = (sum(flip) for flip in itertools.product(*((d, -d) for d in differences)))
    return sum(abs(s) >= bound for s in sums) / 2 ** len(differences)


def student_p(t: float, freedom: float) -> float:
    """The two-sided p-value of Student's t: P(|T| >= |t|) with so many degrees of freedom."""
    return incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (Lentz's way)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side
        return 1 - incomplete_beta(b, a, 1 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    c, d = 1.0, 1 / _nonzero(1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / _nonzero(1 + term * d)
            c = _nonzero(1 + term / c)
            fraction *= c * d
        if abs(c * d - 1) < _TOLERANCE:
            break
    return math.exp(log_front) * fraction / a


def _nonzero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
