"""PGP and RPGP: progressive gradient pruning."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import schedules
from .base import FUNCTION, Method, is_share
from .criteria import GradientSum
from .ranking import Ranking
from .schedules import Schedule


class PGP(Method):
    """Progressive gradient pruning: after each epoch the filters whose weights the gradients would change least go.

    Of these weak filters the weakest, a share `remove`, are removed (hard-dead), the others reset: weights, bias, norm
    (its statistics too) and momentum zero; in the last epoch all are removed. The score is ||sum of gradients||_1, of
    the epoch's own steps; measure gives the released code's extra pass instead. A reset filter gets no gradient behind
    norm and relu, so reset is mostly removal put off.

    fine_tune is two thirds of the epochs by default, as in the released code, which trains 20 epochs on after 10: the
    last pruning takes live filters, and without training after it accuracy falls.

    schedule: the pruned share by epoch; by default each epoch prunes the same share of what is left, and
    schedules.linear is the other one released. off_by_one: the released exponent, which prunes more than rate. Other
    options are Method's; filters that meet in an add under joint coupling are ranked by the mean of their scores (see
    Method), where the released code ranks by the stage's first convolution alone.

    Not carried over from the released code: the momentum of a first convolution's reset filters that it forgets to
    reset, and the optimizer that it makes anew without weight decay.
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
        super().__init__(model, optimizer, rate, epochs, **{"criterion": self.default_criterion, **options})

    @staticmethod
    def default_fine_tune(epochs: int) -> int:
        return 2 * epochs // 3

    def pruned_share(self, epoch: int) -> float:
        return self.schedule(self.rate, epoch, self.epochs)

    def hard_counts(self, epoch: int, rankings: list[Ranking], dead: list[int]) -> list[int]:
        gone = [ranking.hard for ranking in rankings]
        return [g + int((d - g) * self.remove) for d, g in zip(dead, gone, strict=True)]

    def soften(self, name: str, rows: Tensor, epoch: int) -> None:
        for p in self.parameters_of(name):
            p[rows] = 0
            self.forget(p, rows)
        for norm in self.norms_of(name):
            for statistics in (norm.running_mean, norm.running_var):
                if statistics is not None:
                    statistics[rows] = 0

    def measure(self, losses: Iterable[Tensor]) -> None:
        """Before end_epoch: scores by the gradients of these losses instead, in eval mode, the weights as they are.

        >>> method.measure(F.cross_entropy(model(x), y) for x, y in data)
        """
        if not isinstance(self.criterion, GradientSum):
            got = type(self.criterion).__name__
            raise ValueError(f"{type(self).__name__}: criterion: expected gradient_sum, to be measured, got {got}")
        self.criterion.measure(losses)


class RPGP(PGP):
    """PGP with the score sum of ||gradient||_1 over the epoch's steps: no buffer, no extra pass.

    The formula that the released code means to compute; its own hook reads gradients before they are there.
    """

    default_criterion = "gradient_norms"
