"""Phases: which soft-dead filters train along at which steps of an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

WAKES = ("together", "in_turns")


class Phases:
    """Divides the steps of an epoch into phases, in each of which some soft-dead filters are awake: they train along.

    Each is awake for the share `duty` of the steps. Together: all of them in the last phase of two. In turns: the
    soft-dead filters of a unit are dealt into as many groups as there are phases, and each phase wakes one group. All
    groups of a unit are of one size, so that every phase computes as many filters as the others.

    Attributes:
        steps_per_epoch: Length of an epoch; None: not known yet, so that all are awake.
    """

    def __init__(self, duty: float, wake: str, steps_per_epoch: int | None) -> None:
        self.duty, self.steps_per_epoch = duty, steps_per_epoch
        self._turns = round(1 / duty) if wake == "in_turns" and 0 < duty < 1 else 0
        self._orders: list[Tensor] = []  # by unit: int64, its soft-dead filters as they were dealt

    @property
    def deals(self) -> bool:
        """Whether groups take turns, so that each pruning has to deal soft-dead filters into groups."""
        return self._turns > 0

    def deal(self, soft: Sequence[Tensor], keys: Sequence[Tensor]) -> None:
        """Deals soft-dead filters into groups, in the order of their keys.

        Args:
            soft: By unit, bool [width].
            keys: By unit, [width], random numbers.
        """
        rows = [mask.nonzero().flatten() for mask in soft]
        self._orders = [r[key[r].argsort(stable=True)] for r, key in zip(rows, keys, strict=True)]

    def at(self, step: int) -> int:
        """The phase of a step, counted from 0. Two phases one after another have other masks."""
        if self._turns and self.steps_per_epoch is not None:
            return min(step * self._turns // self.steps_per_epoch, self._turns - 1)
        return int(step >= self._sparse_steps())

    def wakes_none(self, step: int) -> bool:
        """Whether all soft-dead filters are masked at a step."""
        return step < self._sparse_steps() and not self._takes_turns

    def awake(self, soft: Sequence[Tensor], step: int) -> list[Tensor]:
        """By unit, bool [width]: which of the soft-dead filters train along at a step."""
        if self.wakes_none(step):
            return [torch.zeros_like(mask) for mask in soft]
        if not self._takes_turns:
            return list(soft)
        awake, turn = [], self.at(step)
        for mask, order in zip(soft, self._orders, strict=True):
            size = -(-len(order) // self._turns)
            woken = torch.zeros_like(mask)
            woken[order[(turn * size + torch.arange(size)) % max(1, len(order))]] = True
            awake.append(woken & mask)
        return awake

    @property
    def _takes_turns(self) -> bool:
        return bool(self._turns and self._orders) and self.steps_per_epoch is not None

    def _sparse_steps(self) -> float:
        """How many steps the phase at the start of an epoch has in which all sleep."""
        if self.duty in (0, 1):
            return torch.inf if self.duty == 0 else 0
        if self.steps_per_epoch is None or self._turns:
            return 0
        return self.steps_per_epoch - max(1, round(self.duty * self.steps_per_epoch))

    def state_dict(self) -> dict[str, Any]:
        """Returns the groups and the length of an epoch."""
        return {"steps_per_epoch": self.steps_per_epoch, "orders": [order.clone() for order in self._orders]}

    def load_state_dict(self, state: dict[str, Any], *, keeps_length: bool) -> None:
        """Restores what state_dict returned; an older checkpoint has no groups."""
        if not keeps_length:
            self.steps_per_epoch = state["steps_per_epoch"]
        self._orders = [order.cpu().clone() for order in state.get("orders", [])]
