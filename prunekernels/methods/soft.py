"""Soft filter pruning: SFP, ASFP, SRFP, ASRFP. Pruning is an event at an epoch's end; in between all filters train."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import schedules
from .base import FUNCTION, Method, is_share
from .schedules import Schedule

rising = partial(schedules.asymptotic, full_from=0.9)


class SFP(Method):
    """Soft filter pruning: before the first epoch and after each, the filters with the smallest L2 norms become zero.

    Momentum, biases and norms stay as they are, and with duty=1 all filters train on, as published (see Method for
    less). SFP, ASFP, SRFP and ASRFP differ in the defaults of what follows; rate and options are Method's.

    schedule: the pruned share by epoch, one of prunekernels.methods.schedules. alpha: what pruned weights are
    multiplied by, at first; alpha_schedule: how that goes on. scale_norms: norms are multiplied like their filters.
    """

    prunes_first = True
    default_schedule: Schedule = staticmethod(schedules.constant)
    default_alpha = 0.0

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rate: float = 0.5,
        epochs: int = 200,
        *,
        schedule: Schedule | None = None,
        alpha: float | None = None,
        alpha_schedule: Schedule = schedules.decay,
        scale_norms: bool = False,
        **options: Any,
    ) -> None:
        self.schedule = schedule or self.default_schedule
        self.alpha = self.default_alpha if alpha is None else alpha
        self._expect(is_share(self.alpha), "alpha", "a number in [0, 1]", alpha)
        for name, value in (("schedule", self.schedule), ("alpha_schedule", alpha_schedule)):
            self._expect(callable(value), name, FUNCTION, repr(value))
        self.alpha_schedule, self.scale_norms = alpha_schedule, scale_norms
        super().__init__(model, optimizer, rate, epochs, **options)

    def pruned_share(self, epoch: int) -> float:
        return self.schedule(self.rate, epoch, self.epochs)

    def soften(self, name: str, rows: Tensor, epoch: int) -> None:
        alpha = self.alpha_schedule(self.alpha, epoch, self.epochs)
        parameters = [self.layers[name].weight]
        if self.scale_norms:
            parameters += [p for norm in self.norms_of(name) for p in (norm.weight, norm.bias) if p is not None]
        for p in parameters:
            p[rows] = p[rows] * alpha if alpha else 0.0


class ASFP(SFP):
    """Asymptotic SFP: the pruned share rises from 0.

    Sources disagree on how fast: schedules.asymptotic with share=3/4 (default) or 1/4; there is no official code. As in
    public code all of it is pruned from 0.9 of the epochs on, so that there is training after the last filters went.
    """

    default_schedule = staticmethod(rising)


class SRFP(SFP):
    """SofteR filter pruning: pruned weights are multiplied by an alpha that decays to 0, from 0.5 by default."""

    default_alpha = 0.5


class ASRFP(SRFP):
    """ASFP's rising share with SRFP's alpha."""

    default_schedule = staticmethod(rising)
