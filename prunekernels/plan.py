"""Plans: which algorithm serves a layer.

"dense": where-mask, then the vendor's convolution; "compact": gather, convolve the live sizes, scatter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from . import _ext, _table

if TYPE_CHECKING:
    from .masks import ConvMask

PLANS = ("auto", "dense", "compact")
DIRECTIONS = ("forward", "grad_input", "grad_weight")


def _check(plan: str, where: str) -> str:
    if plan not in PLANS:
        raise ValueError(f"{where}: expected one of {', '.join(PLANS)}, got {plan!r}")
    return plan


_current = _check(os.environ.get("PRUNEKERNELS_PLAN") or "auto", "PRUNEKERNELS_PLAN")


def current() -> str:
    """The plan in force: "auto" unless PRUNEKERNELS_PLAN or force() says otherwise."""
    return _current


@contextmanager
def force(plan: str) -> Iterator[None]:
    """Every layer follows this plan inside the with block; a backward pass follows the plan of its forward pass."""
    global _current
    before, _current = _current, _check(plan, "plan.force")
    try:
        yield
    finally:
        _current = before


def choose(
    direction: str,
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    mask: ConvMask | None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> str:
    """The plan a layer of this shape gets, e.g. choose("forward", x.shape, weight.shape, mask) -> "compact"."""
    if direction not in DIRECTIONS:
        raise ValueError(f"plan.choose: direction: expected one of {', '.join(DIRECTIONS)}, got {direction!r}")
    if _current != "auto":
        return _current
    if _ext._C is None or mask is None:
        return "dense"
    N, C, H, W = x_shape
    K, _, R, S = weight_shape
    table = mask.table(K, C, groups)
    P, Q = (
        (size + 2 * padding[i] - dilation[i] * (tap - 1) - 1) // stride[i] + 1
        for i, (size, tap) in enumerate(((H, R), (W, S)))
    )
    header = table[: _table.HEADER_WORDS].tolist()
    return _ext._C.choose_plan(direction, [N, C, H, W, K, R, S, P, Q, groups], header)
