"""Rules of the operations that leave dead channels dead: channel by channel, and reductions over space.

A rule is called as rule(func, args, kwargs) and may return NotImplemented: then the operation gets full width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .live import RULES, LiveTensor, _without_rules, wrap

Rule = Callable[[Any, Any, Any], Any]


def rule(*funcs: Any) -> Callable[[Rule], Rule]:
    """Registers a rule for torch functions."""

    def register(body: Rule) -> Rule:
        for func in funcs:
            RULES[func] = body
        return body

    return register


def methods(*names: str) -> list[Any]:
    """torch.name and Tensor.name, and both with a trailing _ (in place), as far as they exist."""
    found = []
    for name in names:
        for owner in (torch, Tensor):
            found += [getattr(owner, n) for n in (name, name + "_") if hasattr(owner, n)]
    return found


def functions(*names: str) -> list[Any]:
    """torch.nn.functional.name, and with a trailing _, as far as they exist."""
    return [getattr(F, n) for name in names for n in (name, name + "_") if hasattr(F, n)]


def in_place_or_wrapped(x: LiveTensor, y: Tensor) -> Tensor:
    """What an operation on x.compact gave, as a live tensor: x itself where the operation was in place."""
    return x.become(y, x.live) if y is x.compact else wrap(y, x.live)


def has_live(*values: Any) -> bool:
    return any(type(v) is LiveTensor for v in values)


# ---- f(0) = 0 -------------------------------------------------------------------------------------------------------

_KEEP_ZERO = [
    *methods("relu", "tanh", "abs", "neg", "negative", "sign", "square", "sin", "tan", "asin", "atan"),
    *methods("sinh", "asinh", "erf", "expm1", "log1p", "trunc", "round", "floor", "ceil", "positive", "selu", "celu"),
    *functions("relu", "relu6", "leaky_relu", "silu", "gelu", "hardswish", "elu", "celu", "selu", "mish", "rrelu"),
    *functions("softsign", "tanhshrink", "softshrink", "hardshrink", "tanh"),
    *functions("dropout", "dropout2d", "feature_dropout"), *methods("dropout", "feature_dropout"),
    *functions("avg_pool2d", "adaptive_avg_pool2d", "interpolate", "upsample"),
    Tensor.contiguous, Tensor.clone, torch.clone, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16,
    Tensor.cpu, Tensor.cuda,
]  # fmt: skip


@rule(*_KEEP_ZERO)
def _keeps_zero(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0] if args else None
    if type(x) is not LiveTensor or x.dim() < 2 or has_live(*args[1:], *kwargs.values()):
        return NotImplemented
    return in_place_or_wrapped(x, func(x.compact, *args[1:], **kwargs))


@rule(Tensor.detach, torch.detach)
def _detach(func: Any, args: Any, kwargs: Any) -> Any:
    return wrap(args[0].compact.detach(), args[0].live)


@rule(Tensor.to)
def _to(func: Any, args: Any, kwargs: Any) -> Any:
    return NotImplemented if has_live(*args[1:], *kwargs.values()) else _keeps_zero(func, args, kwargs)


@rule(F.max_pool2d, torch.max_pool2d, F.adaptive_max_pool2d)
def _max_pool(func: Any, args: Any, kwargs: Any) -> Any:
    return NotImplemented if kwargs.get("return_indices") else _keeps_zero(func, args, kwargs)


@rule(*functions("hardtanh"), *methods("clamp", "clip"))
def _clamp(func: Any, args: Any, kwargs: Any) -> Any:
    bounds = list(args[1:3])
    for i, names in enumerate((("min", "min_val"), ("max", "max_val"))):
        if len(bounds) == i:
            default = None if func not in _HARDTANH else (-1.0, 1.0)[i]
            bounds.append(next((kwargs[n] for n in names if n in kwargs), default))
    low, high = bounds
    if any(isinstance(b, Tensor) for b in bounds) or (low is not None and low > 0) or (high is not None and high < 0):
        return NotImplemented
    return _keeps_zero(func, args, kwargs)


_HARDTANH = set(functions("hardtanh"))


@rule(*methods("pow"))
def _pow(func: Any, args: Any, kwargs: Any) -> Any:
    exponent = args[1] if len(args) > 1 else kwargs.get("exponent")
    if isinstance(exponent, (int, float)) and exponent > 0:
        return _keeps_zero(func, args, kwargs)
    return NotImplemented


@rule(F.prelu, torch.prelu)
def _prelu(func: Any, args: Any, kwargs: Any) -> Any:
    x, weight = args
    if type(x) is not LiveTensor:
        return NotImplemented
    if weight.numel() > 1:
        weight = weight.index_select(0, x.live.rows(x.compact.device))
    return wrap(func(x.compact, weight), x.live)


# ---- over space -----------------------------------------------------------------------------------------------------


@rule(*(getattr(owner, name) for owner in (torch, Tensor) for name in ("mean", "sum", "amax", "amin", "var", "std")))
def _reduce(func: Any, args: Any, kwargs: Any) -> Any:
    """Over dimensions behind the channels."""
    x, *rest = args
    dims = rest[0] if rest else kwargs.get("dim")
    dims = [dims] if isinstance(dims, int) and not isinstance(dims, bool) else dims
    if type(x) is not LiveTensor or not isinstance(dims, (list, tuple)) or not dims:
        return NotImplemented
    if any(not isinstance(d, int) or d % x.dim() < 2 for d in dims):
        return NotImplemented
    return wrap(func(x.compact, *rest, **kwargs), x.live)


# ---- weights that read channels -------------------------------------------------------------------------------------


@rule(F.linear)
def _linear(func: Any, args: Any, kwargs: Any) -> Any:
    """Reads the live columns of the weight alone."""
    x, weight, bias = (*args, *(kwargs[name] for name in ("weight", "bias") if name in kwargs), None)[:3]
    if type(x) is not LiveTensor or x.dim() != 2 or has_live(weight, bias):
        return NotImplemented
    return func(x.compact, weight.index_select(1, x.live.rows(x.compact.device)), bias)


@rule(torch.conv2d)
def _plain_conv(func: Any, args: Any, kwargs: Any) -> Any:
    """A convolution that is not masked reads the live channels alone, and computes all its filters."""
    x, weight, *rest = args
    groups = rest[4] if len(rest) > 4 else kwargs.get("groups", 1)
    if type(x) is not LiveTensor or groups != 1 or has_live(weight):
        return NotImplemented
    return func(x.compact, weight.index_select(1, x.live.rows(x.compact.device)), *rest, **kwargs)


# ---- what an object is, and hooks on it -----------------------------------------------------------------------------

_PROPERTIES = (
    "shape dtype device layout ndim requires_grad grad_fn is_leaf is_cuda is_cpu is_sparse is_quantized is_meta "
    "is_mkldnn is_nested is_xpu is_mps itemsize nbytes _version output_nr"
).split()
_ABOUT = [getattr(Tensor, name).__get__ for name in _PROPERTIES if hasattr(Tensor, name)]
_ABOUT += [getattr(Tensor, name) for name in (
    "size", "dim", "numel", "nelement", "ndimension", "stride", "is_contiguous", "is_floating_point", "is_complex",
    "is_signed", "get_device", "element_size", "__len__", "is_inference", "dim_order", "type", "__hash__",
)]  # fmt: skip
_ABOUT += [torch.numel, torch.is_floating_point, torch.is_complex, torch.is_signed, torch.is_inference]


@rule(*_ABOUT)
def _about(func: Any, args: Any, kwargs: Any) -> Any:
    if len(args) > 1 and func is Tensor.type:
        return NotImplemented  # a conversion
    with _without_rules():
        return func(*args, **kwargs)


_GRADIENT_OF: list[Any] = [getattr(Tensor, name).__get__ for name in ("grad", "retains_grad")]
_GRADIENT_OF += [Tensor.register_hook, Tensor.retain_grad, Tensor.register_post_accumulate_grad_hook]
_GRADIENT_OF += [Tensor.requires_grad_]


@rule(*_GRADIENT_OF)
def _gradient(func: Any, args: Any, kwargs: Any) -> Any:
    """Who asks for the gradient of this very tensor gets the full-width one: from now on it is stored that wide."""
    x = args[0]
    with _without_rules():
        result = func(x.compact if x.live.full else x.become_full(), *args[1:], **kwargs)
    return x if isinstance(result, Tensor) and result is x.compact else result
