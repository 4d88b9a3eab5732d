"""sensitivity: prunes one layer after another, each by itself, and measures what that costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..graph import Group
from ..inspect.flops import count_flops
from ..live.tensor import full_width
from ..nn.example import Example
from ..nn.masked_filters import MaskedFilters
from .arguments import COUPLINGS, check_prune_outputs, expect, is_share, masked_layers, unwrapped
from .channel_masks import ChannelMasks, find_norms, units_of
from .criteria import OfWeights, make_criterion
from .evaluating import evaluating
from .ranking import Ranking, of_unit, pruned_count
from .sensitivity_table import Row, Sensitivity
from .trials import batch_statistics

OP = "sensitivity"
RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
STATISTICS = ("stored", "batch")
PART_BYTES = 64 << 20  # of images, on the device at a time, while all layers and rates are tried on them

Batch = tuple[Tensor, Any]
Measure = Callable[[Any, Any], Any]  # from outputs and y, a number or a tensor of numbers


class _Unit(NamedTuple):
    """Layers that are pruned together."""

    group: Group
    ranking: Ranking
    dead: list[int]  # by rate, how many of its filters are then dead, those that are dead already included

    @property
    def trials(self) -> list[int]:
        """The numbers of dead filters to try: each once, and none that prunes nothing."""
        return sorted({count for count in self.dead if count > self.ranking.hard})

    def row(self, base: float, values: Mapping[int, float], saved: Mapping[int, float]) -> Row:
        """The unit in the table. values, saved: by number of dead filters that was tried."""
        return Row(
            self.group.layers,
            self.group.width,
            tuple(self.dead),
            tuple(values.get(count, base) for count in self.dead),
            tuple(saved.get(count, 0.0) for count in self.dead),
        )


def sensitivity(
    model: nn.Module,
    data: Iterable[Batch] | Callable[[], Iterable[Batch]],
    *,
    rates: Sequence[float] = RATES,
    criterion: Any = "l2",
    coupling: str = "independent",
    example_input: Any = None,
    skip: Sequence[str] = (),
    prune_outputs: bool | Sequence[str] = False,
    statistics: str = "stored",
    metric: Measure | None = None,
    loss: Measure | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Sensitivity:
    """Measures what each layer costs when it is pruned alone, without training.

    For each layer (or group of layers that meet in adds) and each rate, the weakest filters are masked, with the norms
    and inputs behind them, and the data is evaluated: in eval mode, in live mode and without gradients. Data is loaded
    once; all layers and rates are tried on a part of it before the next part is loaded. What is dead already stays
    dead, and counts. Afterwards the model is as it was: weights, masks, modes and statistics.

    Args:
        model: A network with masked layers (see pk.convert). In compacted mode call method.leave() before.
        data: Batches (x, y): an iterable, or a function that returns one. A few hundred images tell layers apart.
        rates: The shares of a layer's filters to prune, each in (0, 1).
        criterion: What filters are scored by: a function of weights, or the name of one ("l1", "l2",
            "geometric_median").
        coupling: "independent": layers are pruned one by one. "joint": layers that meet in an add are pruned together.
        example_input: What the model takes (see Example), so that the graph tells which norms and inputs follow a
            filter. None: a forward pass tells which norms do; joint coupling takes the data's first batch.
        skip: Names of layers that are left alone.
        prune_outputs: See Method.
        statistics: What batch norms go by: "stored", their running statistics, or "batch", those of each batch of the
            data, as if they were estimated anew after each pruning (see recalibrate_norms). Batches of 100 images and
            more will do.
        metric: From outputs and y, a number or a tensor of them, of which the mean is taken; more is better. None: the
            share of labels y that are the largest of outputs.
        loss: The same, less is better; in the place of metric.
        progress: Is called after each trial on a part of the data with the number of images evaluated so far, each once
            for each trial, and the number of trials.

    Returns:
        A Sensitivity.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 6))
        >>> net = torch.nn.Sequential(*net, torch.nn.Flatten())
        >>> report = pk.convert(net)
        >>> data = [(torch.randn(16, 1, 8, 8), torch.randint(2, (16,))) for _ in range(2)]
        >>> found = pk.methods.sensitivity(net, data, rates=(0.25, 0.5, 0.75), skip=["2"])
        >>> found.rows[0].layers, found.rows[0].dead, found.rows[0].saved
        (('0',), (2, 4, 6), (0.25, 0.5, 0.75))
        >>> sorted(found.rates(drop=1.0).items())
        [('0', 0.75)]
    """
    model = unwrapped(model)
    rates = tuple(rates)
    right = bool(rates) and all(is_share(rate) and 0 < rate < 1 for rate in rates) and sorted(set(rates)) == [*rates]
    expect(OP, right, "rates", "rising numbers in (0, 1)", rates)
    expect(OP, coupling in COUPLINGS, "coupling", f"one of {', '.join(COUPLINGS)}", repr(coupling))
    expect(OP, statistics in STATISTICS, "statistics", f"one of {', '.join(STATISTICS)}", repr(statistics))
    expect(OP, metric is None or loss is None, "loss", "None, where there is a metric", loss)
    scored = make_criterion(OP, criterion)
    if not isinstance(scored, OfWeights):
        raise ValueError(f"{OP}: criterion: expected a function of weights, or l1, l2 or geometric_median")
    masked = masked_layers(OP, model, skip)
    check_prune_outputs(OP, prune_outputs, masked)
    parts = _parts(data() if callable(data) else data, next(iter(masked.values())).weight.device)
    first = next(parts, None)
    if first is None:
        raise ValueError(f"{OP}: data: expected batches with images, got none")
    x = first[0][0]
    with evaluating(model):
        example = x if example_input is None and coupling == "joint" else example_input
        masks = ChannelMasks(model, example)
        if masks.norms is None:
            masks.norms = find_norms(model, Example(x))
        joint = coupling == "joint"
        groups, left_out = units_of(masked, masks.groups, skip, joint=joint, prune_outputs=prune_outputs)
        expect(OP, bool(groups), "model", "some layers left to prune", f"none: {left_out}")
        names = [name for group in groups for name in group.layers]
        weights = [masked[name].filters_first(masked[name].weight.detach()) for name in names]
        scores = dict(zip(names, scored.function(weights), strict=True))
        trial = _Trial(masks, masked)
        units = [_unit(group, scores, trial.live, rates) for group in groups]
        with batch_statistics(model) if statistics == "batch" else nullcontext():
            measure = metric or loss or _accuracy
            base, values, images = _measured(model, trial, units, chain([first], parts), measure, progress)
        saved = _saved(model, trial, units, x[:1])
    rows = [unit.row(base, *by_count) for unit, *by_count in zip(units, values, saved, strict=True)]
    kind = "accuracy" if metric is loss else "metric" if loss is None else "loss"
    return Sensitivity(kind, base, rates, tuple(rows), images, left_out)


class _Trial:
    """Sets the masks under which one unit is pruned, over those that the network had."""

    def __init__(self, masks: ChannelMasks, layers: Mapping[str, MaskedFilters]) -> None:
        self.masks = masks
        self.live = {name: layer.filter_mask.cpu().clone() for name, layer in layers.items()}
        self.not_hard = {name: layer.hard_mask.cpu().clone() for name, layer in layers.items()}

    def set(self, unit: _Unit | None, count: int = 0) -> None:
        """Prunes the unit's first `count` filters, and nothing else that was live. None: nothing."""
        live = dict(self.live)
        if unit is not None:
            dead = unit.ranking.first(count)
            live |= {name: live[name] & ~dead[channels] for name, channels in unit.group.filters.items()}
        self.masks.set_masks(live, self.not_hard, True)


def _unit(group: Group, scores: Mapping[str, Tensor], live: Mapping[str, Tensor], rates: Sequence[float]) -> _Unit:
    dead = torch.ones(group.width, dtype=torch.bool)
    for name, channels in group.filters.items():
        dead[channels[live[name]]] = False
    ranking = Ranking.of(of_unit(group, scores), dead, dead, list(group.filters.values()), evenly=True)
    most = ranking.width - ranking.protected
    return _Unit(group, ranking, [max(ranking.hard, min(pruned_count(group.width, r), most)) for r in rates])


def _accuracy(outputs: Any, y: Any) -> Tensor:
    answer = outputs.argmax(1)
    got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
    expect(OP, got == list(answer.shape), "data", f"labels {list(answer.shape)}, or a metric", str(got))
    return answer == y


def _measured(
    model: nn.Module,
    trial: _Trial,
    units: Sequence[_Unit],
    parts: Iterable[list[Batch]],
    measure: Measure,
    progress: Callable[[int, int], None] | None,
) -> tuple[float, list[dict[int, float]], int]:
    """The measure as the network is; by unit and number of dead filters; over how many images."""
    images, base, done = 0, 0.0, 0
    sums: list[dict[int, float]] = [dict.fromkeys(unit.trials, 0.0) for unit in units]
    trials = 1 + sum(len(unit.trials) for unit in units)
    for part in parts:
        count = sum(len(x) for x, _ in part)
        images += count

        def told(value: float, count: int = count) -> float:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, trials)
            return value

        trial.set(None)
        base += told(_sum(model, part, measure))
        for unit, values in zip(units, sums, strict=True):
            for dead in values:
                trial.set(unit, dead)
                values[dead] += told(_sum(model, part, measure))
    return base / images, [{count: value / images for count, value in values.items()} for values in sums], images


def _sum(model: nn.Module, part: Iterable[Batch], measure: Measure) -> float:
    """The measure's mean over each batch, times its images, added up."""
    found = []
    for x, y in part:
        value = measure(full_width(model(x)), y)
        found.append(torch.as_tensor(value, device=x.device).double().mean() * len(x))
    return float(torch.stack(found).sum())


def _saved(model: nn.Module, trial: _Trial, units: Sequence[_Unit], x: Tensor) -> list[dict[int, float]]:
    """By unit and number of dead filters, the share of the multiply-adds that the pruning saves."""
    trial.set(None)
    whole = max(1, count_flops(model, x).live)
    found = []
    for unit in units:
        saved = {}
        for count in unit.trials:
            trial.set(unit, count)
            saved[count] = 1 - count_flops(model, x).live / whole
        found.append(saved)
    return found


def _parts(data: Iterable[Any], device: torch.device) -> Iterator[list[Batch]]:
    """The data in parts of several batches, on the device."""
    part: list[Batch] = []
    size = 0
    for batch in data:
        is_pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[0], Tensor)
        expect(OP, is_pair, "data", "batches (x, y), x a tensor", type(batch).__name__)
        x, y = batch
        if not len(x):
            continue
        if part and size + x.nbytes > PART_BYTES:
            yield part
            part, size = [], 0
        part.append((x.to(device), y.to(device) if isinstance(y, Tensor) else y))
        size += x.nbytes
    if part:
        yield part
