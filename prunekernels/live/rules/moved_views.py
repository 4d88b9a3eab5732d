"""Rules of views of rearranged live tensors: shapes, slices, splits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..moved import Axes, MovedTensor, moved
from ..rearrange import reshaped
from .pointwise import rule
from .reshape import argument, known_shape, numbers_of, spelled_out


def _reshaped(x: Any, shape: list[int] | None, copies: bool) -> Any:
    shape = known_shape(x, shape) if shape is not None and isinstance(x, MovedTensor) else None
    return NotImplemented if shape is None else reshaped(x, shape, copies)


@rule(Tensor.view, Tensor.reshape, torch.reshape, zero=False, moved=True)
def _view(func: Any, args: Any, kwargs: Any) -> Any:
    shape = numbers_of(args, kwargs, "size" if func is Tensor.view else "shape")
    return _reshaped(args[0], shape, func is not Tensor.view)


@rule(Tensor.view_as, Tensor.reshape_as, zero=False, moved=True)
def _view_as(func: Any, args: Any, kwargs: Any) -> Any:
    x, shape = args[0], list(argument(args, kwargs, 1, "other").shape)
    if not isinstance(x, MovedTensor):
        return x.view(shape) if func is Tensor.view_as else x.reshape(shape)
    return _reshaped(x, shape, func is Tensor.reshape_as)


@rule(torch.flatten, Tensor.flatten, zero=False, moved=True)
def _flatten(func: Any, args: Any, kwargs: Any) -> Any:
    x, start, end = args[0], argument(args, kwargs, 1, "start_dim", 0), argument(args, kwargs, 2, "end_dim", -1)
    rank, shape = x.dim(), list(x.shape)
    if not all(isinstance(dim, int) and -rank <= dim < rank for dim in (start, end)) or end % rank < start % rank:
        return NotImplemented
    start, end = start % rank, end % rank
    return _reshaped(x, [*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]], True)


@rule(torch.unflatten, Tensor.unflatten, filled=True, moved=True)
def _unflatten(func: Any, args: Any, kwargs: Any) -> Any:
    x, dim, sizes = args[0], argument(args, kwargs, 1, "dim"), argument(args, kwargs, 2, "sizes")
    rank, shape = x.dim(), list(x.shape)
    if not isinstance(dim, int) or not -rank <= dim < rank or not isinstance(sizes, (list, tuple)):
        return NotImplemented
    dim %= rank
    parts = list(sizes)
    if parts.count(-1) == 1 and (rest := -math.prod(parts)) > 0:
        parts = [shape[dim] // rest if size == -1 else size for size in parts]
    if not all(isinstance(size, int) for size in parts) or math.prod(parts) != shape[dim]:
        return NotImplemented
    return x.view([*shape[:dim], *parts, *shape[dim + 1 :]])


@rule(torch.squeeze, Tensor.squeeze, zero=False, moved=True)
def _squeeze(func: Any, args: Any, kwargs: Any) -> Any:
    x, dims = args[0], argument(args, kwargs, 1, "dim")
    shape = list(x.shape)
    dims = range(len(shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    if any(not -len(shape) <= d < len(shape) for d in dims):
        return NotImplemented
    ones = {d % len(shape) for d in dims if shape[d] == 1}
    return _reshaped(x, [size for d, size in enumerate(shape) if d not in ones], False)


@rule(torch.unsqueeze, Tensor.unsqueeze, zero=False, moved=True)
def _unsqueeze(func: Any, args: Any, kwargs: Any) -> Any:
    x, dim = args[0], argument(args, kwargs, 1, "dim")
    rank, shape = x.dim() + 1, list(x.shape)
    if not isinstance(dim, int) or not -rank <= dim < rank:
        return NotImplemented
    shape.insert(dim % rank, 1)
    return _reshaped(x, shape, False)


@rule(Tensor.expand, zero=False, moved=True)
def _expand(func: Any, args: Any, kwargs: Any) -> Any:
    sizes, x = numbers_of(args, kwargs, "size"), args[0]
    if sizes is None or len(sizes) != x.dim():
        return NotImplemented
    axes, shape = x.axes, x.shape
    if any(sizes[place] not in (-1, shape[place]) for place in axes.places):
        return NotImplemented
    first, *behind = (sizes[dim] for dim in axes.rest(len(sizes)))
    return moved(x.source.expand(first, -1, *behind), axes)


@rule(Tensor.expand_as, zero=False, moved=True)
def _expand_as(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].expand(argument(args, kwargs, 1, "other").shape)


# ---- slices and splits ----------------------------------------------------------------------------------------------


def _along(x: MovedTensor, dim: Any) -> int | None:
    """The dimension of the source tensor that is this one of x; None where there is none."""
    if not isinstance(dim, int) or not -x.dim() <= dim < x.dim():
        return None
    return x.axes.source_dim(dim % x.dim())


def _sliced(x: MovedTensor, part: Tensor, source_dim: int) -> Tensor:
    """A slice of the source tensor along a dimension of it, rearranged as x is."""
    return moved(part, x.axes if source_dim != 1 else Axes((part.shape[1],), x.axes.places))


@rule(torch.narrow, Tensor.narrow, zero=False, moved=True)
def _narrow(func: Any, args: Any, kwargs: Any) -> Any:
    if len(args) != 4 or not all(isinstance(v, int) for v in args[1:]):
        return NotImplemented
    x, dim, start, length = args
    source_dim = _along(x, dim)
    return NotImplemented if source_dim is None else _sliced(x, x.source.narrow(source_dim, start, length), source_dim)


@rule(torch.chunk, Tensor.chunk, torch.split, Tensor.split, zero=False, moved=True)
def _split(func: Any, args: Any, kwargs: Any) -> Any:
    x, dim = args[0], argument(args, kwargs, 2, "dim", 0)
    names = ("chunks", "split_size_or_sections", "split_size")
    size = args[1] if len(args) > 1 else next((kwargs[name] for name in names if name in kwargs), None)
    source_dim = _along(x, dim)
    if source_dim is None or size is None:
        return NotImplemented
    cut = torch.chunk if func.__name__ == "chunk" else torch.split
    return tuple(_sliced(x, part, source_dim) for part in cut(x.source, size, source_dim))


@rule(torch.select, Tensor.select, zero=False, moved=True)
def _select(func: Any, args: Any, kwargs: Any) -> Any:
    x, dim, index = args[0], argument(args, kwargs, 1, "dim"), argument(args, kwargs, 2, "index")
    rank = x.dim()
    if not all(isinstance(value, int) for value in (dim, index)) or not -rank <= dim < rank:
        return NotImplemented
    return _selected(x, dim % rank, index)


def _selected(x: MovedTensor, dim: int, index: int) -> Any:
    """One entry along the slowest of several dimensions with channels, or along one without."""
    axes, size = x.axes, x.shape[dim]
    if not -size <= index < size:
        return NotImplemented
    index %= size
    places = tuple(place - (place > dim) for place in axes.places if place != dim)
    if dim not in axes.places:
        source_dim = axes.source_dim(dim)
        if not source_dim:
            return NotImplemented
        return moved(x.source[(slice(None),) * source_dim + (index,)], Axes(axes.split, places))
    if len(axes.split) == 1 or axes.places[0] != dim:
        return NotImplemented
    rest = math.prod(axes.split[1:])
    return moved(x.source.narrow(1, index * rest, rest), Axes(axes.split[1:], places))


@rule(torch.unbind, Tensor.unbind, zero=False, moved=True)
def _unbind(func: Any, args: Any, kwargs: Any) -> Any:
    x, dim = args[0], argument(args, kwargs, 1, "dim", 0)
    if not isinstance(dim, int) or not -x.dim() <= dim < x.dim():
        return NotImplemented
    dim %= x.dim()
    if dim in x.axes.places and (len(x.axes.split) == 1 or x.axes.places[0] != dim):
        return NotImplemented
    parts = [_selected(x, dim, index) for index in range(x.shape[dim])]
    return NotImplemented if any(part is NotImplemented for part in parts) else tuple(parts)


@rule(Tensor.__getitem__, zero=False, moved=True)
def _getitem(func: Any, args: Any, kwargs: Any) -> Any:
    """Slices, numbers and new dimensions, one after another."""
    x, index = args
    if not isinstance(x, MovedTensor):
        return NotImplemented
    parts = spelled_out(list(index) if isinstance(index, tuple) else [index], x.dim())
    if any(part is not None and type(part) not in (slice, int) for part in parts):
        return NotImplemented
    return _taken(x, parts)


def _taken(x: MovedTensor, parts: Sequence[Any]) -> Any:
    """x[parts]. parts: one slice or number for each dimension, and None for new ones."""
    axes, shape = x.axes, x.shape
    for dim, part in enumerate(part for part in parts if part is not None):
        here = axes.source_dim(dim)
        if isinstance(part, int):
            slowest = len(axes.split) > 1 and axes.places[0] == dim
            if not (here and here > 1) and not slowest:
                return NotImplemented
        elif part != slice(None) and (here is None or part.indices(shape[dim])[2] != 1):
            return NotImplemented
    y: Tensor = x
    dim = 0  # of y
    for part in parts:
        if part is None:
            y = y.unsqueeze(dim)
        elif isinstance(part, int):
            y = y.select(dim, part)
            continue
        elif part != slice(None):
            start, stop, _ = part.indices(y.shape[dim])
            y = y.narrow(dim, start, max(0, stop - start))
        dim += 1
    return y.view_as(y) if y is x else y
