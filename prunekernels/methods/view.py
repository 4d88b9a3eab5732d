"""MethodView: what criteria and SoftClip need of the Method they work for. They import this, never base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from ..nn.conv import MaskedConv2d
from .channel_masks import ChannelMasks
from .filter_states import FilterStates


class MethodView(Protocol):
    """The part of Method that does not prune: the network, its layers and where in an epoch training stands."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    layers: dict[str, MaskedConv2d]
    filters: FilterStates
    channel_masks: ChannelMasks
    generator: torch.Generator

    @property
    def finished(self) -> bool:
        """Whether the epochs of pruning are over."""

    @property
    def hides_soft(self) -> bool:
        """Whether soft-dead filters are masked at this step."""

    def before_step(self, work: Callable[[], None]) -> Any:
        """Registers work to run before each optimizer.step(); returns the handle that removes it."""
