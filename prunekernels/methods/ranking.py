"""Which filters go: an order that is the same on every machine, and how many of it under a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BUDGETS = ("layer", "global")


def pruned_count(width: int, *shares: float) -> int:
    """int(width * share * ...), truncated as in public code: int(10 * 0.7) = 7, int(100 * 0.29) = 28.

    That code knows the kept share: rate=1 - 0.9 prunes int(10 * (1 - 0.9)) = 0 filters, as there, and rate=0.1 one.
    """
    count: float = width
    for share in shares:
        count = count * share
    return int(count)


def rounded(width: int, pruned: int, round_to: int) -> int:
    """The most filters, at most pruned, whose loss leaves a multiple of round_to; none where all are too few."""
    live = -(-(width - pruned) // round_to) * round_to
    return max(0, width - live)


@dataclass
class Ranking:
    """Filters of one unit from the first to go to the last: hard-dead ones, then by score, then those that must stay.

    Of equal scores the one that is dead already goes first, then the lower index.
    """

    order: Tensor  # int64 [width]
    scores: Tensor  # float64 [width]
    hard: int  # so many at the start are gone already
    protected: int  # so many at the end stay

    @classmethod
    def of(cls, scores: Tensor, dead: Tensor, hard: Tensor, members: Sequence[Tensor]) -> Ranking:
        """members: of each layer the unit's channels that its filters are; each layer keeps one live filter."""
        order = _sorted(scores, dead, torch.where(hard, 0, 1))
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        stay = torch.zeros_like(hard)
        for channels in members:
            if len(channels):
                stay[channels[place[channels].argmax()]] = True
        order = _sorted(scores, dead, torch.where(hard, 0, 1 + stay.long()))
        return cls(order, scores, int(hard.sum()), int((stay & ~hard).sum()))

    @property
    def width(self) -> int:
        """How many filters there are."""
        return len(self.order)

    def first(self, count: int) -> Tensor:
        """bool [width]: the first to go."""
        chosen = torch.zeros(self.width, dtype=torch.bool)
        chosen[self.order[:count]] = True
        return chosen


def _sorted(scores: Tensor, dead: Tensor, rank: Tensor) -> Tensor:
    return torch.from_numpy(np.lexsort((~dead.numpy(), scores.numpy(), rank.numpy())))


def counts(rankings: Sequence[Ranking], shares: Sequence[float], budget: str, round_to: int) -> list[int]:
    """How many filters of each unit go, at the product of these shares.

    budget "layer": the same share of each. "global": that share of all together, by scores over their unit's mean,
    since norms of different layers do not compare.
    """
    if budget == "layer":
        wanted = [pruned_count(r.width, *shares) for r in rankings]
    else:
        wanted = _global_counts(rankings, pruned_count(sum(r.width for r in rankings), *shares))
    capped = [min(count, r.width - r.protected) for count, r in zip(wanted, rankings, strict=True)]
    return [rounded(r.width, count, round_to) for count, r in zip(capped, rankings, strict=True)]


def _global_counts(rankings: Sequence[Ranking], total: int) -> list[int]:
    """A unit's filters go in their own order; where the units' turns come is up to the relative scores."""
    turns, units = [], []
    for u, r in enumerate(rankings):
        scores = r.scores[r.order[r.hard :]]
        mean = float(scores.mean()) if len(scores) else 0.0
        turn = scores[: len(scores) - r.protected] / (mean if mean > 0 else 1.0)
        turns += [torch.full((r.hard,), -torch.inf, dtype=turn.dtype), turn]
        units.append(torch.full((r.hard + len(turn),), u))
    chosen = torch.cat(units)[torch.cat(turns).sort(stable=True).indices[:total]]
    return torch.bincount(chosen, minlength=len(rankings)).tolist()
