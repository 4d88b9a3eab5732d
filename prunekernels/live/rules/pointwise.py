"""Rules of operations that keep a zero channel zero and each channel to itself, and of reductions over space.

A rule is called as rule(func, args, kwargs). If it returns NotImplemented, the operation falls back to full width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from numbers import Number
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ...op_facts import keeps_constant, keeps_zero, operators
from ..channel_ops import FLOATS
from ..moved import MOVED_RULES
from ..saving import unhooked
from ..tensor import ABOUT, FILLED_RULES, RULES, LiveTensor, _without_rules, wrap

Rule = Callable[[Any, Any, Any], Any]


def rule(*funcs: Any, zero: bool = True, filled: bool = False, moved: bool = False) -> Callable[[Rule], Rule]:
    """Decorator: registers a function as the rule of these torch functions.

    zero: Where dead channels hold zero in all arguments. filled: where they hold another number in some. moved: where
    an argument is a MovedTensor.
    """
    tables = [RULES] * zero + [FILLED_RULES] * filled + [MOVED_RULES] * moved

    def register(body: Rule) -> Rule:
        for table in tables:
            table.update(dict.fromkeys(funcs, body))
        return body

    return register


def methods(*names: str) -> list[Any]:
    """torch.name and Tensor.name, and both with a trailing _ (in place), where they exist."""
    found = []
    for name in names:
        for owner in (torch, Tensor):
            found += [getattr(owner, n) for n in (name, name + "_") if hasattr(owner, n)]
    return found


def functions(*names: str) -> list[Any]:
    """torch.nn.functional.name, and with a trailing _, where they exist."""
    return [getattr(F, n) for name in names for n in (name, name + "_") if hasattr(F, n)]


def in_place_or_wrapped(x: LiveTensor, y: Tensor) -> Tensor:
    """The result y of an operation on x.compact as a live tensor: x itself if the operation was in place."""
    return x.replace_storage(y, x.live) if y is x.compact else wrap(y, x.live)


def has_live(*values: Any) -> bool:
    return any(isinstance(value, LiveTensor) for value in values)


def in_space(x: LiveTensor, dims: Sequence[Any]) -> bool:
    """Whether these dimensions all lie behind the channels."""
    rank = x.dim()
    return all(isinstance(d, int) and -rank <= d < rank and d % rank >= 2 for d in dims)


# ---- f of a constant ------------------------------------------------------------------------------------------------

POINTWISE = [
    *methods(*operators("pointwise")), *functions(*operators("pointwise"), "logsigmoid"), torch.special.expit,
    *methods("rsub"), Tensor.__pow__, *(getattr(Tensor, f"__r{name}__") for name in ("sub", "div", "truediv", "pow")),
]  # fmt: skip


@rule(*POINTWISE, filled=True)
def constant(func: Any, args: Any, kwargs: Any) -> Any:
    """f of each element alone: all dead channels become f(0), or f(fill). In place they have to hold what they held."""
    x, behind = args[0], tuple(args[1:])
    if not isinstance(x, LiveTensor):
        return NotImplemented
    value = value_of(func, (x.fill,), x.compact.dtype, behind, kwargs)
    if value is None or (writes(func) and value != x.fill):
        return NotImplemented
    y = func(x.compact, *behind, **kwargs)
    return x.replace_storage(y, x.live) if writes(func) else wrap(y, x.live, value)


def writes(func: Any) -> bool:
    """Whether a torch function is in place by its name: relu_, __imul__."""
    name = func.__name__
    return name.startswith("__i") if name.endswith("__") else name.endswith("_")


def value_of(
    func: Any, fills: tuple[float, ...], dtype: torch.dtype, args: tuple[Any, ...], kwargs: Any
) -> float | None:
    """func(*fills, *args, **kwargs) in this dtype; None where the channel itself must show what it is: where that or a
    derivative is not finite, or an argument is not a number (or True, as in inplace=True).
    """
    if not all(isinstance(v, (Number, str, type(None))) and v is not True for v in (*args, *kwargs.values())):
        return None
    return _value(func, fills, dtype, args, tuple(kwargs.items()))


@functools.lru_cache(maxsize=1024, typed=True)
def _value(
    func: Any, fills: tuple[float, ...], dtype: torch.dtype, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...]
) -> float | None:
    with (
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch._C._DisableFuncTorch(),
        unhooked(),
    ):
        leaves = [torch.tensor([fill], dtype=dtype, device="cpu", requires_grad=True) for fill in fills]
        first, *others = leaves
        y = func(first.clone() if writes(func) else first, *others, *args, **dict(kwargs))
        slopes = torch.autograd.grad(y, leaves) if y.requires_grad else ()
    finite = y.dtype in FLOATS and all(bool(t.detach().isfinite()) for t in (y, *slopes))
    return y.item() if finite else None


# ---- f(0) = 0 -------------------------------------------------------------------------------------------------------

KEEP_ZERO = [
    *methods(*keeps_zero("pointwise", "random")), *functions(*keeps_zero("pointwise", "random")),
    Tensor.contiguous, Tensor.clone, torch.clone, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16,
    Tensor.cpu, Tensor.cuda,
]  # fmt: skip


@rule(*KEEP_ZERO)
def _keeps_zero(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0] if args else None
    if type(x) is not LiveTensor or has_live(*args[1:], *kwargs.values()):
        return NotImplemented
    return in_place_or_wrapped(x, func(x.compact, *args[1:], **kwargs))


@rule(F.relu, *methods("relu"))
def _relu(func: Any, args: Any, kwargs: Any) -> Any:
    """Done together with the norm before it, where that has left its second half for this."""
    x, deferred = args[0], args[0].deferred if type(args[0]) is LiveTensor else None
    y = None if deferred is None else deferred.relu()
    if y is None:
        return _keeps_zero(func, args, kwargs)
    in_place = writes(func) or (args[1] if len(args) > 1 else kwargs.get("inplace", False))
    return x.replace_storage(y, x.live) if in_place else wrap(y, x.live)


@rule(Tensor.detach, torch.detach, filled=True)
def _detach(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    return x.view_of(x.compact.detach(), x.live, torch.detach)


@rule(Tensor.to)
def _to(func: Any, args: Any, kwargs: Any) -> Any:
    return NotImplemented if has_live(*args[1:], *kwargs.values()) else _keeps_zero(func, args, kwargs)


@rule(*functions(*keeps_zero("pool")), torch.max_pool2d)
@rule(*functions(*keeps_constant("pool")), torch.max_pool2d, zero=False, filled=True)
def _pool(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    if not isinstance(x, LiveTensor) or x.dim() != 4 or kwargs.get("return_indices") or has_live(*args[1:]):
        return NotImplemented
    if not x.live.count:  # torch refuses to pool a tensor without channels
        return wrap(func(x.to_dense(), *args[1:], **kwargs)[:, :0], x.live, x.fill)
    return wrap(func(x.compact, *args[1:], **kwargs), x.live, x.fill)


@rule(*functions("hardtanh"), *methods("clamp", "clip"))
def _clamp(func: Any, args: Any, kwargs: Any) -> Any:
    bounds = list(args[1:3])
    for i, names in enumerate((("min", "min_val"), ("max", "max_val"))):
        if len(bounds) == i:
            default = None if func not in _HARDTANH else (-1.0, 1.0)[i]
            bounds.append(next((kwargs[n] for n in names if n in kwargs), default))
    low, high = bounds
    if any(isinstance(b, Tensor) for b in bounds) or (low is not None and low > 0) or (high is not None and high < 0):
        return constant(func, args, kwargs)
    return _keeps_zero(func, args, kwargs)


_HARDTANH = set(functions("hardtanh"))


@rule(*methods("clamp_min", "clamp_max"))
def _clamp_one(func: Any, args: Any, kwargs: Any) -> Any:
    bound = args[1] if len(args) > 1 else kwargs.get("min", kwargs.get("max"))
    keeps = isinstance(bound, (int, float)) and (bound <= 0 if func.__name__.startswith("clamp_min") else bound >= 0)
    return (_keeps_zero if keeps else constant)(func, args, kwargs)


@rule(*methods("pow"), Tensor.__pow__, Tensor.__ipow__)
def _pow(func: Any, args: Any, kwargs: Any) -> Any:
    exponent = args[1] if len(args) > 1 else kwargs.get("exponent")
    if isinstance(exponent, (int, float)) and exponent > 0:
        return _keeps_zero(func, args, kwargs)
    return constant(func, args, kwargs)


@rule(F.prelu, torch.prelu)
def _prelu(func: Any, args: Any, kwargs: Any) -> Any:
    x, weight = args if len(args) == 2 else (args[0], kwargs["weight"])
    if type(x) is not LiveTensor or has_live(weight) or weight.numel() not in (1, x.live.channels):
        return NotImplemented
    if weight.numel() > 1:
        weight = weight.index_select(0, x.live.rows(x.compact.device))
    return wrap(func(x.compact, weight), x.live)


# ---- reductions over space ------------------------------------------------------------------------------------------


@rule(*methods(*keeps_zero("reduction")))
@rule(*methods(*keeps_constant("reduction")), zero=False, filled=True)
def _reduce(func: Any, args: Any, kwargs: Any) -> Any:
    """A reduction over dimensions behind the channels reduces each live channel by itself. A sum over channels is that
    of live ones.
    """
    x, *rest = args
    dims = rest[0] if rest else kwargs.get("dim", kwargs.get("axis"))
    dims = [dims] if isinstance(dims, int) and not isinstance(dims, bool) else dims
    if not isinstance(x, LiveTensor) or not isinstance(dims, (list, tuple)) or not dims:
        return NotImplemented
    if in_space(x, dims):
        return wrap(func(x.compact, *rest, **kwargs), x.live, x.fill)
    rank, live = x.dim(), x.live
    inside = all(isinstance(dim, int) and -rank <= dim < rank for dim in dims)
    if func not in _SUMS or x.fill or not live.count or not inside or not any(dim % rank == 1 for dim in dims):
        return NotImplemented
    y = func(x.compact, *rest, **kwargs)
    return y if func.__name__ == "sum" else y * (live.count / live.channels)


_SUMS = set(methods("sum", "mean"))


# ---- weights that read channels -------------------------------------------------------------------------------------


def _reader(args: Any, kwargs: Any, rank: int, dim: int = 1) -> tuple[LiveTensor, Tensor] | None:
    """The live input and the weight of a linear layer or convolution; None for other arguments.

    dim: of the weight, that of the channels.
    """
    x, weight = args[0], args[1] if len(args) > 1 else kwargs.get("weight")
    if type(x) is not LiveTensor or x.dim() != rank or not x.live.count or not isinstance(weight, Tensor):
        return None
    if weight.dim() != rank or weight.shape[dim] != x.live.channels or has_live(*args[1:], *kwargs.values()):
        return None
    return x, weight


def _read(func: Any, args: Any, kwargs: Any, x: LiveTensor, weight: Tensor, dim: int = 1) -> Any:
    kwargs = {name: value for name, value in kwargs.items() if name != "weight"}
    return func(x.compact, weight.index_select(dim, x.live.rows(weight.device)), *args[2:], **kwargs)


@rule(F.linear)
def _linear(func: Any, args: Any, kwargs: Any) -> Any:
    """Multiplies by the columns of the weight that belong to live channels."""
    reader = _reader(args, kwargs, 2)
    return NotImplemented if reader is None else _read(func, args, kwargs, *reader)


@rule(torch.conv2d)
def _plain_conv(func: Any, args: Any, kwargs: Any) -> Any:
    """A convolution without masks reads the live channels alone and computes all its filters."""
    reader = _reader(args, kwargs, 4)
    groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
    return NotImplemented if reader is None or groups != 1 else _read(func, args, kwargs, *reader)


@rule(torch.conv_transpose2d)
def _plain_conv_transpose(func: Any, args: Any, kwargs: Any) -> Any:
    """The same of a transposed convolution, whose weight is [channels, any, ...]."""
    reader = _reader(args, kwargs, 4, dim=0)
    groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
    return NotImplemented if reader is None or groups != 1 else _read(func, args, kwargs, *reader, dim=0)


# ---- shape, dtype, device -------------------------------------------------------------------------------------------

_PROPERTIES = (
    "shape dtype device layout ndim requires_grad grad_fn is_leaf is_cuda is_cpu is_sparse is_quantized is_meta "
    "is_mkldnn is_nested is_xpu is_mps itemsize nbytes _version output_nr grad retains_grad"
).split()
_ABOUT = [getattr(Tensor, name).__get__ for name in _PROPERTIES if hasattr(Tensor, name)]
_ABOUT += [getattr(Tensor, name) for name in (
    "size", "dim", "numel", "nelement", "ndimension", "stride", "is_contiguous", "is_floating_point", "is_complex",
    "is_signed", "get_device", "element_size", "__len__", "is_inference", "dim_order", "type", "__hash__",
)]  # fmt: skip
_ABOUT += [torch.numel, torch.is_floating_point, torch.is_complex, torch.is_signed, torch.is_inference]


ABOUT.update(_ABOUT)


@rule(*_ABOUT, filled=True)
def _about(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    if len(args) > 1 and func is Tensor.type:
        return NotImplemented  # a conversion
    with _without_rules():
        return func(x.compact if x.live.full and func is not Tensor.__hash__ else x, *args[1:], **kwargs)


@rule(
    *methods("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"), filled=True, moved=True
)
@rule(
    *(getattr(Tensor, name) for name in ("new_zeros", "new_ones", "new_empty", "new_full")), Tensor.type_as,
    filled=True, moved=True,
)  # fmt: skip
def _about_another(func: Any, args: Any, kwargs: Any) -> Any:
    """A new tensor with the shape, dtype or device of a live tensor: its values do not matter."""
    if func is Tensor.type_as:
        return args[0].to(args[1].device, args[1].dtype)
    x = args[0]
    like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return func(like, *args[1:], **kwargs)
