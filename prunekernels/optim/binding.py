"""Binding: the tie between an optimizer and the masks of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .dead_rows import DeadRows, MaskedLayer


class Binding:
    """The tie between an optimizer and the masks of a model, as `prunekernels.optim.bind` makes it.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
        >>> report = pk.convert(model)
        >>> optimizer = pk.optim.MaskedSGD(model.parameters(), lr=0.1)
        >>> binding = pk.optim.bind(optimizer, model)
        >>> model[0].set_masks(hard=torch.arange(8) > 3)
        >>> len(binding.tables())  # weight and bias have frozen rows
        2
        >>> binding.remove()
    """

    def __init__(self, optimizer: torch.optim.Optimizer, layers: list[MaskedLayer], freeze: str) -> None:
        self.optimizer = optimizer
        self.hooks: list[Any] = []  # handles of the hooks that this binding put on the optimizer
        self.freeze = freeze  # for an optimizer that has none of its own
        self._layers = layers
        self._by_freeze: dict[str, DeadRows] = {}

    def tables(self, freeze: str | None = None) -> Mapping[Tensor, Tensor]:
        """The mask table of each parameter that has something frozen: a step leaves alone what is dead in it.

        Args:
            freeze: "hard" or "dead"; None: what `bind` was given.

        Returns:
            Parameter -> mask table (int32). Parameters with nothing frozen are absent.
        """
        freeze = freeze or self.freeze
        if freeze not in self._by_freeze:
            self._by_freeze[freeze] = DeadRows(self._layers, freeze)
        return self._by_freeze[freeze].tables()

    def remove(self) -> None:
        """Undoes the binding: from now on the optimizer steps as if nothing was dead."""
        for hook in self.hooks:
            hook.remove()
        if self.optimizer.__dict__.get("_binding") is self:
            del self.optimizer.__dict__["_binding"]
