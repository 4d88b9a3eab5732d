"""Rules of rearranged live tensors: what treats each element alone computes on the tensor that they rearrange."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import fallbacks
from ..channel_list import LiveList
from ..channel_ops import regroup, reorder
from ..moved import Axes, MovedTensor, _order, arrange, channels_last_of, moved, undo
from ..rearrange import source_of
from ..tensor import ABOUT, LiveTensor, _without_rules, full_width, wrap
from .elementwise import parts, rest
from .pointwise import KEEP_ZERO, POINTWISE, functions, has_live, methods, rule, writes

_set_requires, _set_grad = (getattr(Tensor, name).__set__ for name in ("requires_grad", "grad"))
_get_grad = getattr(Tensor, "grad").__get__  # noqa: B009


def on_source(x: MovedTensor, func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """func of the tensor that x rearranges, rearranged as x is; x itself where that gave its argument."""
    source = x.source
    y = func(source, *args, **kwargs)
    if y is source:
        return x.written() if writes(func) else x
    return moved(y, x.axes)


# ---- each element alone ---------------------------------------------------------------------------------------------

_BY_CHANNEL = set(functions("dropout2d") + methods("feature_dropout") + [Tensor.contiguous])
_EACH = [
    *POINTWISE, *KEEP_ZERO, *functions("hardtanh"), *methods("clamp", "clip", "clamp_min", "clamp_max", "pow"),
    *methods("detach"),
    Tensor.__pow__, Tensor.__ipow__, Tensor.to,
]  # fmt: skip


@rule(*(func for func in _EACH if func not in _BY_CHANNEL), zero=False, moved=True)
def _each(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    other_layout = kwargs.get("memory_format") not in (None, torch.preserve_format)
    if not isinstance(x, MovedTensor) or has_live(*args[1:], *kwargs.values()) or other_layout:
        return NotImplemented
    if any(isinstance(value, Tensor) and value.dim() for value in (*args[1:], *kwargs.values())):
        return NotImplemented
    return on_source(x, func, *args[1:], **kwargs)


@rule(Tensor.contiguous, zero=False, moved=True)
def _contiguous(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    if len(args) > 1 or kwargs.get("memory_format", torch.contiguous_format) is not torch.contiguous_format:
        return NotImplemented
    source, axes = x.source, x.axes
    if len(axes.split) == 1:
        compact = arrange(source.compact, axes)
        if compact.is_contiguous():
            return x
        return moved(wrap(undo(compact.contiguous(), axes), source.live, source.fill), axes)
    if axes.places == tuple(sorted(axes.places)):
        return on_source(x, Tensor.contiguous)
    order = tuple(sorted(range(len(axes.places)), key=axes.places.__getitem__))
    compact, live = reorder(source.compact, source.live, axes.split, order)
    axes = Axes(tuple(axes.split[i] for i in order), tuple(axes.places[i] for i in order))
    return moved(wrap(compact, live, source.fill), axes)


# ---- sums, products, concatenations ---------------------------------------------------------------------------------


@rule(*methods("mul", "multiply", "div", "divide", "true_divide", "add", "sub", "subtract"), zero=False, moved=True)
def _arithmetic(func: Any, args: Any, kwargs: Any) -> Any:
    """On the source tensors of both operands, if they are rearranged alike, and of what a plain operand has there."""
    a, b = args[0], args[1] if len(args) > 1 else kwargs.get("other")
    x = a if isinstance(a, MovedTensor) else b
    if len(args) > 2 or not isinstance(x, MovedTensor):
        return NotImplemented
    if writes(func) and x is not a:
        return func(a, x.to_dense(), **rest(kwargs)) if type(a) is Tensor and a.shape == x.shape else NotImplemented
    first, second = _operand(a, x), _operand(b, x)
    if first is None or second is None:
        return NotImplemented
    y = func(first, second, **rest(kwargs))
    return x.written() if y is x.source else moved(y, x.axes)


def _operand(value: Any, x: MovedTensor) -> Any:
    """What an operand of an operation with x is for the source tensor of x; None where that has no such form."""
    if value is x:
        return x.source
    if not isinstance(value, Tensor) or (type(value) is Tensor and not value.dim()):
        return value
    rank, axes = x.dim(), x.axes
    if isinstance(value, LiveTensor):
        alike = isinstance(value, MovedTensor) and value.axes == axes and value.dim() == rank
        return value.source if alike else None  # type: ignore[attr-defined]
    if value.dim() > rank:
        return None
    value = value[(None,) * (rank - value.dim())]
    factors = len(axes.split)
    if factors == 1:
        return value.permute(_order(axes, rank)[1])
    sizes = tuple(value.shape[place] for place in axes.places)
    if sizes != (1,) * factors:
        if any(size not in (1, whole) for size, whole in zip(sizes, axes.split, strict=True)):
            return None
        expanded = list(value.shape)
        for place, whole in zip(axes.places, axes.split, strict=True):
            expanded[place] = whole
        value = value.expand(expanded)
    return undo(value, axes)


@rule(torch.cat, torch.concat, torch.concatenate, zero=False, moved=True)
def _cat(func: Any, args: Any, kwargs: Any) -> Any:
    tensors, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if not isinstance(tensors, (list, tuple)) or not isinstance(dim, int):
        return NotImplemented
    x = next(t for t in tensors if isinstance(t, MovedTensor))
    rank, axes = x.dim(), x.axes
    if not -rank <= dim < rank or any(t.dim() != rank for t in tensors):
        return NotImplemented
    source_dim = axes.source_dim(dim % rank)
    operands = [_operand(t, x) for t in tensors]
    if source_dim is None or any(operand is None for operand in operands):
        return NotImplemented
    y = torch.cat(operands, source_dim)
    return moved(y, axes if source_dim != 1 else Axes((y.shape[1],), axes.places))


@rule(torch.stack, filled=True)
def _stack(func: Any, args: Any, kwargs: Any) -> Any:
    """A concatenation along the channels, which are then seen as two dimensions."""
    tensors, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if not isinstance(tensors, (list, tuple)) or not isinstance(dim, int) or len(tensors) < 2:
        return NotImplemented
    shape = tensors[0].shape
    rank = len(shape) + 1
    if rank < 3 or shape[1] < 2 or not -rank <= dim < rank or any(t.shape != shape for t in tensors):
        return NotImplemented
    dim %= rank
    return moved(torch.cat(list(tensors), 1), Axes((len(tensors), shape[1]), (dim, 1 if dim > 1 else 2)))


# ---- reductions, softmax, weights -----------------------------------------------------------------------------------


def _one_dim(args: Any, kwargs: Any) -> int | None:
    """The only dimension that a reduction is over, none of them negative; None where there are several, or all."""
    x, dims = args[0], args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
    dims = [dims] if isinstance(dims, int) and not isinstance(dims, bool) else dims
    if not isinstance(dims, (list, tuple)) or len(dims) != 1 or not -x.dim() <= dims[0] < x.dim():
        return None
    return dims[0] % x.dim()


@rule(*methods("sum", "mean", "amax", "amin"), zero=False, moved=True)
def _reduce(func: Any, args: Any, kwargs: Any) -> Any:
    x, *more = args
    dims = more.pop(0) if more else kwargs.get("dim", kwargs.get("axis"))
    dims = [dims] if isinstance(dims, int) and not isinstance(dims, bool) else dims
    if not isinstance(dims, (list, tuple)) or not dims or any(not -x.dim() <= dim < x.dim() for dim in dims):
        return NotImplemented
    rank, axes = x.dim(), x.axes
    kwargs = {name: value for name, value in kwargs.items() if name not in ("dim", "axis")}
    dims = [dim % rank for dim in dims]
    if len(dims) == 1 and dims[0] in axes.places and len(axes.split) > 1:
        return _reduce_factor(func, x, dims[0], more, kwargs)
    source_dims = [axes.source_dim(dim) for dim in dims]
    if None in source_dims or (0 in source_dims and 1 not in source_dims):
        return NotImplemented
    source = x.source
    y = func(source, source_dims, *more, **kwargs)
    if y.dim() == source.dim():
        return moved(y, axes)
    if 1 in source_dims:
        return y
    if y.dim() < source.dim():
        axes = Axes(axes.split, tuple(place - sum(dim < place for dim in dims) for place in axes.places))
    return moved(y, axes)


def _reduce_factor(func: Any, x: MovedTensor, dim: int, more: list[Any], kwargs: dict[str, Any]) -> Any:
    """A reduction over one of several dimensions with channels: live is what is live anywhere along it."""
    keepdim = more[0] if more else kwargs.pop("keepdim", False)
    values, live, axes, _ = _by_factor(x, dim)
    y = func(values, 1, **kwargs)
    fill = func(torch.full((values.shape[1],), x.fill, dtype=values.dtype), 0, **kwargs).item() if x.fill else 0.0
    result = moved(wrap(y, live, fill), axes)
    return result.unsqueeze(dim) if keepdim else result


def _by_factor(x: MovedTensor, dim: int) -> tuple[Tensor, LiveList, Axes, LiveList]:
    """The values [A, factor, live, *B] of x by one of its dimensions with channels, and by those of the others that are
    live anywhere along it; the list of these; where they are once that dimension is gone; and the list of all.
    """
    source, axes = source_of(x)
    chosen = axes.places.index(dim)
    order = (chosen, *(i for i in range(len(axes.split)) if i != chosen))
    compact, live = parts(source)
    if chosen:
        compact, live = reorder(compact, live, axes.split, order)
    factor = axes.split[chosen]
    left, everything = live.by_factor(factor)
    compact = regroup(compact, live, everything, source.fill)
    values = compact.reshape(compact.shape[0], factor, left.count, *compact.shape[2:])
    places = [axes.places[i] for i in order[1:]]
    axes = Axes(tuple(axes.split[i] for i in order[1:]), tuple(place - (place > dim) for place in places))
    return values, left, axes, everything


@rule(*methods("softmax", "log_softmax"), *functions("softmax", "log_softmax"), filled=True, moved=True)
def _softmax(func: Any, args: Any, kwargs: Any) -> Any:
    """Over pixels, or over one of several dimensions with channels: a constant where all channels along it are dead."""
    x, dim, dtype = args[0], _one_dim(args, kwargs), kwargs.get("dtype")
    source, axes = source_of(x)
    source_dim = None if dim is None else axes.source_dim(dim)
    if dim is None or source_dim in (0, 1):
        return NotImplemented
    plain = torch.log_softmax if "log" in func.__name__ else torch.softmax
    alone = torch.full((x.shape[dim],), x.fill, dtype=source.compact.dtype)
    if source_dim is not None:
        y, live = plain(source.compact, source_dim, dtype), source.live
    else:
        values, _, others, live = _by_factor(x, dim)
        y = plain(values, 1, dtype)
        y = y.reshape(y.shape[0], live.count, *y.shape[3:])
        axes = Axes((values.shape[1], *others.split), (dim, *(place + (place >= dim) for place in others.places)))
    return moved(wrap(y, live, plain(alone, 0, dtype)[0].to(y.dtype).item()), axes)


@rule(F.linear, zero=False, moved=True)
def _linear(func: Any, args: Any, kwargs: Any) -> Any:
    """Multiplies by the columns of the weight that belong to live channels."""
    x, weight = args[0], args[1] if len(args) > 1 else kwargs.get("weight")
    last = channels_last_of(x)
    if last is None or has_live(*args[1:], *kwargs.values()) or weight.dim() != 2:
        return NotImplemented
    compact, live = last
    if weight.shape[1] != live.channels or not live.count:
        return NotImplemented
    kwargs = {name: value for name, value in kwargs.items() if name != "weight"}
    return func(compact, weight.index_select(1, live.rows(weight.device)), *args[2:], **kwargs)


# ---- properties, gradients, memory ----------------------------------------------------------------------------------

_OF_INNER = [getattr(Tensor, name).__get__ for name in ("requires_grad", "is_leaf", "retains_grad", "_version")]


@rule(*ABOUT, zero=False, moved=True)
def _about(func: Any, args: Any, kwargs: Any) -> Any:
    if len(args) > 1 and func is Tensor.type:
        return NotImplemented  # a conversion
    x = args[0]
    if func in _OF_INNER:
        return func(x.source)
    if func == _get_grad:
        grad = func(x.source)
        return None if grad is None else arrange(grad, x.axes)
    with _without_rules():
        return func(x, *args[1:], **kwargs)


@rule(_set_requires, Tensor.requires_grad_, _set_grad, zero=False, moved=True)
def _own_grad(func: Any, args: Any, kwargs: Any) -> Any:
    x, *more = args
    if func == _set_grad and isinstance(more[0], Tensor):
        more = [undo(full_width(more[0]), x.axes)]
    result = func(x.source, *more, **kwargs)
    x.written()
    return x if result is x.source else result


_MEMORY = [getattr(Tensor, name).__get__ for name in ("data",)]
_MEMORY += [Tensor.numpy, Tensor.__array__, Tensor.data_ptr, Tensor.untyped_storage, Tensor.__dlpack__]


@rule(*_MEMORY, zero=False, moved=True)
def _own_memory(func: Any, args: Any, kwargs: Any) -> Any:
    fallbacks.record(func)
    return func(args[0].to_dense_(), *args[1:], **kwargs)


@rule(Tensor.register_hook, zero=False, moved=True)
def _hook(func: Any, args: Any, kwargs: Any) -> Any:
    x, hook = args
    axes = x.axes

    def on_full(grad: Tensor) -> Tensor | None:
        changed = hook(arrange(grad, axes))
        return None if changed is None else undo(changed, axes)

    return func(x.source, on_full, **kwargs)


@rule(Tensor.retain_grad, zero=False, moved=True)
def _retain_grad(func: Any, args: Any, kwargs: Any) -> Any:
    return func(args[0].source)


@rule(torch.autograd.grad, zero=False, moved=True)
def _autograd_grad(func: Any, args: Any, kwargs: Any) -> Any:
    names = ("outputs", "inputs", "grad_outputs")
    given = dict(zip(names, args, strict=False)) | kwargs
    inputs = given["inputs"]
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    axes = [x.axes if isinstance(x, MovedTensor) else None for x in inputs]
    given = full_width({name: value for name, value in given.items() if name != "inputs"})
    given["inputs"] = [x.source if isinstance(x, MovedTensor) else x for x in inputs]
    grads = func(given.pop("outputs"), given.pop("inputs"), given.pop("grad_outputs", None), *args[3:], **given)
    return tuple(g if where is None or g is None else arrange(g, where) for g, where in zip(grads, axes, strict=True))
