"""FilterStates: which filters are soft-dead and hard-dead, by unit and by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..graph import Group
from .ranking import Counts


class FilterStates:
    """Two masks per unit, and what they say of each layer's filters.

    A unit is a Group of filters that are pruned together: one layer's, or those of several layers that meet in adds.
    dead includes hard. The lists are replaced, never written to: a new `dead` is another object.
    """

    def __init__(self, units: Sequence[Group]) -> None:
        self.units = list(units)
        self.dead = [torch.zeros(unit.width, dtype=torch.bool) for unit in self.units]  # by unit: bool [width], on CPU
        self.hard = [dead.clone() for dead in self.dead]

    @property
    def soft(self) -> list[Tensor]:
        """By unit, bool [width]."""
        return [dead & ~hard for dead, hard in zip(self.dead, self.hard, strict=True)]

    def of_layer(self, by_unit: Sequence[Tensor], name: str) -> Tensor:
        """bool [K]: the entries of these unit masks that belong to a layer's filters."""
        unit, mask = next((u, m) for u, m in zip(self.units, by_unit, strict=True) if name in u.filters)
        return mask[unit.filters[name]]

    def codes(self, name: str) -> Tensor:
        """int8 [K]: 0 live, 1 soft-dead, 2 hard-dead."""
        return self.of_layer(self.dead, name).to(torch.int8) + self.of_layer(self.hard, name).to(torch.int8)

    def counts(self, name: str, was_dead: Tensor) -> Counts:
        """A layer's Counts. was_dead: bool [K], its dead filters before this epoch's pruning."""
        is_dead = self.of_layer(self.dead, name)
        dead, hard = int(is_dead.sum()), int(self.of_layer(self.hard, name).sum())
        return Counts(len(is_dead) - dead, dead - hard, hard, int((was_dead & ~is_dead).sum()))
