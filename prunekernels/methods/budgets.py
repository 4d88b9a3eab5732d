"""Budgets: how many filters of each unit go, so that a share of the filters or of the multiply-adds does."""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from ..graph import Group
from .arguments import expect
from .costs import Costs
from .ranking import Ranking, pruned_count, rounded

Shares = Callable[[float], Sequence[float]]  # from a final rate, the shares whose product is to go now
Ints = npt.NDArray[np.int64]
FLOORS = {"layer": 0.0, "global": 0.0, "flops": 0.1}  # the defaults of floor


class Budget:
    """How many filters of each unit go.

    "layer": the same share of each layer. "global": that share of all units together, by scores over their unit's mean,
    since norms of different layers do not compare. "flops": of all units together as many as save that share of the
    network's multiply-adds, by scores over the sum of those that are left of their unit.

    Args:
        op: The method's name, for errors.
        kind: One of BUDGETS.
        units: Filters that are pruned together.
        rate: The share that goes in the end.
        rates: By unit, a rate of its own, which a budget of all units leaves as it is, or None.
        floor: The smallest share of the filters of a unit without a rate of its own that stays. None: that of FLOORS.
        round_to: What stays is a multiple of it.
        costs: Those of the network, which "flops" needs.
    """

    def __init__(
        self,
        op: str,
        kind: str,
        units: Sequence[Group],
        rate: float,
        rates: Sequence[float | None],
        *,
        floor: float | None = None,
        round_to: int = 1,
        costs: Costs | None = None,
    ) -> None:
        self.op, self.kind, self.units, self.rate, self.rates = op, kind, list(units), rate, list(rates)
        self.floor = FLOORS[kind] if floor is None else floor
        self.round_to, self.costs = round_to, costs

    def takes_evenly(self, unit: int) -> bool:
        """Whether a unit's layers are to lose the same share of their filters: where one rate is theirs."""
        return self.kind == "layer" or self.rates[unit] is not None

    def counts(self, rankings: Sequence[Ranking], shares: Shares) -> list[int]:
        """How many filters of each unit go.

        Args:
            rankings: By unit.
            shares: From a final rate, the shares whose product is to go now.
        """
        own = self._own(rankings, shares)
        if self.kind == "layer":
            return own
        turns = self._turns(rankings)
        if self.kind == "global":
            return self._after(rankings, own, turns, max(0, self._filters(rankings, own, shares)))
        reached = self._reached(rankings, own, turns, shares)
        counts = self._after(rankings, own, turns, reached)
        if reached > len(turns):
            share, saved = math.prod(shares(self.rate)), self._saved(rankings, counts)
            warnings.warn(
                f"{self.op}: budget: {share:.3f} of the multiply-adds were to go, {saved:.3f} of them do: floor keeps "
                "the other filters, or live filters of other layers compute the same channels",
                stacklevel=2,
            )
        return counts

    def check(self, shares: Shares) -> None:
        """Raises ValueError if filters without a rate of their own cannot meet the budget.

        Args:
            shares: As of counts, when most is to go.
        """
        is_free = not self.floor and all(rate is None for rate in self.rates)
        if self.kind == "layer" or (self.kind == "global" and is_free):
            return
        rankings = self._favourable()
        own, turns = self._own(rankings, shares), self._turns(rankings)
        least, most = (self._after(rankings, own, turns, n) for n in (0, len(turns)))
        if self.kind == "global":
            what, share = "filters", [sum(counts) / sum(r.width for r in rankings) for counts in (least, most)]
            wanted = self._filters(rankings, own, shares)
            is_over, is_under = wanted < 0, wanted > len(turns)
        else:
            what, share = "multiply-adds", [self._saved(rankings, counts) for counts in (least, most)]
            wanted = self._reached(rankings, own, turns, shares)
            is_over, is_under = share[0] > math.prod(shares(self.rate)), wanted > len(turns)
        expected = f"at least {_up(share[0])} with budget={self.kind!r}, as rates alone take that share of the {what}"
        expect(self.op, not is_over, "rate", expected, self.rate)
        expected = (
            f"at most {_down(share[1])} with budget={self.kind!r}, as floor={self.floor}, rates, skip and layers that "
            f"are not pruned keep {_up(1 - share[1])} of the {what}"
        )
        expect(self.op, not is_under, "rate", expected, self.rate)

    # ---- by unit

    def _own(self, rankings: Sequence[Ranking], shares: Shares) -> list[int]:
        """What a unit's own rate takes, or with budget "layer" the rate; 0 of units without one."""
        default = self.rate if self.kind == "layer" else None
        rates = [default if rate is None else rate for rate in self.rates]
        pairs = zip(rankings, rates, strict=True)
        return self._within(rankings, [0 if x is None else pruned_count(r.width, *shares(x)) for r, x in pairs])

    def _within(self, rankings: Sequence[Ranking], wanted: Sequence[int]) -> list[int]:
        """The nearest counts that leave what is protected, and multiples of round_to; what is hard-dead is gone."""
        capped = [min(count, r.width - r.protected) for count, r in zip(wanted, rankings, strict=True)]
        return [max(r.hard, rounded(r.width, count, self.round_to)) for count, r in zip(capped, rankings, strict=True)]

    def _stays(self, ranking: Ranking) -> int:
        """How many filters at the end of a unit's order stay."""
        return max(ranking.protected, math.ceil(self.floor * ranking.width - 1e-9))

    # ---- all units together, one filter after another

    def _turns(self, rankings: Sequence[Ranking]) -> Ints:
        """The unit of each filter that may go and has not gone for good, the first to go first.

        Within a unit filters go in its order, among units by relative score: over the mean of those that are not gone
        for good, or with "flops" over the sum of the scores that are then left, times the unit's width. So what is
        left of a layer becomes dearer, and no layer becomes a bottleneck.
        """
        turns, units = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0, dtype=torch.long)]
        for u, (r, rate) in enumerate(zip(rankings, self.rates, strict=True)):
            scores = r.scores[r.order[r.hard :]]
            if rate is None and len(scores):
                if self.kind == "flops":
                    of = scores.flip(0).cumsum(0).flip(0) / r.width
                else:
                    of = scores.mean().expand_as(scores)
                relative = scores / torch.where(of > 0, of, 1.0)
                turns.append(relative[: max(0, len(scores) - self._stays(r))])
                units.append(torch.full((len(turns[-1]),), u))
        return torch.cat(units)[torch.cat(turns).sort(stable=True).indices].numpy()

    def _after(self, rankings: Sequence[Ranking], own: Sequence[int], turns: Ints, n: int) -> list[int]:
        """Counts by unit when the first n of the turns are over."""
        taken = np.bincount(turns[:n], minlength=len(rankings)).tolist()
        others = self._within(rankings, [r.hard + count for r, count in zip(rankings, taken, strict=True)])
        return [other if rate is None else mine for other, rate, mine in zip(others, self.rates, own, strict=True)]

    def _filters(self, rankings: Sequence[Ranking], own: Sequence[int], shares: Shares) -> int:
        """How many turns give the share of all filters; below 0 where own rates take more."""
        gone = sum(r.hard if rate is None else count for r, rate, count in zip(rankings, self.rates, own, strict=True))
        return pruned_count(sum(r.width for r in rankings), *shares(self.rate)) - gone

    def _reached(self, rankings: Sequence[Ranking], own: Sequence[int], turns: Ints, shares: Shares) -> int:
        """After how many turns that share of the multiply-adds is saved; more than there are turns: never."""
        share = math.prod(shares(self.rate))
        return bisect_left(
            range(len(turns) + 1), share, key=lambda n: self._saved(rankings, self._after(rankings, own, turns, n))
        )

    def _saved(self, rankings: Sequence[Ranking], counts: Sequence[int]) -> float:
        """The share of the multiply-adds that is saved if so many filters of each unit go."""
        assert self.costs is not None
        dead = torch.cat([r.first(count) for r, count in zip(rankings, counts, strict=True)])
        return self.costs.saved(dead.numpy()) / self.costs.dense

    def _favourable(self) -> list[Ranking]:
        """Rankings in which what saves most goes first."""
        prices = [torch.zeros(unit.width, dtype=torch.float64) for unit in self.units]
        if self.costs is not None:
            prices = list(torch.from_numpy(self.costs.of_filters()).split([unit.width for unit in self.units]))
        rankings = []
        for unit, price in zip(self.units, prices, strict=True):
            none = torch.zeros(unit.width, dtype=torch.bool)
            rankings.append(Ranking.of(-price, none, none, list(unit.filters.values())))
        return rankings


def _down(share: float) -> str:
    return f"{math.floor(share * 1000) / 1000:.3f}"


def _up(share: float) -> str:
    return f"{math.ceil(share * 1000) / 1000:.3f}"
