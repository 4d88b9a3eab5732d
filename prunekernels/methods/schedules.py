"""Schedules: shares and factors by epoch, as functions (final, epoch, epochs) -> float. Epochs count from 0.

A value belongs to the end of its epoch; epoch -1 is the pruning before the first one. Options are keywords: give a
method functools.partial(asymptotic, share=0.25).
"""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float, int, int], float]


def constant(final: float, epoch: int, epochs: int) -> float:
    """final, always."""
    return final


def linear(final: float, epoch: int, epochs: int) -> float:
    """final (t + 1) / T."""
    return final * _passed(epoch, epochs)


def cubic(final: float, epoch: int, epochs: int, *, full_from: float = 1.0) -> float:
    """final (1 - (1 - (t + 1) / T)^3); final itself from full_from T on."""
    if epoch >= full_from * epochs:
        return final
    return final * (1 - (1 - _passed(epoch, epochs)) ** 3)


def asymptotic(
    final: float, epoch: int, epochs: int, *, share: float = 3 / 4, at: float = 1 / 8, full_from: float = 1.0
) -> float:
    """ASFP's a e^(-k t) + b through (0, 0), (at T, share final) and (T, final); final itself from full_from T on and in
    the last epoch.

    Sources disagree on share: 3/4 in most public code, 1/4 in PGP's baseline.
    """
    if epoch >= min(full_from * epochs, epochs - 1):
        return final
    k = _rate_of_rise(share, at)
    return final * math.expm1(-k * _clamped(epoch, epochs)) / math.expm1(-k)


def exponential(
    final: float, epoch: int, epochs: int, *, share: float = 3 / 4, at: float = 1 / 8, full_from: float = 0.9
) -> float:
    """final (1 - e^(-k t)), which is share final at at T; final itself from full_from T on and in the last epoch.

    asymptotic as code has it.
    """
    if epoch >= min(full_from * epochs, epochs - 1):
        return final
    return final * -math.expm1(math.log1p(-share) / at * _clamped(epoch, epochs))


def decay(start: float, epoch: int, epochs: int, *, end: float = 1e-5, zero_from: float = 0.9) -> float:
    """start e^(-a t), which would be end at T; 0 from zero_from T on. What SRFP leaves of a pruned filter."""
    if start == 0 or epoch >= zero_from * epochs:
        return 0.0
    return start * math.exp(math.log(end / (start + 0.01 * end)) * _clamped(epoch, epochs))


def progressive(final: float, epoch: int, epochs: int, *, off_by_one: bool = False) -> float:
    """PGP's 1 - (1 - final)^((t + 1) / T): each epoch prunes the same share of what is left.

    off_by_one: the exponent of the released code, one epoch ahead, which ends at more than final.
    """
    passed = (min(epoch, epochs - 1) + 1 + off_by_one) / epochs
    return final if passed == 1 else 1 - (1 - final) ** max(0.0, passed)


def _clamped(epoch: int, epochs: int) -> float:
    """t / T in [0, 1]."""
    return min(max(epoch, 0), epochs) / epochs


def _passed(epoch: int, epochs: int) -> float:
    """The share of the epochs that is over at the end of this one."""
    return min(max(epoch + 1, 0), epochs) / epochs


def _rate_of_rise(share: float, at: float) -> float:
    """k > 0 with (1 - e^(-k at)) / (1 - e^-k) = share, by bisection."""
    if not 0 < at < share < 1:
        raise ValueError(f"asymptotic: share: expected between at = {at} and 1, got {share}")
    low, high = 0.0, 1.0
    while math.expm1(-high * at) / math.expm1(-high) < share:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        if math.expm1(-middle * at) / math.expm1(-middle) < share:
            low = middle
        else:
            high = middle
    return high
