"""Which filters go: an order that is the same on every machine, and how many of it under a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..graph import Group

BUDGETS = ("layer", "global", "flops")


class Counts(NamedTuple):
    """How many filters of a layer are live, soft-dead and hard-dead at an epoch's end.

    Attributes:
        live: Filters that are computed.
        soft: Dead filters that may come back.
        hard: Dead filters that are gone for good.
        returned: Live filters that were soft-dead before this epoch's pruning.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 2, 3))
        >>> report = pk.convert(net)
        >>> method = pk.methods.SFP(net, torch.optim.SGD(net.parameters(), 0.1), rate=0.5, epochs=2)
        >>> method.end_epoch()["0"]
        Counts(live=2, soft=2, hard=0, returned=0)
    """

    live: int
    soft: int
    hard: int
    returned: int


def pruned_count(width: int, *shares: float) -> int:
    """int(width * share * ...), truncated as in the public code: int(10 * 0.7) = 7, int(100 * 0.29) = 28.

    That code is told the share that stays, and floats are not exact: rate=1 - 0.9 prunes int(10 * (1 - 0.9)) = 0 of 10
    filters, as there, while rate=0.1 prunes one.
    """
    count: float = width
    for share in shares:
        count = count * share
    return int(count)


def rounded(width: int, pruned: int, round_to: int) -> int:
    """The largest number up to `pruned` that leaves a multiple of round_to live; 0 where there is none."""
    live = -(-(width - pruned) // round_to) * round_to
    return max(0, width - live)


def of_unit(unit: Group, scores: Mapping[str, Tensor]) -> Tensor:
    """Scores of a unit's joint channels, float64 [width], from its layers' scores [K].

    Of several layers it is the mean of their scores, each over its layer's mean: a sum would favour channels that more
    layers share, such as the inner ones where a shortcut pads channels.
    """
    if len(unit.layers) == 1:
        return unit.combine({name: scores[name] for name in unit.layers})
    relative = {}
    for name in unit.layers:
        score = scores[name].double()
        mean = score.mean()
        relative[name] = score / mean if mean > 0 else score
    return unit.combine(relative) / unit.combine({name: torch.ones_like(s) for name, s in relative.items()})


@dataclass
class Ranking:
    """Filters of one unit from the first to go to the last: hard-dead ones, then by score, then protected ones.

    Of equal scores the one that is dead already goes first, then the one with the lower index.

    Attributes:
        order: int64 [width]: filters (joint channels of the unit), the first to go first.
        scores: float64 [width], by filter.
        hard: How many at the start of order are hard-dead.
        protected: How many at the end of order stay, so that each layer keeps a live filter.
    """

    order: Tensor
    scores: Tensor
    hard: int
    protected: int

    @classmethod
    def of(
        cls, scores: Tensor, dead: Tensor, hard: Tensor, members: Sequence[Tensor], *, evenly: bool = False
    ) -> Ranking:
        """Ranks a unit's filters.

        Args:
            scores: float64 [width].
            dead: bool [width]: dead now.
            hard: bool [width]: hard-dead now.
            members: By layer of the unit, int64 [K]: which joint channel each of its filters is.
            evenly: Whether the start of the order, however long, has the same share of each layer's filters. Filters
                then compete only with those that the same layers have. Where every layer has all channels, nothing
                changes.
        """
        place_in_class = _places(scores, dead, hard, members) if evenly else torch.zeros_like(scores)

        def sorted_by(rank: Tensor) -> Tensor:
            keys = (~dead, scores, place_in_class, rank)
            return torch.from_numpy(np.lexsort([key.numpy() for key in keys]))

        order = sorted_by(torch.where(hard, 0, 1))
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        stay = torch.zeros_like(hard)
        for channels in members:
            if len(channels):
                stay[channels[place[channels].argmax()]] = True
        order = sorted_by(torch.where(hard, 0, 1 + stay.long()))
        return cls(order, scores, int(hard.sum()), int((stay & ~hard).sum()))

    @property
    def width(self) -> int:
        """Number of filters of the unit."""
        return len(self.order)

    def first(self, count: int) -> Tensor:
        """bool [width]: the `count` filters that go first."""
        chosen = torch.zeros(self.width, dtype=torch.bool)
        chosen[self.order[:count]] = True
        return chosen


def _places(scores: Tensor, dead: Tensor, hard: Tensor, members: Sequence[Tensor]) -> Tensor:
    """By filter, the share of its class that goes before it and half of its own: float64 [width] in (0, 1).

    A class has the channels that the same layers have.
    """
    has = np.zeros((len(members), len(scores)), bool)
    for row, channels in zip(has, members, strict=True):
        row[channels.numpy()] = True
    of_filter = np.unique(has, axis=1, return_inverse=True)[1].reshape(-1)
    places = np.empty(len(scores))
    order = np.lexsort([key.numpy() for key in (~dead, scores, ~hard)])
    for which in np.unique(of_filter):
        mine = order[of_filter[order] == which]
        places[mine] = (np.arange(len(mine)) + 0.5) / len(mine)
    return torch.from_numpy(places)
