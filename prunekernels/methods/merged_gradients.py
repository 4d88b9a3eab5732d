"""MergedGradients: what makes a merged network train as the clusters that it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..compaction.compaction import Compaction
from .merging import MergeGroup


class MergedGradients:
    """Scales the gradients of a merged network, so that SGD moves it as it would have moved equal filters.

    A filter that m equal ones were merged into gets the sum of their gradients, and the centripetal rule gives each of
    the m the mean of them: its gradient is divided by m, as are those of its bias and norm. A reader's column that n
    equal inputs' columns were added up in moves by the sum of their n steps, each of which would have had the gradient
    that it has: its gradient is multiplied by n. Momentum and weight decay, being linear, do the rest. The other n - 1
    columns stay zero, though a channel that was merged away may reach them as a constant: sigmoid(0) is 1/2.

    Args:
        model: The merged network.
        groups: Its merged groups.
        leaders: By group, int64 [width]: the channel that each channel was merged into.
    """

    def __init__(self, model: nn.Module, groups: Sequence[MergeGroup], leaders: Sequence[Tensor]) -> None:
        names = {id(p): name for name, p in model.named_parameters()}
        self._scales: dict[str, Tensor] = {}  # by parameter's name, of its shape
        self._parameters = dict(model.named_parameters())
        for group, leader in zip(groups, leaders, strict=True):
            sizes = torch.bincount(leader, minlength=group.width).double()  # 0: merged away
            for tensor, channels, is_statistic in group.tensors(model):
                if not is_statistic and id(tensor) in names:
                    self._multiply(names[id(tensor)], _by_channel(1 / sizes.clamp(min=1), channels), 0)
            for name, channels in group.readers.items():
                weight: Any = model.get_submodule(name).weight
                self._multiply(names[id(weight)], _by_channel(sizes, channels), 1)
        self._scales = {name: scale for name, scale in self._scales.items() if bool((scale != 1).any())}
        self._key: Any = None
        self._found: list[tuple[nn.Parameter, Tensor]] = []

    def _multiply(self, name: str, factors: Tensor, dim: int) -> None:
        p = self._parameters[name]
        shape = [1] * p.dim()
        shape[dim] = -1
        scale = self._scales.setdefault(name, torch.ones_like(p, requires_grad=False))
        scale.mul_(factors.to(p).view(shape))

    @torch.no_grad()
    def scale(self, network: nn.Module, compaction: Compaction | None = None) -> None:
        """Scales the gradients of the network that trains now.

        Args:
            network: The merged network, or the small one of its compaction.
            compaction: Given for the small one.
        """
        key = (network, None if compaction is None else compaction.cut)
        if key != self._key:
            scales = self._scales if compaction is None else compaction.narrowed(self._scales)
            parameters = dict(network.named_parameters())
            self._key, self._found = key, [(parameters[name], scale) for name, scale in scales.items()]
        grads, factors = [], []
        for p, scale in self._found:
            if p.grad is not None:
                grads.append(p.grad)
                factors.append(scale)
        if grads:
            torch._foreach_mul_(grads, factors)


def _by_channel(factors: Tensor, channels: Tensor) -> Tensor:
    """The factor of each row's or column's channel, 1 where that is -1. factors: [width]. channels: int64."""
    return torch.where(channels >= 0, factors[channels.clamp(min=0)], 1.0)
