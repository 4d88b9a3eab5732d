"""rate_for: the rate, the same in each layer, at which a share of the network's cost is left."""

from __future__ import annotations

import contextlib
import copy
import io
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..graph import Group
from ..graph.shrink import shrink
from ..nn.convert import convert
from ..nn.example import Example
from ..nn.masked_filters import MaskedFilters
from .arguments import COUPLINGS, check_prune_outputs, expect, is_share, masked_layers, unwrapped
from .budgets import Budget
from .channel_masks import ChannelMasks, units_of
from .costs import Costs
from .evaluating import evaluating
from .ranking import Ranking, of_unit
from .rates import rates_of_layers, rates_of_units

Timer = Callable[[nn.Module, Any], float]  # from a network and the example to a time, in any unit
LEFT = ("flops", "params", "latency")
GRID = {"flops": 10_000, "params": 10_000, "latency": 64}  # rates are multiples of one over it
WARM_UPS, ROUNDS, SECONDS = 2, (5, 40), 0.5  # passes before the timed ones; of these at least, at most, about so long


class Left(NamedTuple):
    """What is to be left of a network.

    Attributes:
        kind: One of LEFT.
        share: The share of it.
        timer: What times networks, for "latency"; None: time_ratio.
    """

    kind: str
    share: float
    timer: Timer | None

    @classmethod
    def of(cls, op: str, given: Mapping[str, Any], name: str = "budget") -> Left:
        """Reads {"flops": 0.5}, say, with or without a "timer"."""
        shares = {kind: share for kind, share in given.items() if kind != "timer" and share is not None}
        expected = f"one of {', '.join(LEFT)}"
        expect(op, len(shares) == 1 and shares.keys() <= set(LEFT), name, expected, ", ".join(shares) or "none")
        ((kind, share),) = shares.items()
        expect(op, is_share(share) and share > 0, kind, "a share in (0, 1]", repr(share))
        timer = given.get("timer")
        is_timer = timer is None or (callable(timer) and kind == "latency")
        expect(op, is_timer, "timer", "a function of a network and an input, with latency", repr(timer))
        return cls(kind, float(share), timer)


def rate_for(
    model: nn.Module,
    example_input: Any,
    *,
    flops: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    timer: Timer | None = None,
    round_to: int = 1,
    coupling: str = "independent",
    rates: Mapping[str, float] | None = None,
    skip: Sequence[str] = (),
    prune_outputs: bool | Sequence[str] = False,
) -> float:
    """Finds the rate at which a share of the network's cost is left, when each layer loses that rate of its filters.

    It is the lowest rate at which the small network (see shrink) costs at most that share: for multiply-adds and
    parameters to four places, counted without making the small network; for latency to 1/64, by making and timing about
    seven of them. Give it what the method gets, which then prunes what was counted; a method finds the rate by itself
    with `budget={"flops": 0.5}`.

    Which filters meet in adds depends on scores where coupling is "independent": there the filters' l2 norms, as they
    are now, stand for the scores that the method will have. In joint coupling nothing depends on scores but where
    layers meet that have different numbers of channels.

    Args:
        model: The network, masked or not. Masks that it has do not count where a layer is pruned, since a method sets
            them anew. It is left as it was.
        example_input: What model takes (see Example). Latencies are those of this batch.
        flops: The share of the multiply-adds that is left, in (0, 1].
        params: The share of the parameters that is left.
        latency: The share of the time of a forward pass, in eval mode, that is left.
        timer: Times a network, for latency: a function of a network of plain layers and example_input that returns a
            number, less is faster. None: passes are timed here, in turns with the dense network.
        round_to: The number of live filters of a layer stays a multiple of it.
        coupling: As of the methods.
        rates: As of the methods: layers with a rate of their own, which they keep.
        skip: As of the methods.
        prune_outputs: As of the methods.

    Returns:
        The rate, in [0, 1).

    Examples:
        >>> layers = [torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3), torch.nn.ReLU()]
        >>> net = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(256, 4))
        >>> pk.rate_for(net, torch.randn(1, 3, 8, 8), flops=0.5)
        0.375
        >>> pk.rate_for(net, torch.randn(1, 3, 8, 8), flops=0.5, round_to=4)
        0.5
    """
    op = "rate_for"
    given = {"flops": flops, "params": params, "latency": latency, "timer": timer}
    left = Left.of(op, given, "flops, params, latency")
    expect(op, isinstance(round_to, int) and round_to >= 1, "round_to", "an integer from 1", round_to)
    expect(op, coupling in COUPLINGS, "coupling", f"one of {', '.join(COUPLINGS)}", repr(coupling))
    model = unwrapped(model)
    if not any(isinstance(module, MaskedFilters) for module in model.modules()):
        model = copy.deepcopy(model)
        convert(model)
    layers = masked_layers(op, model, skip)
    check_prune_outputs(op, prune_outputs, layers)
    masks = ChannelMasks(model, example_input)
    joint = coupling == "joint"
    units, left_out = units_of(layers, masks.groups, skip, joint=joint, prune_outputs=prune_outputs)
    expect(op, bool(units), "model", "some layers left to prune", f"none: {left_out}")
    names = [name for unit in units for name in unit.layers]
    own = rates_of_units(op, rates_of_layers(op, rates, names, left_out), units, 0.0)
    return uniform_rate(op, left, model, masks, units, own, round_to, example_input)


def uniform_rate(
    op: str,
    left: Left,
    model: nn.Module,
    masks: ChannelMasks,
    units: Sequence[Group],
    rates: Sequence[float | None],
    round_to: int,
    example_input: Any,
) -> float:
    """The lowest rate of all units without one of their own at which at most so much is left.

    Args:
        op: The caller's name, for errors.
        left: What is to be left.
        model: The network.
        masks: Its masks, made with example_input.
        units: Filters that are pruned together.
        rates: By unit, a rate of its own, or None.
        round_to: The number of live filters stays a multiple of it.
        example_input: What the model takes.
    """
    budget = Budget(op, "layer", units, 0.0, rates, round_to=round_to)
    rankings = by_weights(model, units)
    grid = GRID[left.kind]

    def dead_at(rate: float) -> list[Tensor]:
        budget.rate = rate
        counts = budget.counts(rankings, lambda final: (final,))
        return [ranking.first(count) for ranking, count in zip(rankings, counts, strict=True)]

    def found_by(share_of: Callable[[list[Tensor]], float]) -> float:
        @cache
        def share_at(n: int) -> float:
            return share_of(dead_at(n / grid))

        n = bisect_left(range(grid), -left.share - 1e-12, key=lambda n: -share_at(n))
        if n == grid:
            least, whole = share_at(grid - 1), share_at(0)
            expected = f"at least {least:.4f}, which is left where each layer keeps its last filters"
            if whole < 1:
                expected += f" (at most {whole:.4f}: rates have the rest)"
            expect(op, False, left.kind, expected, left.share)
        return n / grid

    if left.kind != "latency":
        costs = Costs(model, masks.groups, units, example_input, left.kind)
        return found_by(lambda dead: 1 - costs.saved(torch.cat(dead).numpy()) / costs.dense)
    with _small_networks(model, masks, units, example_input) as small:
        dense = small([torch.zeros(unit.width, dtype=torch.bool) for unit in units])
        if left.timer is None:
            return found_by(lambda dead: time_ratio(small(dead), dense, example_input))
        timer = left.timer
        whole = timer(dense, example_input)
        return found_by(lambda dead: timer(small(dead), example_input) / whole)


def by_weights(
    model: nn.Module, units: Sequence[Group], takes_evenly: Callable[[int], bool] = lambda unit: True
) -> list[Ranking]:
    """By unit, its filters in the order of their weights' norms. takes_evenly: whether a unit does (see Ranking.of)."""
    layers: dict[str, Any] = dict(model.named_modules())
    rankings = []
    for u, unit in enumerate(units):
        weights = {name: layers[name].filters_first(layers[name].weight.detach()).double() for name in unit.layers}
        scores = {name: weight.flatten(1).norm(dim=1).cpu() for name, weight in weights.items()}
        none = torch.zeros(unit.width, dtype=torch.bool)
        members, evenly = list(unit.filters.values()), takes_evenly(u)
        rankings.append(Ranking.of(of_unit(unit, scores), none, none, members, evenly=evenly))
    return rankings


@contextlib.contextmanager
def _small_networks(model: nn.Module, masks: ChannelMasks, units: Sequence[Group], example_input: Any) -> Any:
    """Yields a function from dead filters, by unit, to the small network, in eval mode."""

    def small(dead: Sequence[Tensor]) -> nn.Module:
        live = {n: ~d[channels] for unit, d in zip(units, dead, strict=True) for n, channels in unit.filters.items()}
        masks.set_masks(live, {name: torch.ones_like(mask) for name, mask in live.items()}, True)
        with contextlib.redirect_stdout(io.StringIO()):
            return shrink(model, example_input).eval()

    with evaluating(model):
        yield small


@torch.no_grad()
def time_ratio(network: nn.Module, other: nn.Module, example_input: Any) -> float:
    """How many times as long a pass of the first network takes as one of the second: the median of passes in turns."""
    example = Example.of("rate_for", example_input)
    device = next((p.device for p in other.parameters()), torch.device("cpu"))

    def seconds(net: nn.Module) -> float:
        begun = time.perf_counter()
        example.call(net)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    for _ in range(WARM_UPS):
        one_round = seconds(network) + seconds(other)
    rounds = max(ROUNDS[0], min(ROUNDS[1], round(SECONDS / max(one_round, 1e-9))))
    return statistics.median(seconds(network) / seconds(other) for _ in range(rounds))
