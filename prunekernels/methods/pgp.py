"""PGP and RPGP: progressive gradient pruning."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import schedules
from .arguments import FUNCTION, is_share
from .base import Method
from .criteria import GradientSum
from .ranking import Ranking
from .schedules import Schedule


class PGP(Method):
    """Progressive gradient pruning: after each epoch, the filters that the gradients would change least are pruned.

    The score is ||sum of gradients||_1 over the epoch's steps. At the end of epoch t the weakest filters are dead, up
    to the share

        P_t = 1 - (1 - rate)^((t + 1) / T)

    Of the dead filters that are not removed yet, the weakest, a share `remove`, are removed (hard-dead). The others are
    reset (soft-dead): weights, bias, norm (with its statistics) and momentum become zero. In the last epoch all are
    removed. Behind a norm and a relu a reset filter gets no gradient, so there reset is mostly removal put off.

    From the released code: the rules above. By `measure` also its extra pass over the training set, which gives scores
    other than those of the epoch's own steps. Joint coupling ranks filters that meet in an add by the mean of their
    scores (see Method); the released code ranks them by the stage's first convolution alone. Left out as faults: the
    first convolution's reset filters keep their momentum there, and its new optimizer has no weight decay.

    Args:
        model: See Method.
        optimizer: See Method.
        rate: See Method.
        epochs: See Method.
        remove: The share of dead filters not yet removed that an epoch removes, in [0, 1].
        schedule: P_t, as a function (rate, epoch, epochs). None: the formula above (schedules.progressive), in which
            each epoch prunes the same share of what is left. schedules.linear is the other one released.
        off_by_one: Whether P_t has the released code's exponent (t + 2) / T, which prunes more than rate.
        **options: Keywords of Method. criterion is "gradient_sum" by default. fine_tune is two thirds of the epochs, as
            in the released code (20 epochs after 10): the last pruning takes live filters, and accuracy falls without
            training after it.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 2, 3))
        >>> report = pk.convert(net)
        >>> optimizer = torch.optim.SGD(net.parameters(), 0.1)
        >>> method = pk.methods.PGP(net, optimizer, rate=0.5, epochs=3, fine_tune=1)
        >>> for epoch in range(3):
        ...     optimizer.zero_grad(); net(torch.randn(2, 1, 8, 8)).square().sum().backward()
        ...     optimizer.step(); method.step()
        ...     counts = method.end_epoch()
        ...     print(counts["0"].soft, counts["0"].hard)
        1 0
        0 2
        0 2
    """

    default_criterion = "gradient_sum"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rate: float = 0.5,
        epochs: int = 200,
        *,
        remove: float = 0.5,
        schedule: Schedule | None = None,
        off_by_one: bool = False,
        **options: Any,
    ) -> None:
        self._expect(is_share(remove), "remove", "a number in [0, 1]", remove)
        self._expect(schedule is None or callable(schedule), "schedule", FUNCTION, repr(schedule))
        self._expect(schedule is None or not off_by_one, "off_by_one", "False with a schedule", off_by_one)
        self.remove = remove
        self.schedule = schedule or partial(schedules.progressive, off_by_one=off_by_one)
        super().__init__(model, optimizer, rate, epochs, **options)

    @staticmethod
    def default_fine_tune(epochs: int) -> int:
        return 2 * epochs // 3

    def pruned_share(self, epoch: int) -> float:
        return self._scheduled(self.schedule, self.rate, epoch)

    def hard_counts(self, epoch: int, rankings: list[Ranking], dead: list[int]) -> list[int]:
        gone = [ranking.hard for ranking in rankings]
        return [g + int((d - g) * self.remove) for d, g in zip(dead, gone, strict=True)]

    def soften(self, name: str, rows: Tensor, epoch: int) -> None:
        self._zero_rows(name, rows)
        for norm in self.norms_of(name):
            for statistics in (norm._buffers.get("running_mean"), norm._buffers.get("running_var")):
                if statistics is not None:  # of a batch norm
                    statistics[rows] = 0

    def measure(self, losses: Iterable[Tensor]) -> None:
        """Replaces this epoch's scores by those of an extra pass, as in the released code. Call before end_epoch.

            method.measure(F.cross_entropy(model(x), y) for x, y in data)

        Args:
            losses: Scalars, computed one after another while this runs: in eval mode, with the weights as they are.
        """
        if not isinstance(self.criterion, GradientSum):
            got = type(self.criterion).__name__
            raise ValueError(f"{type(self).__name__}: criterion: expected gradient_sum, to be measured, got {got}")
        self.criterion.measure(losses)


class RPGP(PGP):
    """PGP with another score: the sum over the epoch's steps of ||gradient||_1. Needs no buffer and no extra pass.

    This is the formula that the released code means to compute; its hook reads gradients before they are there.
    Arguments are PGP's; criterion is "gradient_norms" by default.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 2, 3))
        >>> report = pk.convert(net)
        >>> optimizer = torch.optim.SGD(net.parameters(), 0.1)
        >>> method = pk.methods.RPGP(net, optimizer, rate=0.5, epochs=3)
        >>> type(method.criterion).__name__
        'GradientNorms'
    """

    default_criterion = "gradient_norms"
