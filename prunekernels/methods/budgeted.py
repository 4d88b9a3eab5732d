"""Budgeted: how many filters of each unit go at an epoch's end, by the method's budget and its rates by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..graph import Group
from ..nn.masked_filters import MaskedFilters
from . import ranks
from .budgets import Budget
from .channel_masks import ChannelMasks
from .costs import Costs
from .filter_states import FilterStates
from .ranking import Ranking
from .rates import rates_of_layers, rates_of_units
from .uniform_rate import Left, by_weights, uniform_rate


class Budgeted:
    """Base of Method: keeps its budget, and asks it with what pruned_share says of each rate.

    Attributes:
        rates: By name, the rates of the layers that `rates` gives one.
        rate: The share of filters that is pruned in the end; with a budget of what is left, the one that meets it.
    """

    model: nn.Module
    rate: float
    rates: dict[str, float]
    round_to: int
    epochs: int
    prunes_first: bool
    layers: dict[str, MaskedFilters]
    left_out: dict[str, str]
    channel_masks: ChannelMasks
    filters: FilterStates
    process_group: Any

    def pruned_share(self, epoch: int) -> float:
        raise NotImplementedError

    def _start_budget(
        self,
        units: Sequence[Group],
        budget: str | Mapping[str, Any],
        rates: object,
        floor: float | None,
        example_input: Any,
    ) -> None:
        op = type(self).__name__
        self._left = None if isinstance(budget, str) else Left.of(op, budget)
        kind = budget if isinstance(budget, str) else "layer"
        self.rates = rates_of_layers(op, rates, self.layers, self.left_out)
        costs = Costs(self.model, self.channel_masks.groups, units, example_input) if kind == "flops" else None
        own = rates_of_units(op, self.rates, units, self.rate)
        self._budget = Budget(op, kind, units, self.rate, own, floor=floor, round_to=self.round_to, costs=costs)
        self._find_rate(example_input)
        self._budget.check(self._most)

    def forecast(self) -> dict[str, Tensor]:
        """Tells which filters would live in the end if they were ranked by the norms of their weights as they are now.

        Nothing changes. How many filters each layer keeps is then what the method will do; with budget "global" or
        "flops" it depends on the scores that it will have.

        Returns:
            By layer name, bool [K] on the CPU: True for those that live.
        """
        units = self.filters.units
        rankings = by_weights(self.model, units, self._budget.takes_evenly)
        counts = self._budget.counts(rankings, self._most)
        gone = [ranking.first(count) for ranking, count in zip(rankings, counts, strict=True)]
        return {n: ~dead[c] for unit, dead in zip(units, gone, strict=True) for n, c in unit.filters.items()}

    def _most(self, rate: float) -> list[float]:
        """The largest share that goes at any epoch's end, by a rate."""
        return [max(self._share(rate, epoch) for epoch in range(-1 if self.prunes_first else 0, self.epochs))]

    def _find_rate(self, example_input: Any) -> None:
        """With a budget of what is left, the rate that meets it takes the place of the one that was given."""
        if self._left is not None:
            op, units = type(self).__name__, self.filters.units
            own = rates_of_units(op, self.rates, units, self.rate)
            found = uniform_rate(
                op, self._left, self.model, self.channel_masks, units, own, self.round_to, example_input
            )
            self._set_rate(ranks.of_rank_0(found, self.process_group))

    def _set_rate(self, rate: float) -> None:
        self.rate = self._budget.rate = rate

    def _ranked(self, scores: Sequence[Tensor]) -> list[Ranking]:
        """By unit, its filters from the first to go to the last.

        Args:
            scores: By unit, float64 [width].
        """
        rankings = []
        for u, unit in enumerate(self.filters.units):
            dead, hard = self.filters.dead[u], self.filters.hard[u]
            members, evenly = list(unit.filters.values()), self._budget.takes_evenly(u)
            rankings.append(Ranking.of(scores[u], dead, hard, members, evenly=evenly))
        return rankings

    def _counts(self, rankings: Sequence[Ranking], epoch: int, *shares: float) -> list[int]:
        """By unit, how many filters go if what goes at this epoch's end goes times these shares."""
        return self._budget.counts(rankings, lambda rate: (self._share(rate, epoch), *shares))

    def _share(self, rate: float, epoch: int) -> float:
        """What pruned_share would be if this were the method's rate: schedules need not be linear in it."""
        before, self.rate = self.rate, rate
        try:
            return self.pruned_share(epoch)
        finally:
            self.rate = before
