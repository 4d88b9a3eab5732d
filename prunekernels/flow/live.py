"""LiveTensor: the live channels of a tensor, passed on as if it were the whole tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .. import _ext, autograd, functional
from . import breaks
from .lists import LiveList

ops = autograd.ops
_without_rules = torch._C.DisableTorchFunctionSubclass
RULES: dict[Any, Any] = {}  # torch function -> rule(func, args, kwargs); NotImplemented: not these arguments


class LiveTensor(Tensor):
    """compact [N, live, ...] and the list `live`; every other channel is exactly zero, and none of it is stored.

    To everybody it is the tensor of full width: shape, dtype, device, isinstance, autograd. Operators with a rule
    (flow/rules.py) compute the live channels alone; all others get the full-width tensor, whether they are called from
    Python or meet this object below it, where its autograd history leads back to `compact`. Made by wrap().
    """

    compact: Tensor
    live: LiveList
    _full: Tensor | None

    @staticmethod
    def __new__(cls, compact: Tensor, live: LiveList) -> LiveTensor:
        size = compact.shape
        full_size = (size[0], live.channels, *size[2:])
        strides = None if compact.is_contiguous() else _strides(compact, full_size)
        self: LiveTensor = autograd.live_wrapper(cls, compact, live.index(compact.device), full_size, strides)
        self.compact, self.live, self._full = compact, live, None
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(func)
        if rule is not None:
            result = rule(func, args, kwargs)
            if result is not NotImplemented:
                return result
        return _on_full_width(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Below autograd, for what did not pass __torch_function__ (C++ code, autograd.Function)."""
        if func._schema.is_mutable:
            raise NotImplementedError(f"{func}: expected a tensor of its own to write to, got a live tensor")
        breaks.note(func)
        with torch.no_grad():
            args, kwargs = tree_map_only(LiveTensor, LiveTensor.full, (args, kwargs or {}))
            return func(*args, **kwargs)

    def full(self) -> Tensor:
        """The full-width tensor, with exact zeros in dead channels; kept for the next who asks."""
        if self._full is None:
            with _without_rules():
                self._full = widen(self.compact, self.live)
        return self._full

    def become(self, compact: Tensor, live: LiveList) -> LiveTensor:
        """Other values for this very object, as an operation in place leaves them."""
        with _without_rules():
            if not _ext.has_extension():
                torch.utils.swap_tensors(self, LiveTensor(compact, live))
            elif compact.requires_grad:
                autograd.attach_live(self, compact, live.index(compact.device))
        self.compact, self.live, self._full = compact, live, None
        return self

    def become_full(self) -> Tensor:
        """From now on this object stores the full-width tensor, which is returned."""
        full = self.full()
        self.become(full, LiveList.all(self.live.channels))
        return full

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LiveTensor({self.live.count}/{self.live.channels} live, {self.full()!r})"


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
    planes = compact if compact.dim() == 4 else compact.reshape(size[0], size[1], -1, 1)
    full = functional.scatter_channels(planes, live.index(compact.device), live.channels)
    return full if compact.dim() == 4 else full.reshape(size[0], live.channels, *size[2:])


def regroup(compact: Tensor, live: LiveList, to: LiveList) -> Tensor:
    """compact [N, live, ...] -> [N, to, ...]: channels of the one list brought to their places in the other."""
    if to is live:
        return compact
    move = live.move(to, compact.device)
    if compact.dim() == 4:
        return ops.regroup_channels(compact, *move)
    size = compact.shape
    moved = ops.regroup_channels(compact.reshape(size[0], size[1], -1, 1), *move)
    return moved.reshape(size[0], to.count, *size[2:])


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
    breaks.note(func)
    widened: list[tuple[LiveTensor, Tensor, int]] = []

    def full(x: LiveTensor) -> Tensor:
        wide = x.full()
        widened.append((x, wide, wide._version))
        return wide

    args, kwargs = tree_map_only(LiveTensor, full, (args, kwargs))
    result = func(*args, **kwargs)
    for x, wide, version in widened:
        written = wide._version != version
        if written or (isinstance(result, Tensor) and result._is_view() and result._base is (wide._base or wide)):
            x.become(wide, LiveList.all(x.live.channels))
        if result is wide:
            result = x
    return result
