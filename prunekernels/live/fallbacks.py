"""What breaks the flow: which operation got a full-width tensor, in which module, how often. pk.explain reads it."""

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
        self.counts: dict[tuple[str, str], int] = {}
        self.thread = get_ident()  # the others are not asked
        self.modules: list[nn.Module] = []

    def enter(self, module: nn.Module) -> None:
        if get_ident() == self.thread:
            self.modules.append(module)

    def leave(self) -> None:
        if self.modules and get_ident() == self.thread:  # none: entered before the recording began
            self.modules.pop()


_current: _Recording | None = None


def note(op: Any) -> None:
    """Counts one widening; op: a torch function, or a text."""
    if _current is None or _current.thread != get_ident():
        return
    innermost = _current.modules[-1] if _current.modules else None
    module = "" if innermost is None else _current.names.get(id(innermost), type(innermost).__name__)
    key = (op if isinstance(op, str) else name(op), module)
    _current.counts[key] = _current.counts.get(key, 0) + 1


def name(func: Any) -> str:
    if isinstance(func, torch._ops.OpOverload):
        return str(func)
    name = getattr(func, "__name__", str(func))
    owner = getattr(func, "__self__", None)  # a property's getter is called __get__: its owner knows its name
    return getattr(owner, "__name__", name) if name == "__get__" else name


@contextmanager
def record(model: nn.Module | None = None) -> Iterator[list[dict[str, Any]]]:
    """Inside the block every widening is counted; the list is filled when the block ends, the most frequent first.

    Rows: {"op", "module", "count"}; module: its name in `model`, or its class without one.

        >>> with record(model) as breaks:
        ...     model(x)
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
