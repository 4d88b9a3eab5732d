"""Rules of views, slices, splits and padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..channel_list import LiveList
from ..moved import MovedTensor
from ..rearrange import permuted, reshaped
from ..tensor import LiveTensor, wrap
from .pointwise import methods, rule


def argument(args: Any, kwargs: Any, position: int, name: str, default: Any = None) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


def replay_of(func: Any, args: Any, kwargs: Any, part: int | None = None) -> Callable[[Tensor], Tensor]:
    """A function that makes the same view (or part of a split) of the full-width tensor."""

    def view(full: Tensor) -> Tensor:
        made = func(full, *args[1:], **kwargs)
        return made if part is None else made[part]

    return view


def numbers_of(args: Any, kwargs: Any, name: str) -> list[int] | None:
    """Sizes or dimensions, given one by one or as one sequence; None for anything else."""
    given = args[1:] if len(args) > 1 else (kwargs.get(name),)
    numbers = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
    return list(numbers) if all(isinstance(number, int) for number in numbers) else None


def known_shape(x: LiveTensor, shape: list[int]) -> list[int] | None:
    """A shape for all elements of x with the size that -1 stands for; None where there is none."""
    if shape.count(-1) == 1:
        known = -math.prod(shape)
        if known <= 0 or x.numel() % known:
            return None
        shape = [x.numel() // known if size == -1 else size for size in shape]
    return shape if min(shape, default=0) >= 0 and math.prod(shape) == x.numel() else None


def _reshaped(x: LiveTensor, shape: list[int], replay: Callable[[Tensor], Tensor], copies: bool = False) -> Any:
    """x in another full-width shape. Its channels stay dimension 1, spread into columns of dimension 1, or go to other
    dimensions (see rearrange.py).
    """
    known = known_shape(x, shape)
    if known is None:
        return NotImplemented
    shape, (N, C, *behind) = known, x.shape
    pixels = math.prod(behind)
    if len(shape) < 2:
        return NotImplemented
    if shape[0] == N and shape[1] == C and math.prod(shape[2:]) == pixels:
        return x.view_of(x.compact.reshape(N, x.live.count, *shape[2:]), x.live, replay)
    if shape == [N, C * pixels]:
        return x.view_of(x.compact.reshape(N, x.live.count * pixels), x.live.spread(pixels), replay)
    return reshaped(x, shape, copies)


@rule(Tensor.view, Tensor.reshape, torch.reshape, filled=True)
def _view(func: Any, args: Any, kwargs: Any) -> Any:
    shape = numbers_of(args, kwargs, "size" if func is Tensor.view else "shape")
    if shape is None or not isinstance(args[0], LiveTensor):
        return NotImplemented
    return _reshaped(args[0], shape, replay_of(func, args, kwargs), func is not Tensor.view)


@rule(Tensor.view_as, Tensor.reshape_as, filled=True)
def _view_as(func: Any, args: Any, kwargs: Any) -> Any:
    x, other = args[0], argument(args, kwargs, 1, "other")
    shape = list(other.shape)
    plain = Tensor.view if func is Tensor.view_as else Tensor.reshape
    if not isinstance(x, LiveTensor):
        return plain(x, shape)
    return _reshaped(x, shape, replay_of(plain, (x, shape), {}), plain is Tensor.reshape)


@rule(torch.flatten, Tensor.flatten, filled=True)
def _flatten(func: Any, args: Any, kwargs: Any) -> Any:
    x, start, end = args[0], argument(args, kwargs, 1, "start_dim", 0), argument(args, kwargs, 2, "end_dim", -1)
    if not (isinstance(start, int) and isinstance(end, int)):
        return NotImplemented
    rank, shape = x.dim(), list(x.shape)
    if not (-rank <= start < rank and -rank <= end < rank):
        return NotImplemented
    start, end = start % rank, end % rank
    if start < 1 or end < start:
        return NotImplemented
    flat = [*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]]
    return _reshaped(x, flat, replay_of(func, args, kwargs), True)


@rule(torch.squeeze, Tensor.squeeze, filled=True)
def _squeeze(func: Any, args: Any, kwargs: Any) -> Any:
    x, dims = args[0], argument(args, kwargs, 1, "dim")
    shape = list(x.shape)
    dims = range(len(shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    if any(not -len(shape) <= d < len(shape) for d in dims):
        return NotImplemented
    ones = {d % len(shape) for d in dims if shape[d] == 1}
    if ones & {0, 1}:
        return NotImplemented
    return _reshaped(x, [size for d, size in enumerate(shape) if d not in ones], replay_of(func, args, kwargs))


@rule(torch.unsqueeze, Tensor.unsqueeze, filled=True)
def _unsqueeze(func: Any, args: Any, kwargs: Any) -> Any:
    x, dim = args[0], argument(args, kwargs, 1, "dim")
    rank = x.dim() + 1
    if not isinstance(dim, int) or not -rank <= dim < rank:
        return NotImplemented
    if dim % rank < 2:
        shape = list(x.shape)
        shape.insert(dim % rank, 1)
        return reshaped(x, shape, False)
    return x.view_of(x.compact.unsqueeze(dim % rank), x.live, replay_of(func, args, kwargs))


@rule(*methods("transpose", "swapaxes", "swapdims"), filled=True, moved=True)
def _transpose(func: Any, args: Any, kwargs: Any) -> Any:
    x, rank = args[0], args[0].dim()
    first, second = argument(args, kwargs, 1, "dim0"), argument(args, kwargs, 2, "dim1")
    if func.__name__.endswith("_") or not all(isinstance(d, int) and -rank <= d < rank for d in (first, second)):
        return NotImplemented
    dims = list(range(rank))
    dims[first], dims[second] = dims[second], dims[first]
    return permuted_view(x, dims)


@rule(torch.permute, Tensor.permute, filled=True, moved=True)
def _permute(func: Any, args: Any, kwargs: Any) -> Any:
    dims, rank = numbers_of(args, kwargs, "dims"), args[0].dim()
    if dims is None or len(dims) != rank or not all(-rank <= d < rank for d in dims):
        return NotImplemented
    dims = [d % rank for d in dims]
    return permuted_view(args[0], dims) if len(set(dims)) == rank else NotImplemented


@rule(*methods("movedim", "moveaxis"), filled=True, moved=True)
def _movedim(func: Any, args: Any, kwargs: Any) -> Any:
    x, rank = args[0], args[0].dim()
    source, target = argument(args, kwargs, 1, "source"), argument(args, kwargs, 2, "destination")
    if not all(isinstance(d, int) and -rank <= d < rank for d in (source, target)):
        return NotImplemented
    dims = [d for d in range(rank) if d != source % rank]
    dims.insert(target % rank, source % rank)
    return permuted_view(x, dims)


def permuted_view(x: LiveTensor, dims: list[int]) -> Tensor:
    """x.permute(dims), as a live tensor of its own class where channels stay dimension 1."""
    if isinstance(x, MovedTensor) or dims[:2] != [0, 1]:
        return permuted(x, dims)
    return x.view_of(x.compact.permute(dims), x.live, lambda dense: dense.permute(dims))


@rule(Tensor.expand, filled=True)
def _expand(func: Any, args: Any, kwargs: Any) -> Any:
    sizes, x = numbers_of(args, kwargs, "size"), args[0]
    if sizes is None or len(sizes) != x.dim() or sizes[1] not in (-1, x.shape[1]):
        return NotImplemented
    sizes = [sizes[0], x.live.count, *sizes[2:]]
    return x.view_of(x.compact.expand(sizes), x.live, replay_of(func, args, kwargs))


@rule(Tensor.expand_as, filled=True)
def _expand_as(func: Any, args: Any, kwargs: Any) -> Any:
    x, other = args[0], argument(args, kwargs, 1, "other")
    return x.expand(other.shape)


@rule(F.pad)
def _pad(func: Any, args: Any, kwargs: Any) -> Any:
    """Padding of space with zeros keeps the list; padding of channels (a shortcut to more filters) shifts it."""
    x, pad = args[0], list(argument(args, kwargs, 1, "pad", ()))
    mode, value = argument(args, kwargs, 2, "mode", "constant"), argument(args, kwargs, 3, "value")
    behind = 2 * (x.dim() - 2)
    if mode != "constant":
        fits = len(pad) <= behind and x.live.count
        return wrap(func(x.compact, pad, mode, value), x.live) if fits else NotImplemented
    before, after = (pad + [0] * (behind + 2))[behind : behind + 2]
    if value not in (None, 0) or len(pad) > behind + 2 or min(before, after) < 0:
        return NotImplemented
    space = pad[:behind]
    compact = F.pad(x.compact, space) if any(space) else x.compact.clone()
    return wrap(compact, x.live.pad(before, after))


def _channels(x: LiveTensor, start: int, stop: int) -> tuple[Tensor, LiveList]:
    """Channels start to stop - 1 of x: the stored ones, and their list."""
    live, first, count = x.live.slice(start, stop)
    return x.compact.narrow(1, first, count), live


@rule(torch.narrow, Tensor.narrow, filled=True)
def _narrow(func: Any, args: Any, kwargs: Any) -> Any:
    if len(args) != 4 or not all(isinstance(v, int) for v in args[1:]):
        return NotImplemented
    x, dim, start, length = args
    if not -x.dim() <= dim < x.dim():
        return NotImplemented
    dim, size = dim % x.dim(), x.shape[dim]
    start = start + size if start < 0 else start
    if not 0 <= start <= start + length <= size:
        return NotImplemented
    part = _channels(x, start, start + length) if dim == 1 else (x.compact.narrow(dim, start, length), x.live)
    return x.view_of(*part, replay_of(func, args, kwargs))


@rule(torch.chunk, Tensor.chunk, filled=True)
def _chunk(func: Any, args: Any, kwargs: Any) -> Any:
    x, chunks, dim = args[0], argument(args, kwargs, 1, "chunks"), argument(args, kwargs, 2, "dim", 0)
    if not isinstance(chunks, int) or chunks < 1:
        return NotImplemented
    return _split_by(x, max(1, -(-x.shape[dim] // chunks)), dim, _replay_part(func, args, kwargs))


@rule(torch.split, Tensor.split, filled=True)
def _split(func: Any, args: Any, kwargs: Any) -> Any:
    sizes = args[1] if len(args) > 1 else kwargs.get("split_size_or_sections", kwargs.get("split_size"))
    return _split_by(args[0], sizes, argument(args, kwargs, 2, "dim", 0), _replay_part(func, args, kwargs))


def _replay_part(func: Any, args: Any, kwargs: Any) -> Callable[[int], Callable[[Tensor], Tensor]]:
    return lambda part: replay_of(func, args, kwargs, part)


def _split_by(x: LiveTensor, sizes: Any, dim: int, replay: Callable[[int], Callable[[Tensor], Tensor]]) -> Any:
    total = x.shape[dim]
    dim %= x.dim()
    if isinstance(sizes, int):
        if sizes < 1:
            return NotImplemented
        sizes = [min(sizes, total - start) for start in range(0, max(total, 1), sizes)]
    if not isinstance(sizes, (list, tuple)) or sum(sizes) != total or min(sizes, default=0) < 0:
        return NotImplemented
    if dim != 1:
        parts = [(part, x.live) for part in x.compact.split(list(sizes), dim)]
    else:
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        parts = [_channels(x, start, start + size) for start, size in zip(starts, sizes, strict=True)]
    return tuple(x.view_of(*part, replay(i)) for i, part in enumerate(parts))


@rule(Tensor.__getitem__, filled=True)
def _getitem(func: Any, args: Any, kwargs: Any) -> Any:
    """Slices of any dimension; numbers and new dimensions behind the channels; a 1-D tensor that picks images."""
    x, index = args
    if not isinstance(x, LiveTensor):
        return NotImplemented
    parts = list(index) if isinstance(index, tuple) else [index]
    if len(parts) == 1 and isinstance(parts[0], Tensor):
        one = not isinstance(parts[0], LiveTensor) and parts[0].dim() == 1
        return wrap(x.compact[index], x.live, x.fill) if one else NotImplemented
    parts = spelled_out(parts, x.dim())
    if len(parts) < 2 or not all(isinstance(part, slice) for part in parts[:2]):
        return NotImplemented
    if any(part is not None and type(part) not in (slice, int) for part in parts[2:]):
        return NotImplemented
    start, stop, step = parts[1].indices(x.live.channels)
    if step != 1:
        return NotImplemented
    live, first, count = x.live.slice(start, max(start, stop))
    compact = x.compact[(parts[0], slice(first, first + count), *parts[2:])]
    return x.view_of(compact, live, replay_of(func, args, kwargs))


def spelled_out(parts: Sequence[Any], rank: int) -> list[Any]:
    """An index in which slices stand for its Ellipsis and for the dimensions that it leaves out."""
    given = sum(part is not None and part is not Ellipsis for part in parts)
    at = next((i for i, part in enumerate(parts) if part is Ellipsis), len(parts))
    return [*parts[:at], *[slice(None)] * (rank - given), *parts[at + 1 :]]
