"""Criteria that are functions of the weights as they are at the epoch's end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...filter_ops import filter_norms
from ..view import MethodView
from .criterion import Criterion, Scores


def l1(weights: Sequence[Tensor]) -> list[Tensor]:
    """Scores filters by their L1 norms: sum |w|.

    Args:
        weights: One tensor a layer, [K, C / groups, R, S].

    Returns:
        One tensor a layer, [K].

    Examples:
        >>> pk.methods.criteria.l1([torch.tensor([3.0, -4.0]).view(1, 2, 1, 1)])
        [tensor([7.])]
    """
    return [filter_norms([w.detach()], p=1)[0] for w in weights]


def l2(weights: Sequence[Tensor]) -> list[Tensor]:
    """Scores filters by their L2 norms: sqrt(sum w^2).

    Args:
        weights: One tensor a layer, [K, C / groups, R, S].

    Returns:
        One tensor a layer, [K].

    Examples:
        >>> pk.methods.criteria.l2([torch.tensor([3.0, -4.0]).view(1, 2, 1, 1)])
        [tensor([5.])]
    """
    return [filter_norms([w.detach()], p=2)[0] for w in weights]


def geometric_median(weights: Sequence[Tensor]) -> list[Tensor]:
    """Scores filters by their distances to the other filters of the layer: sum over j of ||W_i - W_j||_2 (FPGM).

    A filter near the geometric median of its layer is the easiest to replace by the others.

    Args:
        weights: One tensor a layer, [K, C / groups, R, S].

    Returns:
        One tensor a layer, [K].

    Examples:
        >>> pk.methods.criteria.geometric_median([torch.tensor([0.0, 1.0, 10.0]).view(3, 1, 1, 1)])
        [tensor([11., 10., 19.])]
    """
    flat = [w.detach().flatten(1) for w in weights]
    flat = [w if w.dtype == torch.float64 else w.float() for w in flat]
    return [torch.cdist(w, w, compute_mode="donot_use_mm_for_euclid_dist").sum(1) for w in flat]


class OfWeights(Criterion):
    """Scores filters by a function of the weights, such as l1. A method makes one from any function it is given.

    Args:
        function: Takes a list of weights [K, C / groups, R, S], one a layer, and returns a list of scores [K].

    Examples:
        >>> def largest(weights):
        ...     return [weight.abs().amax((1, 2, 3)) for weight in weights]
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 2, 3))
        >>> report = pk.convert(net)
        >>> optimizer = torch.optim.SGD(net.parameters(), 0.1)
        >>> criterion = pk.methods.criteria.OfWeights(largest)  # or criterion=largest
        >>> method = pk.methods.SFP(net, optimizer, rate=0.5, criterion=criterion)
        >>> int((method.states["0"] == 1).sum())
        2
    """

    def __init__(self, function: Callable[[list[Tensor]], list[Tensor]]) -> None:
        self.function = function

    def scores(self) -> Scores:
        layers = self.method.layers
        values = self.function([layer.filters_first(layer.weight.detach()) for layer in layers.values()])
        return dict(zip(layers, values, strict=True))


class CreditedL2(Criterion):
    """Scores filters by their L2 norms, with credit for what live filters grew while soft-dead ones slept:

        live: ||W_i||_2;  soft-dead: ||W_i||_2 max(1, mean of live norms now / that after the last pruning)

    Behind a batch norm the length of a filter is worth nothing, yet it grows with each step, and so a filter that is
    masked most of the time would fall behind whatever it is worth. The last pruning, after which no filter comes back,
    gives no credit: a filter that it woke would be live for good after a few steps of training.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 2, 3))
        >>> report = pk.convert(net)
        >>> optimizer = torch.optim.SGD(net.parameters(), 0.1)
        >>> options = dict(duty=0.2, steps_per_epoch=10)  # below duty 1, credited_l2 is the criterion of SFP
        >>> method = pk.methods.SFP(net, optimizer, rate=0.5, epochs=8, **options)
        >>> type(method.criterion).__name__
        'CreditedL2'
    """

    def start(self, method: MethodView) -> None:
        super().start(method)
        self.means: dict[str, Tensor] = {}  # by layer, the mean of live norms after the last pruning

    def begin_epoch(self) -> None:
        self.means = {name: norms[~dead].mean() for name, (norms, dead) in self._norms().items()}

    def scores(self) -> Scores:
        found = {}
        for name, (norms, dead) in self._norms().items():
            before = self.means[name]
            credit = torch.where(before > 0, norms[~dead].mean() / before, 1).clamp(min=1)
            found[name] = norms if self.method.prunes_last else torch.where(dead, norms * credit, norms)
        return found

    def _norms(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By layer, the filters' norms and which of them are dead, [K] each."""
        filters, layers = self.method.filters, self.method.layers
        norms = l2([layer.filters_first(layer.weight) for layer in layers.values()])
        dead = [filters.of_layer(filters.dead, name).to(n.device) for name, n in zip(layers, norms, strict=True)]
        return dict(zip(layers, zip(norms, dead, strict=True), strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {name: mean.clone() for name, mean in self.means.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        layers = self.method.layers
        self.means |= {name: mean.to(layers[name].weight.device).clone() for name, mean in state.items()}
