"""Rules of operations that need the gradient or the memory of a live tensor: it then stores its full width."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import fallbacks
from ..channel_list import LiveList
from ..channel_ops import regroup, to_dense
from ..tensor import LiveTensor, _without_rules, full_width
from .pointwise import rule

_set_requires, _set_grad = (getattr(Tensor, name).__set__ for name in ("requires_grad", "grad"))
_OWN: list[Any] = [_set_requires, Tensor.requires_grad_, _set_grad]
_OWN += [getattr(Tensor, name).__get__ for name in ("data",)]
_OWN += [Tensor.register_post_accumulate_grad_hook, Tensor.numpy, Tensor.__array__, Tensor.data_ptr]
_OWN += [Tensor.untyped_storage, Tensor.__dlpack__]


@rule(*_OWN, filled=True)
def _own(func: Any, args: Any, kwargs: Any) -> Any:
    """The tensor itself stores its full-width values from now on."""
    x = args[0]
    fallbacks.record(func)
    full = x.to_dense_()
    with _without_rules():
        result = func(full, *args[1:], **kwargs)
    if func in (_set_requires, Tensor.requires_grad_):
        x.replace_storage(full, x.live)
    return x if result is full else result


@rule(Tensor.register_hook, Tensor.retain_grad, filled=True)
def _hook(func: Any, args: Any, kwargs: Any) -> Any:
    """The tensor stores its full-width values from now on; the hook also gets the gradients of earlier uses."""
    x, live, compact = args[0], args[0].live, args[0].compact
    of_root = x.shares_memory() and x._group().root is not x  # then its full width is not made of `compact`
    fallbacks.record(func)
    full = x.to_dense_()
    with _without_rules():
        handle = func(full, *args[1:], **kwargs)
    if not live.full and full.grad_fn is not None:
        hook = args[1] if func is Tensor.register_hook else _grad_keeper(full)
        _hook_earlier_uses(compact, live, None if of_root else full, hook)
    return handle


def _grad_keeper(full: Tensor) -> Callable[[Tensor], None]:
    """A hook that adds to full.grad, as retain_grad does."""
    holder = weakref.ref(full)  # the tensor holds its hook: a strong reference back would be a cycle

    def keep(grad: Tensor) -> None:
        kept = holder()
        if kept is not None:
            kept.grad = grad if kept.grad is None else kept.grad + grad

    return keep


def _hook_earlier_uses(compact: Tensor, live: LiveList, full: Tensor | None, hook: Callable[[Tensor], Any]) -> None:
    """Calls a hook for the uses of `compact` before it was brought to full width.

    full: What was made of compact, if anything was. The gradient of compact is then the sum over its earlier uses and
    its use by `full`. The hook of `full` has seen the latter already, so it is subtracted.
    """
    through_full: list[Tensor] = []

    def remember(grads: Any) -> None:
        through_full[:] = [grads[0]]

    def on_compact(grad: Tensor) -> Tensor | None:
        seen = regroup(through_full.pop(), LiveList.all(live.channels), live) if through_full else None
        rest = grad if seen is None else grad - seen
        if seen is not None and not bool(rest.any()):
            return None
        changed = hook(to_dense(rest, live))
        if changed is None:
            return None
        changed = regroup(changed, LiveList.all(live.channels), live)
        return changed if seen is None else changed + seen

    if full is not None:
        assert full.grad_fn is not None
        full.grad_fn.register_prehook(remember)
    compact.register_hook(on_compact)


@rule(torch.autograd.grad, filled=True)
def _autograd_grad(func: Any, args: Any, kwargs: Any) -> Any:
    """The gradient with respect to a live tensor: known in its live channels, taken as zero in the others."""
    given = dict(zip(("outputs", "inputs", "grad_outputs"), args, strict=False)) | kwargs
    rest = args[3:]
    inputs = given.pop("inputs")
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    given = full_width(given)
    compact = [x.compact if isinstance(x, LiveTensor) else x for x in inputs]
    grads = func(given.pop("outputs"), compact, given.pop("grad_outputs", None), *rest, **given)
    pairs = zip(inputs, grads, strict=True)
    return tuple(g if not isinstance(x, LiveTensor) or g is None else to_dense(g, x.live) for x, g in pairs)
