"""Rules of sums, products and concatenations of live tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from ..channel_list import LiveList, align_of
from ..channel_ops import FLOATS, ops, regroup
from ..tensor import FilledTensor, LiveTensor, wrap, wrap_deferred
from .pointwise import constant, in_place_or_wrapped, rule, writes


def parts(x: Tensor) -> tuple[Tensor, LiveList]:
    """The stored values of a live or plain tensor, and their channels."""
    return (x.compact, x.live) if isinstance(x, LiveTensor) else (x, LiveList.all(x.shape[1]))


def _sum(func: Any, args: Any, kwargs: Any, sign: int) -> Any:
    a, b = args[0], args[1] if len(args) > 1 else kwargs.get("other")
    if len(args) > 2 or not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return constant(func, args, kwargs)
    if type(a) is LiveTensor and type(b) is LiveTensor and a.live is b.live:
        if sign == 1 and not kwargs and (a._before_use or b._before_use) and a.shape == b.shape and a.dtype == b.dtype:
            total = _deferred_sum(a, b, writes(func))
            if total is not None:
                return total
        x, y = a.compact, b.compact
        if x.dim() == y.dim() and (x.shape == y.shape or not writes(func)):
            return in_place_or_wrapped(a, func(x, y, **rest(kwargs)))
    if type(a) is Tensor and writes(func) and a.shape == b.shape:
        return func(a, b.to_dense(), **rest(kwargs))  # type: ignore[attr-defined]
    alpha = kwargs.get("alpha", 1)
    if a.shape != b.shape or a.dim() < 2 or not isinstance(alpha, (int, float)):
        return NotImplemented
    if a.dtype != b.dtype or a.dtype not in FLOATS or _writes_elsewhere(func, a):
        return NotImplemented
    y, live = join(*parts(a), *parts(b), sign * alpha)
    return a.replace_storage(y, live) if writes(func) else wrap(y, live)


def _deferred_sum(a: LiveTensor, b: LiveTensor, in_place: bool) -> LiveTensor | None:
    """The sum of the results of norms whose second half is still to be done, or of one and another tensor."""
    norm, other = (a, b) if a.deferred is not None or in_place else (b, a)
    if norm.deferred is None or norm is other:
        return None
    addend = other.compact
    total = norm.deferred.plus(addend) if norm.deferred is not None else None
    if total is None:
        return None
    assert total.y is not None
    total.guard(other)
    if not in_place:
        return wrap_deferred(total, a.live)
    a.replace_storage(total.y, a.live)
    a._before_use = total
    return a


def rest(kwargs: Any) -> Any:
    """The keyword arguments of a sum or product but its second operand."""
    return {name: value for name, value in kwargs.items() if name != "other"} if kwargs else kwargs


def _writes_elsewhere(func: Any, a: Tensor) -> bool:
    """Whether func is in place and its result cannot go to new memory, because other tensors share the memory of a."""
    return writes(func) and (type(a) is not LiveTensor or a.live.full or a.shares_memory())


def join(a: Tensor, a_live: LiveList, b: Tensor, b_live: LiveList, alpha: float) -> tuple[Tensor, LiveList]:
    """a [N, a_live.count, ...] + alpha * b [N, b_live.count, ...] in one pass, over the union of their lists."""
    live = a_live.union(b_live).aligned(align_of(a.device))
    to_a, to_b = a_live.remap(live, a.device), b_live.remap(live, b.device)
    shape = (a.shape[0], live.count, *a.shape[2:])
    if a.dim() != 4:
        pixels = math.prod(shape[2:])
        a, b = (t.reshape(*t.shape[:2], pixels, 1) for t in (a, b))
    y = ops.join_channels(a, b, to_a.gather_index, to_b.gather_index, to_a.inverse, to_b.inverse, float(alpha))
    return (y if len(shape) == 4 else y.reshape(shape)), live


@rule(torch.add, Tensor.add, Tensor.add_)
def _add(func: Any, args: Any, kwargs: Any) -> Any:
    return _sum(func, args, kwargs, 1)


@rule(torch.sub, Tensor.sub, Tensor.sub_, torch.subtract, Tensor.subtract, Tensor.subtract_)
def _sub(func: Any, args: Any, kwargs: Any) -> Any:
    return _sum(func, args, kwargs, -1)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Number) or (
        type(value) is not LiveTensor and isinstance(value, Tensor) and not value.dim()
    )


def _factor(x: LiveTensor, b: Tensor) -> Tensor | None:
    """The part of a plain tensor that broadcasts against the live channels of x; None where the shapes do not tell."""
    channels = x.live.channels
    behind = x.dim() - 2  # dimensions behind the channels
    if b.dim() <= behind:
        return b
    if b.dim() > x.dim():
        return None
    at = b.dim() - 1 - behind
    size = b.shape[at]
    if size == 1:
        return b
    if size != channels:
        return None
    for dim in range(-behind, 0):
        if b.stride(dim) == 0 and b.shape[dim] == x.compact.shape[dim] > 1:
            b = b.narrow(dim, 0, 1)  # what an expanded tensor repeats is not gathered
    if b.stride(at) == 0 and size > 1:
        return b.narrow(at, 0, 1)
    if b.dim() == 4 and b.dtype in FLOATS:
        return regroup(b, LiveList.all(channels), x.live)
    return b.index_select(at, x.live.rows(b.device))


@rule(torch.mul, Tensor.mul, Tensor.mul_, torch.multiply, Tensor.multiply, Tensor.multiply_)
def _mul(func: Any, args: Any, kwargs: Any) -> Any:
    a, b = args[0], args[1] if len(args) > 1 else kwargs.get("other")
    if len(args) > 2:
        return NotImplemented
    if type(a) is not LiveTensor:
        if not isinstance(a, (Tensor, Number)):
            return NotImplemented
        if writes(func):
            return func(a, b.to_dense()) if type(a) is Tensor and a.shape == b.shape else NotImplemented
        a, b = b, a
    if _is_scalar(b):
        return in_place_or_wrapped(a, func(a.compact, b))
    if not isinstance(b, Tensor):
        return NotImplemented
    if type(b) is LiveTensor:
        if a.dim() != b.dim() or a.live.channels != b.live.channels:
            return NotImplemented
        if a.live is b.live:
            return in_place_or_wrapped(a, func(a.compact, b.compact))
        if writes(func) and (a.shape != b.shape or a.dtype != b.dtype or _writes_elsewhere(func, a)):
            return NotImplemented
        both = a.live.intersection(b.live).aligned(align_of(a.device))
        y = torch.mul(regroup(a.compact, a.live, both), regroup(b.compact, b.live, both))
        return a.replace_storage(y, both) if writes(func) else wrap(y, both)
    factor = _factor(a, b)
    return NotImplemented if factor is None else in_place_or_wrapped(a, func(a.compact, factor))


@rule(torch.div, Tensor.div, Tensor.div_, torch.divide, Tensor.divide, torch.true_divide, Tensor.true_divide)
def _div(func: Any, args: Any, kwargs: Any) -> Any:
    a, b = args[0], args[1] if len(args) > 1 else kwargs.get("other")
    if type(a) is not LiveTensor or type(b) is LiveTensor:
        return NotImplemented
    factor = b if _is_scalar(b) else _factor(a, b) if isinstance(b, Tensor) else None
    return NotImplemented if factor is None else in_place_or_wrapped(a, func(a.compact, factor, **rest(kwargs)))


@rule(torch.cat, torch.concat, torch.concatenate, filled=True)
def _cat(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = args[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if not isinstance(tensors, (list, tuple)) or not isinstance(dim, int):
        return NotImplemented
    rank = tensors[0].dim()
    if rank < 2 or not -rank <= dim < rank or any(t.dim() != rank for t in tensors):
        return NotImplemented
    fill = _fill_of(tensors)
    other = [isinstance(t, LiveTensor) and t.fill != fill and not t.live.full for t in tensors]
    if dim % rank != 1 and any(other):
        return NotImplemented
    operands = [parts(t.to_dense() if wide else t) for t, wide in zip(tensors, other, strict=True)]
    lists = [live for _, live in operands]
    if dim % rank == 1:
        return wrap(torch.cat([compact for compact, _ in operands], 1), LiveList.cat(lists), fill)
    if any(live.channels != lists[0].channels for live in lists):
        return NotImplemented
    union = lists[0]
    for live in lists[1:]:
        union = union.union(live)
    union = union.aligned(align_of(tensors[0].device))
    return wrap(torch.cat([regroup(compact, live, union, fill) for compact, live in operands], dim), union, fill)


def _fill_of(tensors: Sequence[Tensor]) -> float:
    """The constant that most dead channels of these tensors hold."""
    if not any(type(t) is FilledTensor for t in tensors):
        return 0.0
    dead = dict.fromkeys((t.fill for t in tensors if isinstance(t, LiveTensor)), 0)
    for t in tensors:
        if isinstance(t, LiveTensor):
            dead[t.fill] += t.live.channels - t.live.count
    return max(dead, key=dead.__getitem__)
