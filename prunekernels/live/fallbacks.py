"""Fallbacks to full width: which operation had no rule for live tensors, in which module, how often."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


class _Recording:
    def __init__(self, model: nn.Module | None) -> None:
        self.names = {} if model is None else {id(module): name for name, module in model.named_modules()}
        self.counts: dict[tuple[str, str], int] = {}  # (operation, module) -> fallbacks
        self.thread = get_ident()  # only this thread is recorded
        self.modules: list[nn.Module] = []  # those whose forward runs now, innermost last

    def enter(self, module: nn.Module) -> None:
        if get_ident() == self.thread:
            self.modules.append(module)

    def leave(self) -> None:
        if self.modules and get_ident() == self.thread:  # empty if the module was entered before the recording began
            self.modules.pop()


_current: _Recording | None = None


def record(op: Any) -> None:
    """Counts one fallback, if a recording is on. op: a torch function, or a text."""
    if _current is None or _current.thread != get_ident():
        return
    innermost = _current.modules[-1] if _current.modules else None
    module = "" if innermost is None else _current.names.get(id(innermost), type(innermost).__name__)
    key = (op if isinstance(op, str) else name(op), module)
    _current.counts[key] = _current.counts.get(key, 0) + 1


def name(func: Any) -> str:
    """The name of a torch function, as a user knows it."""
    if isinstance(func, torch._ops.OpOverload):
        return str(func)
    name = getattr(func, "__name__", str(func))
    owner = getattr(func, "__self__", None)  # the getter of a property is called __get__; its owner has the name
    return getattr(owner, "__name__", name) if name == "__get__" else name


@contextmanager
def recording(model: nn.Module | None = None) -> Iterator[list[dict[str, Any]]]:
    """Counts the fallbacks inside the block, on this thread. The list is filled when the block ends.

    Args:
        model: The network whose module names the rows use; without it they use class names.

    Returns:
        A context manager that gives a list of rows {"op", "module", "count"}, the most frequent first.

    Examples:
        >>> from prunekernels.live import recording
        >>> model = torch.nn.Sequential(pk.MaskedConv2d(3, 8, 3), torch.nn.Softmax(1))
        >>> model[0].set_masks(filter=torch.arange(8) > 3)
        >>> with recording(pk.flow(model)) as fallbacks:
        ...     y = model(torch.randn(2, 3, 6, 6))
        >>> fallbacks
        [{'op': 'softmax', 'module': '1', 'count': 1}]
    """
    global _current
    rows: list[dict[str, Any]] = []
    outer, _current = _current, _Recording(model)
    mine = _current
    handles = [
        register_module_forward_pre_hook(lambda module, args: mine.enter(module)),
        register_module_forward_hook(lambda module, args, result: mine.leave(), always_call=True),
    ]
    try:
        yield rows
    finally:
        _current = outer
        for handle in handles:
            handle.remove()
        found = sorted(mine.counts.items(), key=lambda item: -item[1])
        rows.extend({"op": op, "module": module, "count": count} for (op, module), count in found)
