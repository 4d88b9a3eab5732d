"""CaughtCall: one call of a network in training, caught so that the same call can be timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..nn.example import Example
from ..nn.mask_buffers import MaskBuffers


class CaughtCall:
    """The next call of a network in training mode, whichever of its modules the library calls.

    Attributes:
        module: The outermost module that was called and holds all masked layers; None: none was called yet.
        example: Its arguments.
    """

    def __init__(self, model: nn.Module) -> None:
        self.module: nn.Module | None = None
        self.example: Example | None = None
        self._autocast: tuple[str, torch.dtype] | None = None
        self._handles = [
            module.register_forward_pre_hook(_Hook(self._catch), with_kwargs=True) for module in _whole_parts(model)
        ]

    def autocast(self) -> AbstractContextManager[Any]:
        """The autocast that the call was made under."""
        return nullcontext() if self._autocast is None else torch.autocast(self._autocast[0], self._autocast[1])

    def stop(self) -> None:
        """Catches no more."""
        while self._handles:
            self._handles.pop().remove()

    def _catch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.module is not None or not (module.training and torch.is_grad_enabled()):
            return
        self.module, self.example = module, Example(*args, **kwargs)
        device = next(module.parameters()).device.type
        if torch.is_autocast_enabled(device):
            self._autocast = device, torch.get_autocast_dtype(device)


class _Hook:
    """A forward pre-hook. Copies and pickles of a network have an idle one."""

    def __init__(self, catch: Callable[..., None] | None) -> None:
        self.catch = catch

    def __call__(self, *args: Any) -> None:
        if self.catch is not None:
            self.catch(*args)

    def __reduce__(self) -> Any:
        return _idle_hook, ()


def _idle_hook() -> _Hook:
    return _Hook(None)


def _whole_parts(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and what of it holds all masked layers, from the outside in."""
    total, part = _masked(model), model
    while True:
        yield part
        inner = [child for child in part.children() if _masked(child) == total]
        if not inner:
            return
        part = inner[0]


def _masked(module: nn.Module) -> int:
    return sum(isinstance(layer, MaskBuffers) for layer in module.modules())
