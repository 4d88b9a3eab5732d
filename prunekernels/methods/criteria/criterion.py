"""Criterion: what a method asks to score its filters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..view import MethodView

Scores = dict[str, Tensor]  # by layer name, [K]


class Criterion:
    """Scores the filters of a method's layers; those with the smallest scores are pruned.

    A method calls `start` once, `begin_epoch` before each epoch and `scores` at its end. A subclass overrides `scores`
    and, where it gathers numbers during the epoch, the rest.

    Attributes:
        method: The method that is served (set by `start`): its layers, optimizer, channel masks and generator.
        needs_steps: Whether there are no scores before the first optimizer steps.

    Examples:
        >>> class Newest(pk.methods.criteria.Criterion):
        ...     def scores(self):
        ...         layers = self.method.layers.items()
        ...         return {name: -torch.arange(layer.out_channels).float() for name, layer in layers}
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 2, 3))
        >>> report = pk.convert(net)
        >>> optimizer = torch.optim.SGD(net.parameters(), 0.1)
        >>> pk.methods.SFP(net, optimizer, rate=0.5, criterion=Newest()).states["0"]
        tensor([0, 0, 1, 1], dtype=torch.int8)
    """

    needs_steps = False

    def start(self, method: MethodView) -> None:
        """Begins to serve a method.

        Args:
            method: Its model, layers (by name), optimizer, channel masks and random generator.
        """
        self.method = method

    def begin_epoch(self) -> None:
        """Discards the statistics of the previous epoch."""

    def scores(self) -> Scores:
        """Returns a score for each filter: by layer name, [K]."""
        raise NotImplementedError

    def stop(self) -> None:
        """Removes the criterion's hooks."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what this epoch has gathered so far, as plain values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what state_dict returned."""


class Random(Criterion):
    """Scores filters by uniform random numbers, from the method's generator.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 2, 3))
        >>> report = pk.convert(net)
        >>> optimizer = torch.optim.SGD(net.parameters(), 0.1)
        >>> method = pk.methods.SFP(net, optimizer, rate=0.5, criterion="random", seed=1)
        >>> int((method.states["0"] == 1).sum())
        2
    """

    def scores(self) -> Scores:
        generator = self.method.generator
        return {n: torch.rand(layer.out_channels, generator=generator) for n, layer in self.method.layers.items()}
