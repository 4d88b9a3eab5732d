"""Means over rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any


def geomean(rows: Iterable[Any], ratio: Callable[[Any], float | None]) -> float | None:
    """Geometric mean of ratio(row), weighted by row.times, over the rows that have the ratio; None if no row has it."""
    pairs = [(row.times, value) for row in rows if (value := ratio(row)) is not None]
    total = sum(times for times, _ in pairs)
    return math.exp(sum(times * math.log(value) for times, value in pairs) / total) if total else None
