"""LiveTensor: the live channels of a tensor, passed on as if it were the whole tensor."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from .. import functional
from ..ops import autograd
from . import fallbacks
from .channel_list import LiveList
from .view_group import Family

ops = autograd.ops
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # what the operators take
_without_rules = torch._C.DisableTorchFunctionSubclass
RULES: dict[Any, Any] = {}  # torch function -> rule(func, args, kwargs); NotImplemented: not these arguments


class LiveTensor(Tensor):
    """compact [N, live, ...] and the list `live`; every other channel is exactly zero, and none of it is stored.

    To everybody it is the tensor of full width: shape, dtype, device, isinstance, autograd. Operators with a rule
    (flow/rules.py) compute the live channels alone; all others get the full-width tensor, whether they are called from
    Python or meet this object below it, where its autograd history leads back to `compact`. Made by wrap().
    """

    live: LiveList
    _compact: Tensor
    _full: Tensor | None
    _full_version: int  # of compact, when _full was made
    _may_get_history: bool  # made where gradients are off, maybe in an autograd.Function, which sets one when it ends
    _history: Any = None  # the one it has now, if so
    _family: Family | weakref.ref[Family] | None = None  # of a view, of what it is a view of

    @staticmethod
    def __new__(cls, compact: Tensor, live: LiveList) -> LiveTensor:
        size = compact.shape
        full_size = (size[0], live.channels, *size[2:])
        strides = None if compact.is_contiguous() else _strides(compact, full_size)
        self: LiveTensor = autograd.live_wrapper(cls, compact, live.index(compact.device), full_size, strides)
        self._hold(compact, live)
        return self

    def _hold(self, compact: Tensor, live: LiveList) -> None:
        self._compact, self.live, self._full = compact, live, None
        self._may_get_history = not torch.is_grad_enabled()

    @property
    def compact(self) -> Tensor:
        """[N, live, ...]"""
        if self._may_get_history and torch.is_grad_enabled():
            self._take_history()
        return self._compact

    def _take_history(self) -> None:
        self._may_get_history = False
        with _without_rules():
            if self.grad_fn is not self._history:
                self._compact = self.index_select(1, self.live.rows(self._compact.device))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(func)
        if rule is not None and args and not (kwargs and "out" in kwargs):
            result = rule(func, args, kwargs)
            if result is not NotImplemented:
                return result
        return _on_full_width(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Below autograd, for what did not pass __torch_function__ (C++ code, autograd.Function)."""
        fallbacks.note(func)
        with torch.no_grad():
            if func._schema.is_mutable:
                return _write_below(func, args, kwargs or {})
            args, kwargs = tree_map_only(LiveTensor, LiveTensor.full, (args, kwargs or {}))
            return func(*args, **kwargs)

    def full(self) -> Tensor:
        """The full-width tensor, with exact zeros in dead channels; kept for the next who asks."""
        compact = self.compact
        if self.live.full:
            return compact
        if self._full is not None and self._full_version == compact._version:
            return self._full
        # Whoever asks first may be without gradients; the next may not. Out of inference mode writes are noticed.
        mode = torch.inference_mode(False) if torch.is_inference_mode_enabled() else torch.enable_grad()
        with _without_rules(), mode:
            full = widen(compact, self.live)
        if full.requires_grad == compact.requires_grad and not compact.is_inference():
            self._full, self._full_version = full, compact._version
        return full

    def become(self, compact: Tensor, live: LiveList) -> LiveTensor:
        """Other values for this very object, as an operation in place leaves them."""
        with _without_rules():
            if compact.requires_grad:
                autograd.attach_live(self, compact, live.index(compact.device))
            self._history = None if torch.is_grad_enabled() else self.grad_fn
        self._hold(compact, live)
        return self

    def become_full(self) -> Tensor:
        """From now on this object stores the full-width tensor, which is returned, and its views are views of that."""
        if self.live.full:
            return self.compact
        family = self._relatives()
        if family is not None and family.shared():
            family.widen()
            return self.compact
        full = self.full()
        self.become(full, LiveList.all(self.live.channels))
        return full

    def shares_memory(self) -> bool:
        """Whether a write to this tensor could be read through another."""
        family = self._relatives()
        return family is not None and family.shared()

    def _relatives(self) -> Family | None:
        family = self._family
        return family() if isinstance(family, weakref.ref) else family

    def view_of(self, compact: Tensor, live: LiveList, replay: Callable[[Tensor], Tensor]) -> Tensor:
        """A view of this tensor. replay: makes it of the full-width tensor."""
        if self.live.full:
            return compact
        with _without_rules():
            view = LiveTensor(compact, live)
        (self._relatives() or Family(self)).add(view, self, replay)
        return view

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LiveTensor({self.live.count}/{self.live.channels} live, {self.full()!r})"


def can_flow(x: Tensor) -> bool:
    """Whether a layer may make live tensors of x: not where torch records, compiles or transforms what it does."""
    if type(x) is not Tensor and type(x) is not LiveTensor:
        return False
    recorded = torch.compiler.is_compiling() or torch._C._is_tracing()
    return not recorded and not torch._C._are_functorch_transforms_active()


def wrap(compact: Tensor, live: LiveList) -> Tensor:
    """The tensor whose channels `live` are compact and whose others are zero; compact itself if none is dead."""
    if live.full:
        return compact
    with _without_rules():
        return LiveTensor(compact, live)


def widen(compact: Tensor, live: LiveList) -> Tensor:
    """compact [N, live, ...] with zeros put in: [N, channels, ...]."""
    if live.full:
        return compact
    size = compact.shape
    if compact.dtype not in FLOATS:
        full = compact.new_zeros(size[0], live.channels, *size[2:])
        return full.index_copy_(1, live.rows(compact.device), compact)
    planes = compact if compact.dim() == 4 else compact.reshape(size[0], size[1], math.prod(size[2:]), 1)
    full = functional.scatter_channels(planes, live.index(compact.device), live.channels)
    return full if compact.dim() == 4 else full.reshape(size[0], live.channels, *size[2:])


def regroup(compact: Tensor, live: LiveList, to: LiveList) -> Tensor:
    """compact [N, live, ...] -> [N, to, ...]: channels of the one list brought to their places in the other."""
    if to is live:
        return compact
    if compact.dtype not in FLOATS:
        return widen(compact, live).index_select(1, to.rows(compact.device))
    remap = live.remap(to, compact.device)
    if compact.dim() == 4:
        return ops.regroup_channels(compact, *remap)
    size = compact.shape
    planes = compact.reshape(size[0], size[1], math.prod(size[2:]), 1)
    return ops.regroup_channels(planes, *remap).reshape(size[0], to.count, *size[2:])


def full_width(tree: Any) -> Any:
    """Every live tensor in a tree of containers replaced by its full-width tensor."""
    return tree_map_only(LiveTensor, LiveTensor.full, tree)


def _strides(compact: Tensor, size: tuple[int, ...]) -> tuple[int, ...] | None:
    if compact.dim() != 4 or not compact.is_contiguous(memory_format=torch.channels_last):
        return None
    _, C, H, W = size
    return (C * H * W, 1, C * W, C)


def _on_full_width(func: Any, args: Any, kwargs: Any) -> Any:
    """No rule: every live tensor is widened. One that func wrote to, or whose memory the result shares, stays wide."""
    fallbacks.note(func)
    widened: list[tuple[LiveTensor, Tensor, int]] = []

    def full(x: LiveTensor) -> Tensor:
        wide = x.become_full() if x.shares_memory() else x.full()
        widened.append((x, wide, _version(wide)))
        return wide

    args, kwargs = tree_map_only(LiveTensor, full, (args, kwargs))
    result = func(*args, **kwargs)
    for x, wide, version in widened:
        if wide.shape != x.shape:
            raise NotImplementedError(
                f"{fallbacks.name(func)}: expected a plain tensor to reshape in place, got a live one"
            )
        if _version(wide) != version or any(_shares_memory(each, wide) for each in tree_leaves(result)):
            x.become(wide, LiveList.all(x.live.channels))
        if result is wide:
            result = x
    return result


def _write_below(func: Any, args: Any, kwargs: Any) -> Any:
    """func writes where no rule is asked: a live tensor that it writes to has full width from then on."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    to_write = [given.get(a.name) for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    wide = [(x, x.full().clone()) for x in to_write if type(x) is LiveTensor]
    if any(x.shares_memory() for x, _ in wide):
        raise NotImplementedError(f"{func}: expected a tensor without views to write to, got a live tensor with some")

    def full(x: LiveTensor) -> Tensor:
        return next((values for live, values in wide if live is x), x.full())

    result = func(*tree_map_only(LiveTensor, full, args), **tree_map_only(LiveTensor, full, kwargs))
    for x, values in wide:
        x.become(values, LiveList.all(x.live.channels))
        x._history = NotImplemented  # autograd sets another when this returns, or leaves that of this object
        result = x if result is values else result
    return result


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _shares_memory(value: Any, wide: Tensor) -> bool:
    return isinstance(value, Tensor) and torch._C._is_alias_of(value, wide)  # type: ignore[attr-defined]


def _skip_in_dynamo(*methods: Any) -> None:
    """What these run is torch.compile's to leave alone: it cannot see through a tensor of another kind.

    torch.compiler.disable says the same, at the cost of importing the compiler and of a microsecond a call.
    """
    frames: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
    if all(hasattr(frames, n) for n in ("set_code_exec_strategy", "_FrameExecStrategy", "_FrameAction")):
        skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
        for method in methods:
            frames.set_code_exec_strategy(method.__func__.__code__, skip)


_skip_in_dynamo(LiveTensor.__torch_function__, LiveTensor.__torch_dispatch__)
