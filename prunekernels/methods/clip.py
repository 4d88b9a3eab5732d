"""SoftClip: gradients of soft-dead filters no longer than those of live ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..filter_ops import filter_norms, mask_grad_

if TYPE_CHECKING:
    from .base import Method


class SoftClip:
    """Before each optimizer step: a soft-dead filter's gradient is scaled down to its layer's mean over live filters.

    A filter of zeros has outputs without variance, and batch norm multiplies its gradient by 1 / sqrt(eps), 316 times.
    One step of that length makes it the largest of its layer: it comes back whatever it is worth, and for its length
    learns nothing more.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self._seen: list[Tensor] | None = None
        self._soft: dict[str, tuple[Tensor, Tensor]] = {}  # soft-dead and live filters, by layer that has both
        self._hook = method.before_step(self._clip)

    def stop(self) -> None:
        self._hook.remove()

    @torch.no_grad()
    def _clip(self) -> None:
        if self.method.finished or self.method.hides_soft:
            return
        self._find_soft()
        layers = self.method.layers
        batches: dict[tuple[torch.device, torch.dtype], list[str]] = {}
        for name in self._soft:
            grad = layers[name].weight.grad
            if grad is not None:
                batches.setdefault((grad.device, grad.dtype), []).append(name)
        for names in batches.values():
            grads: list[Tensor] = [layers[name].weight.grad for name in names]  # type: ignore[misc]
            lengths = zip(names, filter_norms(grads), strict=True)
            mask_grad_(grads, grad_scales=[_scale(length, *self._soft[name]) for name, length in lengths])

    def _find_soft(self) -> None:
        if self._seen is self.method._dead:
            return
        self._seen, self._soft = self.method._dead, {}
        for name, states in self.method.states.items():
            if bool((states == 1).any()) and bool((states == 0).any()):
                states = states.to(self.method.layers[name].weight.device)
                self._soft[name] = states == 1, states == 0


def _scale(length: Tensor, soft: Tensor, live: Tensor) -> Tensor:
    """float32 [K]."""
    bound = torch.where(live, length, 0).sum() / live.sum()
    return torch.where(soft & (length > bound), bound / length, 1).float()
