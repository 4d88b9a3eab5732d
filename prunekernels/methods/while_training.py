"""PruneWhileTraining: filters go for good while the network trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .base import Method
from .ranking import Ranking


class PruneWhileTraining(Method):
    """Prunes filters for good at fixed intervals of the training itself, without retraining afterwards.

    At the end of epoch `start`, and then every `period` epochs, the same number of filters becomes hard-dead, until
    `rate` is reached at the end of epoch `end` at the latest:

        P_t = rate min(n, 1 + (t - start) // period) / n,  n = 1 + (end - start) // period

    Our reconstruction: the abstract names the criteria ("l1", which the paper prefers, "mean_activation" and "random")
    and that filters go while the network trains. When they go is our choice: as below with duty=1, and at other times,
    found for short trainings, where duty is below 1. A method without soft-dead filters has no other use for duty.

    Args:
        model: See Method.
        optimizer: See Method.
        rate: See Method.
        epochs: See Method.
        start: The first epoch that prunes. None: 5, or fewer where there are less than 100 epochs (below duty 1:
            epochs // 4 - 1).
        period: Epochs between two prunings. None: 5, or fewer where there are less than 100 epochs (below duty 1:
            epochs // 8).
        end: The last epoch that may prune. None: the end of the first half of the epochs (below duty 1:
            3 epochs // 8 - 1).
        **options: Keywords of Method. criterion is "l1" by default.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 2, 3))
        >>> report = pk.convert(net)
        >>> optimizer = torch.optim.SGD(net.parameters(), 0.1)
        >>> method = pk.methods.PruneWhileTraining(net, optimizer, rate=0.5, epochs=6)
        >>> [round(method.pruned_share(epoch), 2) for epoch in range(6)]
        [0.17, 0.33, 0.5, 0.5, 0.5, 0.5]
    """

    has_warm_up = False
    default_criterion = "l1"

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
        super().__init__(model, optimizer, rate, epochs, **options)

    @classmethod
    def tuned(cls, epochs: int) -> dict[str, Any]:
        start = max(0, epochs // 4 - 1)
        return {"start": start, "period": max(1, epochs // 8), "end": max(start, 3 * epochs // 8 - 1)}

    def pruned_share(self, epoch: int) -> float:
        if epoch < self.start:
            return 0.0
        events = 1 + (self.end - self.start) // self.period
        passed = min(events, 1 + (epoch - self.start) // self.period)
        return self.rate if passed == events else self.rate * passed / events

    def hard_counts(self, epoch: int, rankings: list[Ranking], dead: list[int]) -> list[int]:
        return dead
