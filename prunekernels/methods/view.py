"""MethodView: what criteria and SoftClip need of the Method they work for. They import this, never base."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..nn.masked_filters import MaskedFilters
from .channel_masks import ChannelMasks
from .filter_states import FilterStates


class MethodView(Protocol):
    """The part of Method that does not prune: the network, its layers and where in an epoch training stands."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    layers: dict[str, MaskedFilters]
    filters: FilterStates
    channel_masks: ChannelMasks
    generator: torch.Generator

    @property
    def finished(self) -> bool:
        """Whether the epochs of pruning are over."""

    @property
    def prunes_last(self) -> bool:
        """Whether the pruning at the end of this epoch is the last one."""

    @property
    def hides_soft(self) -> bool:
        """Whether soft-dead filters are masked at this step."""

    @property
    def net(self) -> nn.Module:
        """The network that trains now: the model, or the small one in its place."""

    @property
    def is_compacted(self) -> bool:
        """Whether the small network trains now."""

    def write_back(self) -> None:
        """Gives the model and its optimizer what the small network has."""

    def rows(self, name: str) -> Tensor | None:
        """Which filters of a layer the network that trains now computes, -1 = zeros; None: all."""

    def gradient(self, name: str) -> Tensor | None:
        """The gradient of a layer's weight in the network that trains now, with the filters that rows tells."""

    def before_step(
        self,
        work: Callable[[], None],
        *,
        when: Callable[[], bool] | None = None,
        full_width: bool = True,
        reads_weights: bool = True,
        changes_gradients: bool = True,
    ) -> Any:
        """Registers work to run before each optimizer step; returns the handle that removes it."""

    def after_step(
        self, work: Callable[[], None], *, when: Callable[[], bool] | None = None, reads_weights: bool = True
    ) -> Any:
        """Registers work to run after each optimizer step; returns the handle that removes it."""

    def forward_hook(self, name: str, hook: Callable[..., None]) -> Any:
        """Registers a forward hook on a module in either form; returns the handle that removes it."""

    def full_gradients(self, *, changes: bool = False, added: bool = False) -> AbstractContextManager[None]:
        """Within the block the model's parameters have the gradients of the network that trains now."""
