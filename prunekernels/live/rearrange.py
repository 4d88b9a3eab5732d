"""Views that bring the channels of a live tensor to another dimension, or to several, and back."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .channel_ops import reorder
from .moved import Axes, MovedTensor, alias, moved
from .tensor import LiveTensor, wrap


def source_of(x: LiveTensor) -> tuple[LiveTensor, Axes]:
    """The live tensor [A, C, *B] that x is a rearrangement of, and how it is rearranged."""
    return (x.source, x.axes) if isinstance(x, MovedTensor) else (x, Axes((x.live.channels,), (1,)))


def permuted(x: LiveTensor, dims: Sequence[int]) -> Tensor:
    """x.permute(dims). dims: none of them negative."""
    source, axes = source_of(x)
    if source.live.full:
        return x.to_dense_().permute(*dims)
    rank = len(dims)
    new_axes = Axes(axes.split, tuple(dims.index(place) for place in axes.places))
    rest = axes.rest(rank)
    order = [rest.index(dims[dim]) for dim in new_axes.rest(rank)]
    if order == sorted(order):
        return moved(alias(source), new_axes)
    first, *behind = (i + 1 if i else 0 for i in order)
    dims = (first, 1, *behind)
    view = source.view_of(source.compact.permute(dims), source.live, lambda dense: dense.permute(dims))
    return moved(view, new_axes)


def reshaped(x: LiveTensor, shape: Sequence[int], copies: bool) -> Any:
    """x.view(shape), or x.reshape(shape) if it may copy; NotImplemented where that is no rearrangement of x.

    shape: without -1.
    """
    source, axes = source_of(x)
    if source.live.full:
        return x.to_dense_().reshape(shape) if copies else x.to_dense_().view(shape)
    target = _target(axes, tuple(x.shape), tuple(shape))
    if target is None or (target.order and not copies):
        return NotImplemented
    if target.order:
        compact, live = reorder(source.compact, source.live, axes.split, target.order)
        source = _live(wrap(compact, live, source.fill))
        axes = Axes(tuple(axes.split[i] for i in target.order), target.axes.places)
    size = (source.shape[0], *source.shape[2:])
    if size == target.rest:
        return moved(source if target.order else alias(source), target.axes)
    try:
        made = _resized(source.compact, target.rest, source.live.count)
    except RuntimeError:  # the memory does not allow it
        return (
            moved(wrap(_copied(source.compact, target.rest), source.live, source.fill), target.axes)
            if copies
            else (NotImplemented)
        )
    channels = source.live.channels
    return moved(source.view_of(made, source.live, lambda dense: _resized(dense, target.rest, channels)), target.axes)


def _live(x: Tensor) -> LiveTensor:
    assert isinstance(x, LiveTensor)
    return x


def _resized(x: Tensor, rest: tuple[int, ...], channels: int) -> Tensor:
    """A view of x [A, channels, *B] with other dimensions beside that of the channels."""
    if rest[0] == x.shape[0]:
        return x.view(rest[0], channels, *rest[1:])
    return x.movedim(1, -1).view(*rest, channels).movedim(-1, 1)


def _copied(x: Tensor, rest: tuple[int, ...]) -> Tensor:
    return x.movedim(1, -1).reshape(*rest, x.shape[1]).movedim(-1, 1)


class _Target(NamedTuple):
    axes: Axes
    rest: tuple[int, ...]  # the sizes of the dimensions without channels
    order: tuple[int, ...] | None  # of the old factors: the channels have to be permuted first


@functools.lru_cache(maxsize=1024)
def _target(axes: Axes, old: tuple[int, ...], new: tuple[int, ...]) -> _Target | None:
    """What a rearranged tensor of shape `old` is in shape `new`; None where channels and other dimensions mix."""
    groups = _matched(old, new)
    if groups is None or math.prod(axes.split) == 1:
        return None
    found: list[tuple[list[int], list[int]]] = []  # factors, and the new dimensions that they become
    for before, after in groups:
        factors = [axes.places.index(dim) for dim in before if dim in axes.places]
        if factors and len(factors) < len(before):
            return None
        if factors:
            found.append((factors, after))
    kept = all(factors == list(range(factors[0], factors[-1] + 1)) for factors, _ in found)
    order = None if kept else tuple(factor for factors, _ in found for factor in factors)
    if kept:
        found.sort()
    places = tuple(dim for _, after in found for dim in after)
    rest = tuple(size for dim, size in enumerate(new) if dim not in places)
    return _Target(Axes(tuple(new[dim] for dim in places), places), rest, order) if rest else None


def _matched(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]] | None:
    """Neighbouring dimensions of one shape and those of the other that hold the same elements, dimensions of size 1
    left out.
    """
    if math.prod(old) != math.prod(new) or not math.prod(old):
        return None
    befores, afters = ([dim for dim, size in enumerate(shape) if size != 1] for shape in (old, new))
    groups = []
    while befores:
        before, after = [befores.pop(0)], [afters.pop(0)]
        while (have := math.prod(old[dim] for dim in before)) != (want := math.prod(new[dim] for dim in after)):
            if have < want:
                before.append(befores.pop(0))
            else:
                after.append(afters.pop(0))
        groups.append((before, after))
    return groups
