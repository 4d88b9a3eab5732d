"""Rules of tensors whose dead channels hold a constant, as those of a gate do: sums, products and copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..channel_list import LiveList
from ..channel_ops import FLOATS, regroup
from ..tensor import LiveTensor, wrap
from .elementwise import parts, rest
from .pointwise import constant, in_place_or_wrapped, methods, rule, value_of, writes

_PRODUCTS = set(methods("mul", "multiply"))
_QUOTIENTS = set(methods("div", "divide", "true_divide"))


@rule(*_PRODUCTS, *_QUOTIENTS, *methods("add", "sub", "subtract"), zero=False, filled=True)
def _arithmetic(func: Any, args: Any, kwargs: Any) -> Any:
    """What is zero in one operand is zero in a product; elsewhere both operands have all channels that are live in one.

    A plain operand has all channels, so the result has.
    """
    a, b, more = args[0], args[1] if len(args) > 1 else kwargs.get("other"), rest(kwargs)
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return constant(func, args, kwargs)
    if len(args) > 2 or a.dim() != b.dim() or a.dim() < 2 or a.shape[1] != b.shape[1]:
        return NotImplemented
    if not isinstance(a, LiveTensor):
        return func(a, b.to_dense(), **more)
    if type(a) is LiveTensor and func in _PRODUCTS | _QUOTIENTS:
        return in_place_or_wrapped(a, func(a.compact, _brought(b, a.live), **more))
    if writes(func):
        return NotImplemented
    if type(b) is LiveTensor and func in _PRODUCTS:
        return wrap(func(_brought(a, b.live), b.compact, **more), b.live)
    live = parts(a)[1].union(parts(b)[1])
    x, y = _brought(a, live), _brought(b, live)
    value = 0.0 if live.full else value_of(func, (a.fill, b.fill), x.dtype, (), more)  # type: ignore[attr-defined]
    if value is None or x.dtype != y.dtype:
        return NotImplemented
    return wrap(func(x, y, **more), live, value)


def _brought(x: Tensor, to: LiveList) -> Tensor:
    """The values of a live or plain tensor in these channels."""
    return regroup(*parts(x), to, x.fill) if isinstance(x, LiveTensor) else x


_COPIES = [Tensor.contiguous, *methods("clone"), Tensor.to, Tensor.float, Tensor.double, Tensor.half]


@rule(*_COPIES, Tensor.bfloat16, Tensor.cpu, Tensor.cuda, zero=False, filled=True)
def _copy(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    if not isinstance(x, LiveTensor) or any(isinstance(value, LiveTensor) for value in args[1:]):
        return NotImplemented
    y = func(x.compact, *args[1:], **kwargs)
    if y.dtype not in FLOATS:
        return NotImplemented
    fill = torch.tensor(x.fill, dtype=y.dtype, device="cpu").item()
    return x if y is x.compact else wrap(y, x.live, fill)
