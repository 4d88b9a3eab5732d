"""Where the channels of a value lie: each dimension as a product of factors, of which some count channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Factor(NamedTuple):
    """A part of a dimension, like one size of a nested loop."""

    size: int
    stride: int  # between entries of the value that was moved, in its own order
    step: int  # between channels; 0: it counts none
    is_free: bool = False  # any size: what it was in the example does not say how it divides


Layout = list[list[Factor]]  # of each dimension, the outermost factor first


def layout_of(sizes: Sequence[int], axis: int, free: Sequence[bool]) -> Layout:
    """The layout of a value whose channels are the entries of one dimension. free: which dimensions may be any size."""
    strides = [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]
    dims = enumerate(zip(sizes, strides, free, strict=True))
    return [[Factor(size, stride, int(dim == axis), is_free)] for dim, (size, stride, is_free) in dims]


def regroup(layout: Layout, sizes: Sequence[int], free: Sequence[bool] | None = None) -> Layout | None:
    """What a view of other sizes makes of a layout; None if it cuts a dimension into unequal parts.

    free: which of the sizes may be others; None: it is known that a cut fits all sizes. A free dimension may be cut
    where it counts no channels, into parts that are free too: what is left of the sizes is then equal for all of them.
    """
    waiting = [factor for dim in layout for factor in dim if factor.size > 1 or factor.step]
    result: Layout = []
    for size in sizes:
        factors: list[Factor] = []
        while size > 1:
            if not waiting:
                return None
            first = waiting.pop(0)
            if size % first.size == 0:
                factors.append(first)
                size //= first.size
            elif first.size % size == 0 and not (free and first.is_free and first.step):
                inner = first.size // size
                factors.append(first._replace(size=size, stride=first.stride * inner, step=first.step * inner))
                waiting.insert(0, first._replace(size=inner))
                size = 1
            else:
                return None
        result.append(factors)
    has_free = [any(factor.is_free for factor in factors) for factors in result]
    return None if waiting or (free and has_free != list(free)) else result


def axes_of(layout: Layout) -> list[int]:
    """The dimensions that count channels."""
    return [dim for dim, factors in enumerate(layout) if any(factor.step for factor in factors)]


def positions(factors: Sequence[Factor]) -> Tensor:
    """Along a dimension, int64 [size], the channel of each entry, as far as this dimension decides."""
    at = torch.zeros(1, dtype=torch.long)
    for factor in factors:
        at = (at[:, None] + torch.arange(factor.size) * factor.step).flatten()
    return at


def channels_along(layout: Layout, axis: int) -> Tensor:
    """Of each entry along one of the axes, int64 [size, n]: the channels that lie there, along the other axes."""
    others = torch.zeros(1, dtype=torch.long)
    for dim in axes_of(layout):
        if dim != axis:
            others = (others[:, None] + positions(layout[dim]).unique()).flatten()
    return positions(layout[axis])[:, None] + others
