"""Soft filter pruning: SFP, ASFP, SRFP, ASRFP. Filters are pruned at an epoch's end, and train on in the next."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import schedules
from .arguments import FUNCTION, is_share
from .base import Method
from .schedules import Schedule

rising = partial(schedules.asymptotic, full_from=0.9)


class SFP(Method):
    """Soft filter pruning: after each epoch the filters with the smallest L2 norms become zero, and train on.

    Before the first epoch and after each, of a layer's N filters the int(N P_t) with the smallest ||W_i||_2 are pruned:

        W_i <- alpha_t W_i,  alpha_t = 0

    Momentum, biases and norms stay as they are. With duty=1 all filters train on and compete anew after each epoch, as
    published. SFP, ASFP, SRFP and ASRFP differ only in the defaults of schedule (P_t) and alpha (alpha_0).

    Below duty 1, which is ours, a pruned filter is masked in most steps. What is left open is then tuned:

        warm_up = epochs // 4              all train before the first pruning
        alpha = 1, constant                pruned filters keep their weights
        wake = "in_turns", no clip         at any step another group of them trains along
        criterion = "credited_l2"          with credit for what live filters grew while they slept
        fine_tune = epochs // 2            in the second half what is dead stays so

    Args:
        model: See Method.
        optimizer: See Method.
        rate: See Method.
        epochs: See Method.
        schedule: P_t, the share that is pruned at the end of epoch t: a function (rate, epoch, epochs) as those of
            schedules. None: the class's own, here schedules.constant.
        alpha: alpha_0, what pruned weights are multiplied by at first, in [0, 1]. None: the class's own, here 0 (below
            duty 1: 1).
        alpha_schedule: alpha_t, as a function (alpha, epoch, epochs).
        scale_norms: Whether the weights and biases of norms are multiplied like the filters before them.
        **options: Keywords of Method.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 2, 3))
        >>> report = pk.convert(net)
        >>> optimizer = torch.optim.SGD(net.parameters(), 0.1)
        >>> method = pk.methods.SFP(net, optimizer, rate=0.5, epochs=3)
        >>> for epoch in range(3):
        ...     optimizer.zero_grad(); net(torch.randn(2, 1, 8, 8)).square().sum().backward()
        ...     optimizer.step(); method.step()
        ...     counts = method.end_epoch()
        >>> counts["0"].live
        2
        >>> method.detach()
        >>> method = pk.methods.SFP(net, optimizer, rate=0.5, epochs=8, duty=0.1)
        >>> method.warm_up, method.epochs, method.alpha  # 2 epochs without pruning, and 4 of 8 that prune
        (2, 4, 1.0)
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

    @classmethod
    def tuned(cls, epochs: int) -> dict[str, Any]:
        return {
            "warm_up": epochs // 4, "fine_tune": epochs // 2, "wake": "in_turns", "criterion": "credited_l2",
            "alpha": 1.0, "alpha_schedule": schedules.constant, "clip": False,
        }  # fmt: skip

    def pruned_share(self, epoch: int) -> float:
        return self._scheduled(self.schedule, self.rate, epoch)

    def soften(self, name: str, rows: Tensor, epoch: int) -> None:
        alpha = self._scheduled(self.alpha_schedule, self.alpha, epoch)
        parameters = [self.by_filter(name, self.layers[name].weight)]
        if self.scale_norms:
            parameters += [p for norm in self.norms_of(name) for p in (norm.weight, norm.bias) if p is not None]
        for p in parameters:
            p[rows] = p[rows] * alpha if alpha else 0.0


class ASFP(SFP):
    """Asymptotic soft filter pruning: SFP with a pruned share that rises from 0 to rate.

        P_t = a e^(-k t) + b

    There is no official code, and sources disagree on how fast P_t rises: schedules.asymptotic with share=3/4 (the
    default here) or 1/4. As in public code, all of rate is pruned from 0.9 of the epochs on, so that training goes on
    after the last filters went. Arguments are SFP's, and so are the tuned values below duty 1, but for warm_up, which
    is epochs // 8: the share rises slowly by itself.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 2, 3))
        >>> report = pk.convert(net)
        >>> optimizer = torch.optim.SGD(net.parameters(), 0.1)
        >>> method = pk.methods.ASFP(net, optimizer, rate=0.5, epochs=3)
        >>> [round(method.pruned_share(epoch), 2) for epoch in range(3)]
        [0.0, 0.49, 0.5]
    """

    default_schedule = staticmethod(rising)

    @classmethod
    def tuned(cls, epochs: int) -> dict[str, Any]:
        return super().tuned(epochs) | {"warm_up": epochs // 8}  # the share rises slowly at first


class SRFP(SFP):
    """SofteR filter pruning: SFP whose pruned filters shrink instead of becoming zero.

        W_i <- alpha_t W_i,  alpha_t from 0.5 to 0 (schedules.decay)

    Arguments are SFP's; alpha is 0.5 by default. Tuned values below duty 1 are SFP's, with an alpha that stays 0.5.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 2, 3))
        >>> report = pk.convert(net)
        >>> optimizer = torch.optim.SGD(net.parameters(), 0.1)
        >>> method = pk.methods.SRFP(net, optimizer, rate=0.5, epochs=3)
        >>> bool((net[0].weight[method.states["0"] == 1] != 0).all())
        True
    """

    default_alpha = 0.5

    @classmethod
    def tuned(cls, epochs: int) -> dict[str, Any]:
        return super().tuned(epochs) | {"alpha": 0.5}


class ASRFP(SRFP):
    """Asymptotic softeR filter pruning: the rising share of ASFP with the alpha of SRFP.

    Arguments are SFP's. Tuned values below duty 1 are SRFP's, with the warm_up of ASFP.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 2, 3))
        >>> report = pk.convert(net)
        >>> optimizer = torch.optim.SGD(net.parameters(), 0.1)
        >>> method = pk.methods.ASRFP(net, optimizer, rate=0.5, epochs=3)
        >>> method.alpha, method.pruned_share(2)
        (0.5, 0.5)
    """

    default_schedule = staticmethod(rising)

    @classmethod
    def tuned(cls, epochs: int) -> dict[str, Any]:
        return super().tuned(epochs) | {"warm_up": epochs // 8}
