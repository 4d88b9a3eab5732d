"""GHFP: gradually hard filter pruning."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from . import schedules
from .base import is_share
from .ranking import Ranking, counts
from .schedules import Schedule
from .soft import SFP


class GHFP(SFP):
    """Gradually hard filter pruning: as SFP, but a growing share of what is pruned is pruned for good.

    hard: that share, a number or a schedule's function of epoch; by default 1 - (1 - (t + 1) / T)^3. A hard-dead filter
    is masked and frozen, its momentum zero (published code leaves the momentum, which lets a filter leak back). The
    weakest filters become hard-dead first. Special cases: hard=0 is SFP, with a rising schedule ASFP, with alpha SRFP
    and ASRFP; hard=1 is HFP. schedule: of the pruned share, constant by default; cubic or exponential make it rise.

    Our reconstruction: the paper's first author's later code has these rules; that they are the paper's is inferred,
    and so is that before the first epoch the hard share is 0.
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
        shares = (self.pruned_share(epoch), self.hard_schedule(1.0, epoch, self.epochs))
        return counts(rankings, shares, self.budget, self.round_to)


def _fixed(value: float, final: float, epoch: int, epochs: int) -> float:
    return value * final
