"""Whether rounding alone explains other outputs: a network that chooses by value, again, on the other one's values.

A detector sorts boxes by score and drops those that overlap a better one. Where scores tie, rounding decides, and all
that follows differs. Given what the small network's layers computed, the masked network makes the same choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Calls = dict[str, list[Tensor]]  # what each layer returned, call by call


@contextmanager
def recorded(network: nn.Module) -> Iterator[Calls]:
    """Keeps the outputs of layers, those that have no children."""
    calls: Calls = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                calls.setdefault(name, []).append(output.clone())

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in _layers(network)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replayed(network: nn.Module, calls: Calls, close: Callable[[Tensor, Tensor], bool]) -> Iterator[list[str]]:
    """Puts the outputs in calls in place of what layers return, where the shapes are the same.

    Yields the names of the layers whose outputs are not close, and stay, or which are called another number of times.
    """
    left = {name: list(outputs) for name, outputs in calls.items()}
    apart: list[str] = []

    def put(name: str) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: Any, output: Any) -> Tensor | None:
            if not isinstance(output, Tensor) or name not in left:
                return None
            other = left[name].pop(0) if left[name] else None
            if other is not None and other.shape != output.shape:
                return None
            if other is None or not close(output, other):
                apart.append(name)
                return None
            return other

        return hook

    handles = [layer.register_forward_hook(put(name)) for name, layer in _layers(network)]
    try:
        yield apart
    finally:
        for handle in handles:
            handle.remove()
    apart.extend(name for name, outputs in left.items() if outputs)


def _layers(network: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, layer) for name, layer in network.named_modules() if name and not any(layer.children())]
