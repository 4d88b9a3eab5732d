"""GHFP: gradually hard filter pruning."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from . import schedules
from .arguments import is_share
from .ranking import Ranking
from .schedules import Schedule
from .soft import SFP


class GHFP(SFP):
    """Gradually hard filter pruning: SFP in which a growing share of the pruned filters is pruned for good.

    Of the int(N P_t) pruned filters of a layer the weakest int(N P_t lambda_t) are hard-dead, where

        lambda_t = 1 - (1 - (t + 1) / T)^3

    A hard-dead filter is masked and frozen, and its momentum zero (published code leaves the momentum, through which a
    filter can leak back). Special cases: hard=0 is SFP, or ASFP with a rising schedule, SRFP and ASRFP with alpha;
    hard=1 is hard filter pruning.

    Our reconstruction: these are the rules of later code by the paper's first author. That they are the paper's is
    inferred, and so is that before the first epoch nothing is hard-dead.

    Below duty 1, which is ours, what is left open is tuned as in SFP; lambda_t then runs over the epochs between
    warm_up and fine_tune.

    Args:
        model: See Method.
        optimizer: See Method.
        rate: See Method.
        epochs: See Method.
        hard: lambda_t: a number in [0, 1] for all epochs, or a function (1.0, epoch, epochs) as those of schedules.
        **options: Keywords of SFP and Method. schedule (P_t) is constant by default; schedules.cubic or
            schedules.exponential make it rise.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 2, 3))
        >>> report = pk.convert(net)
        >>> optimizer = torch.optim.SGD(net.parameters(), 0.1)
        >>> method = pk.methods.GHFP(net, optimizer, rate=0.5, epochs=3)
        >>> for epoch in range(3):
        ...     optimizer.zero_grad(); net(torch.randn(2, 1, 8, 8)).square().sum().backward()
        ...     optimizer.step(); method.step()
        ...     counts = method.end_epoch()
        ...     print(counts["0"].soft, counts["0"].hard)
        1 1
        1 1
        0 2
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rate: float = 0.5,
        epochs: int = 200,
        *,
        hard: float | Schedule = schedules.cubic,
        **options: Any,
    ) -> None:
        if not callable(hard):
            self._expect(is_share(hard), "hard", "a number in [0, 1] or a schedule", hard)
        self.hard_schedule: Schedule = hard if callable(hard) else partial(_fixed, hard)
        super().__init__(model, optimizer, rate, epochs, **options)

    def hard_counts(self, epoch: int, rankings: list[Ranking], dead: list[int]) -> list[int]:
        return self._counts(rankings, epoch, self._scheduled(self.hard_schedule, 1.0, epoch))


def _fixed(value: float, final: float, epoch: int, epochs: int) -> float:
    """A schedule that is the same in all epochs."""
    return value * final
