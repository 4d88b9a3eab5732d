"""PruneWhileTraining: filters go for good while the network trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .base import Method
from .ranking import Ranking


class PruneWhileTraining(Method):
    """Prunes filters for good at fixed intervals of the training itself; no retraining afterwards.

    criterion: "l1" (default), "mean_activation" or "random". The first filters go after epoch `start`, the next every
    `period` epochs, the same number each time, until `rate` is reached at the end of epoch `end` at the latest.

    Our reconstruction: the abstract has the criteria; start, period and end (5, 5 and half of the epochs; fewer where
    these are few) are our choice.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rate: float = 0.5,
        epochs: int = 200,
        *,
        start: int | None = None,
        period: int | None = None,
        end: int | None = None,
        **options: Any,
    ) -> None:
        for name, value in (("start", start), ("period", period), ("end", end)):
            self._expect(value is None or isinstance(value, int), name, "an integer", repr(value))
        epochs_that_prune = self._epochs_that_prune(epochs, options.get("fine_tune"))
        end = max(0, min(epochs // 2, epochs_that_prune) - 1) if end is None else end
        self.period = max(1, min(5, epochs // 20)) if period is None else period
        self.start = min(5, epochs // 20, end) if start is None else start
        self.end = end
        self._expect(self.period >= 1, "period", "at least 1", period)
        is_within = 0 <= self.start <= end < epochs_that_prune
        self._expect(is_within, "start, end", f"0 <= start <= end < {epochs_that_prune}", (self.start, end))
        super().__init__(model, optimizer, rate, epochs, **{"criterion": "l1", **options})

    def pruned_share(self, epoch: int) -> float:
        if epoch < self.start:
            return 0.0
        events = 1 + (self.end - self.start) // self.period
        passed = min(events, 1 + (epoch - self.start) // self.period)
        return self.rate if passed == events else self.rate * passed / events

    def hard_counts(self, epoch: int, rankings: list[Ranking], dead: list[int]) -> list[int]:
        return dead
