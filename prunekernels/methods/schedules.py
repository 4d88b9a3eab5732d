"""Schedules: shares and factors by epoch, as functions (final, epoch, epochs) -> float.

Below, t is the epoch, counted from 0, and T the number of epochs. A value belongs to the end of its epoch; epoch -1 is
the pruning before the first one. Options are keywords: give a method functools.partial(asymptotic, share=0.25).
"""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float, int, int], float]


def constant(final: float, epoch: int, epochs: int) -> float:
    """Returns final in every epoch.

    Args:
        final: The value that is reached at the end.
        epoch: The epoch that ends, from 0; -1 before the first.
        epochs: How many epochs prune.

    Examples:
        >>> [round(pk.methods.schedules.constant(0.5, t, 4), 3) for t in range(4)]
        [0.5, 0.5, 0.5, 0.5]
    """
    return final


def linear(final: float, epoch: int, epochs: int) -> float:
    """Rises linearly: final (t + 1) / T.

    Args:
        final: The value that is reached at the end.
        epoch: The epoch that ends, from 0; -1 before the first.
        epochs: How many epochs prune.

    Examples:
        >>> [round(pk.methods.schedules.linear(0.5, t, 4), 3) for t in range(4)]
        [0.125, 0.25, 0.375, 0.5]
    """
    return final * _passed(epoch, epochs)


def cubic(final: float, epoch: int, epochs: int, *, full_from: float = 1.0) -> float:
    """Rises fast, then slower: final (1 - (1 - (t + 1) / T)^3).

    Args:
        final: The value that is reached at the end.
        epoch: The epoch that ends, from 0; -1 before the first.
        epochs: How many epochs prune.
        full_from: From this share of the epochs on the value is final.

    Examples:
        >>> [round(pk.methods.schedules.cubic(0.5, t, 4), 3) for t in range(4)]
        [0.289, 0.438, 0.492, 0.5]
    """
    if epoch >= full_from * epochs:
        return final
    return final * (1 - (1 - _passed(epoch, epochs)) ** 3)


def asymptotic(
    final: float, epoch: int, epochs: int, *, share: float = 3 / 4, at: float = 1 / 8, full_from: float = 1.0
) -> float:
    """Rises as in ASFP: a e^(-k t) + b through (0, 0), (at T, share final) and (T, final); final in the last epoch.

    Sources disagree on share: 3/4 in most public code, 1/4 in PGP's baseline.

    Args:
        final: The value that is reached at the end.
        epoch: The epoch that ends, from 0; -1 before the first.
        epochs: How many epochs prune.
        share: The share of final that is reached at `at`.
        at: A share of the epochs.
        full_from: From this share of the epochs on the value is final.

    Examples:
        >>> [round(pk.methods.schedules.asymptotic(0.5, t, 4), 3) for t in range(4)]
        [0.0, 0.469, 0.498, 0.5]
    """
    if epoch >= min(full_from * epochs, epochs - 1):
        return final
    k = _rate_of_rise(share, at)
    return final * math.expm1(-k * _clamped(epoch, epochs)) / math.expm1(-k)


def exponential(
    final: float, epoch: int, epochs: int, *, share: float = 3 / 4, at: float = 1 / 8, full_from: float = 0.9
) -> float:
    """Rises as ASFP's public code has it: final (1 - e^(-k t)), share final at at T; final in the last epoch.

    Args:
        final: The value that is reached at the end.
        epoch: The epoch that ends, from 0; -1 before the first.
        epochs: How many epochs prune.
        share: The share of final that is reached at `at`.
        at: A share of the epochs.
        full_from: From this share of the epochs on the value is final.

    Examples:
        >>> [round(pk.methods.schedules.exponential(0.5, t, 4), 3) for t in range(4)]
        [0.0, 0.469, 0.498, 0.5]
    """
    if epoch >= min(full_from * epochs, epochs - 1):
        return final
    return final * -math.expm1(math.log1p(-share) / at * _clamped(epoch, epochs))


def decay(start: float, epoch: int, epochs: int, *, end: float = 1e-5, zero_from: float = 0.9) -> float:
    """Falls as SRFP's factor for pruned filters: start e^(-a t), which would be end at T; 0 from zero_from T on.

    Args:
        start: The value at epoch 0.
        epoch: The epoch that ends, from 0; -1 before the first.
        epochs: How many epochs prune.
        end: The value that is aimed at.
        zero_from: From this share of the epochs on the value is 0.

    Examples:
        >>> [round(pk.methods.schedules.decay(0.5, t, 4), 3) for t in range(4)]
        [0.5, 0.033, 0.002, 0.0]
    """
    if start == 0 or epoch >= zero_from * epochs:
        return 0.0
    return start * math.exp(math.log(end / (start + 0.01 * end)) * _clamped(epoch, epochs))


def progressive(final: float, epoch: int, epochs: int, *, off_by_one: bool = False) -> float:
    """Rises as in PGP: 1 - (1 - final)^((t + 1) / T), where each epoch prunes the same share of what is left.

    Args:
        final: The value that is reached at the end.
        epoch: The epoch that ends, from 0; -1 before the first.
        epochs: How many epochs prune.
        off_by_one: Whether the exponent is the released code's, (t + 2) / T, which ends above final.

    Examples:
        >>> [round(pk.methods.schedules.progressive(0.5, t, 4), 3) for t in range(4)]
        [0.159, 0.293, 0.405, 0.5]
    """
    passed = (min(epoch, epochs - 1) + 1 + off_by_one) / epochs
    return final if passed == 1 else 1 - (1 - final) ** max(0.0, passed)


def _clamped(epoch: int, epochs: int) -> float:
    """t / T in [0, 1]."""
    return min(max(epoch, 0), epochs) / epochs


def _passed(epoch: int, epochs: int) -> float:
    """The share of the epochs that is over at the end of this one: (t + 1) / T in [0, 1]."""
    return min(max(epoch + 1, 0), epochs) / epochs


def _rate_of_rise(share: float, at: float) -> float:
    """Finds k > 0 with (1 - e^(-k at)) / (1 - e^-k) = share, by bisection."""
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
