"""Rules of what cuts, joins and renames dimensions, as long as channels stay dimension 1."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .live import LiveTensor, wrap
from .rules import rule


def _argument(args: Any, kwargs: Any, position: int, name: str, default: Any) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


def _sizes(args: Any, kwargs: Any, name: str) -> list[int] | None:
    """The sizes of view, reshape: given one by one or as one sequence."""
    given = args[1:] if len(args) > 1 else (kwargs.get(name),)
    sizes = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
    return list(sizes) if all(isinstance(size, int) for size in sizes) else None


def _reshaped(x: LiveTensor, shape: list[int]) -> Any:
    """x in another full-width shape, where its channels stay dimension 1 or spread into columns there."""
    if shape.count(-1) == 1:
        known = -math.prod(shape)
        if known <= 0 or x.numel() % known:
            return NotImplemented
        shape = [x.numel() // known if size == -1 else size for size in shape]
    N, C, *behind = x.shape
    pixels = math.prod(behind)
    if len(shape) < 2 or shape[0] != N or math.prod(shape) != x.numel():
        return NotImplemented
    if shape[1] == C:
        return wrap(x.compact.reshape(N, x.live.count, *shape[2:]), x.live)
    if len(shape) == 2:
        return wrap(x.compact.reshape(N, x.live.count * pixels), x.live.spread(pixels))
    return NotImplemented


@rule(Tensor.view, Tensor.reshape, torch.reshape)
def _view(func: Any, args: Any, kwargs: Any) -> Any:
    shape = _sizes(args, kwargs, "size" if func is Tensor.view else "shape")
    return NotImplemented if shape is None or type(args[0]) is not LiveTensor else _reshaped(args[0], shape)


@rule(torch.flatten, Tensor.flatten)
def _flatten(func: Any, args: Any, kwargs: Any) -> Any:
    x, start, end = args[0], _argument(args, kwargs, 1, "start_dim", 0), _argument(args, kwargs, 2, "end_dim", -1)
    if not (isinstance(start, int) and isinstance(end, int)):
        return NotImplemented
    rank, shape = x.dim(), list(x.shape)
    start, end = start % rank, end % rank
    if start < 1 or end < start:
        return NotImplemented
    return _reshaped(x, [*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]])


@rule(torch.squeeze, Tensor.squeeze)
def _squeeze(func: Any, args: Any, kwargs: Any) -> Any:
    x, dims = args[0], _argument(args, kwargs, 1, "dim", None)
    shape = list(x.shape)
    dims = range(len(shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    ones = {d % len(shape) for d in dims if shape[d] == 1}
    if ones & {0, 1}:
        return NotImplemented
    return _reshaped(x, [size for d, size in enumerate(shape) if d not in ones])


@rule(torch.unsqueeze, Tensor.unsqueeze)
def _unsqueeze(func: Any, args: Any, kwargs: Any) -> Any:
    x, dim = args[0], _argument(args, kwargs, 1, "dim", 0) % (args[0].dim() + 1)
    return wrap(x.compact.unsqueeze(dim), x.live) if dim >= 2 else NotImplemented


@rule(F.pad)
def _pad(func: Any, args: Any, kwargs: Any) -> Any:
    """Zeros around space move nothing; dead channels put around (a shortcut to more filters) move the list alone."""
    x, pad = args[0], list(_argument(args, kwargs, 1, "pad", ()))
    mode, value = _argument(args, kwargs, 2, "mode", "constant"), _argument(args, kwargs, 3, "value", None)
    behind = 2 * (x.dim() - 2)
    if mode != "constant":
        return wrap(func(x.compact, pad, mode, value), x.live) if len(pad) <= behind else NotImplemented
    before, after = (pad + [0] * (behind + 2))[behind : behind + 2]
    if value not in (None, 0) or len(pad) > behind + 2 or min(before, after) < 0:
        return NotImplemented
    space = pad[:behind]
    compact = F.pad(x.compact, space) if any(space) else x.compact
    return wrap(compact, x.live.pad(before, after))


def _channels(x: LiveTensor, start: int, stop: int) -> Tensor:
    live, first, count = x.live.slice(start, stop)
    return wrap(x.compact.narrow(1, first, count), live)


@rule(torch.narrow, Tensor.narrow)
def _narrow(func: Any, args: Any, kwargs: Any) -> Any:
    if len(args) != 4 or not all(isinstance(v, int) for v in args[1:]):
        return NotImplemented
    x, dim, start, length = args
    dim %= x.dim()
    if dim != 1:
        return wrap(x.compact.narrow(dim, start, length), x.live)
    start %= x.live.channels
    return _channels(x, start, start + length) if start + length <= x.live.channels else NotImplemented


@rule(torch.chunk, Tensor.chunk)
def _chunk(func: Any, args: Any, kwargs: Any) -> Any:
    x, chunks, dim = args[0], _argument(args, kwargs, 1, "chunks", None), _argument(args, kwargs, 2, "dim", 0)
    if not isinstance(chunks, int) or chunks < 1:
        return NotImplemented
    return _split_by(x, max(1, -(-x.shape[dim] // chunks)), dim)


@rule(torch.split, Tensor.split)
def _split(func: Any, args: Any, kwargs: Any) -> Any:
    sizes = args[1] if len(args) > 1 else kwargs.get("split_size_or_sections", kwargs.get("split_size"))
    return _split_by(args[0], sizes, _argument(args, kwargs, 2, "dim", 0))


def _split_by(x: LiveTensor, sizes: Any, dim: int) -> Any:
    dim, total = dim % x.dim(), x.shape[dim]
    if isinstance(sizes, int):
        if sizes < 1:
            return NotImplemented
        sizes = [min(sizes, total - start) for start in range(0, max(total, 1), sizes)]
    if not isinstance(sizes, (list, tuple)) or sum(sizes) != total:
        return NotImplemented
    if dim != 1:
        return tuple(wrap(part, x.live) for part in x.compact.split(list(sizes), dim))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(_channels(x, start, start + size) for start, size in zip(starts, sizes, strict=True))


@rule(Tensor.__getitem__)
def _getitem(func: Any, args: Any, kwargs: Any) -> Any:
    """Slices, on any dimension; a list of images. Others would move the channels."""
    x, index = args
    parts = list(index) if isinstance(index, tuple) else [index]
    if isinstance(parts[0], Tensor) and len(parts) == 1:
        return wrap(x.compact[index], x.live) if parts[0].dim() == 1 else NotImplemented
    if any(part is Ellipsis for part in parts):
        at = next(i for i, part in enumerate(parts) if part is Ellipsis)
        parts[at : at + 1] = [slice(None)] * (x.dim() - len(parts) + 1)
    if len(parts) > x.dim() or not all(isinstance(part, slice) for part in parts):
        return NotImplemented
    channels = parts[1] if len(parts) > 1 else slice(None)
    start, stop, step = channels.indices(x.live.channels)
    if step != 1:
        return NotImplemented
    live, first, count = x.live.slice(start, max(start, stop))
    parts[1:2] = [slice(first, first + count)] if len(parts) > 1 else []
    return wrap(x.compact[tuple(parts)], live)
