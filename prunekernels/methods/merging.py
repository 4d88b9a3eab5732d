"""Merging filters that are equal: which ones can be, and how one of them takes the place of all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..graph import Group
from ..graph.analysis import ChannelAnalysis
from ..graph.layer_uses import any_weights, filter_uses, layer_uses
from ..graph.rules.layers import WeightRule
from ..graph.trace import Traced, plain_copy, trace
from ..nn.adapted import has_computed_weight


@dataclass(eq=False)
class MergeGroup:
    """The joint channels of layers that meet in adds, and every row and column that belongs to one of them.

    Attributes:
        width: How many joint channels there are.
        filters: By convolution, int64 [K]: which joint channel each of its filters is.
        norms: By norm, int64 [C]: which joint channel each of its channels is, -1 = none of them.
        readers: By layer that reads the channels, be they zero or not, int64 by input (of a linear layer, by column):
            the joint channel that is read, -1 = none of them.
        layers: Names of the convolutions in filters, from the one nearest to the input on.
    """

    width: int
    filters: dict[str, Tensor] = field(repr=False)
    norms: dict[str, Tensor] = field(repr=False)
    readers: dict[str, Tensor] = field(repr=False)
    layers: list[str]

    def classes(self) -> list[Tensor]:
        """Channels by the layers that have them: int64 indices. Only channels of one class can be equal everywhere."""
        seen = [self._has(channels) for part in (self.filters, self.norms, self.readers) for channels in part.values()]
        by_pattern: dict[tuple[bool, ...], list[int]] = {}
        for channel, pattern in enumerate(zip(*(s.tolist() for s in seen), strict=True)):
            by_pattern.setdefault(pattern, []).append(channel)
        return [torch.tensor(channels) for channels in by_pattern.values()]

    def _has(self, channels: Tensor) -> Tensor:
        has = torch.zeros(self.width, dtype=torch.bool)
        has[channels[channels >= 0]] = True
        return has

    def tensors(self, model: nn.Module) -> Iterable[tuple[Tensor, Tensor, bool]]:
        """Tensors with a row per channel, the joint channel of each row (-1: none), and whether it is a statistic."""
        for name, channels in (*self.filters.items(), *self.norms.items()):
            module = model.get_submodule(name)
            for p in (module.weight, module.bias):
                if isinstance(p, Tensor):
                    yield p, channels, False
            for statistic in ("running_mean", "running_var"):
                value = getattr(module, statistic, None)
                if isinstance(value, Tensor):
                    yield value, channels, True

    @torch.no_grad()
    def merge(
        self, model: nn.Module, leader: Tensor, beside: Callable[[nn.Parameter], Iterable[Tensor]] = lambda weight: ()
    ) -> list[tuple[nn.Parameter, Tensor]]:
        """Makes every reader of channel c read leader[c] instead, and zeroes channel c.

        A reader's columns of channels with the same leader are added up in the leader's column; the other columns
        become zero, as do the filters and the norms' parameters of channels that are not their own leader.

        Args:
            model: The network whose parameters are changed.
            leader: int64 [width]; leader[c] = c where channel c stays.
            beside: By a reader's weight, tensors of its shape whose columns are added up like its own.

        Returns:
            The readers' weights, and int64 indices of the columns that changed.
        """
        changed = []
        for name, channels in self.readers.items():
            weight = model.get_submodule(name).weight
            assert isinstance(weight, nn.Parameter)
            for tensor in beside(weight):
                _add_columns(tensor, channels, leader)
            changed.append((weight, _add_columns(weight, channels, leader)))
        for parameter, rows in self.merged_rows(model, leader):
            parameter[rows] = 0
        return changed

    def merged_rows(self, model: nn.Module, leader: Tensor) -> Iterable[tuple[nn.Parameter, Tensor]]:
        """Parameters with a row per channel, and bool [rows]: those of channels that are not their own leader."""
        gone = leader != torch.arange(self.width)
        for tensor, channels, is_statistic in self.tensors(model):
            if not is_statistic:
                rows = (channels >= 0) & gone[channels.clamp(min=0)]
                yield tensor, rows.to(tensor.device)  # type: ignore[misc]


def _add_columns(weight: Tensor, channels: Tensor, leader: Tensor) -> Tensor:
    """Adds the columns of weight to those of their leaders. Returns int64 indices of the columns that changed.

    channels: int64 [columns]. Where a channel has several columns, one a pixel, each goes to the same pixel's column.
    """
    place: dict[tuple[int, int], int] = {}
    seen: dict[int, int] = {}
    sources, targets = [], []
    keys = []
    for column, channel in enumerate(channels.tolist()):
        keys.append((channel, seen.get(channel, 0)))
        place[keys[-1]] = column
        seen[channel] = seen.get(channel, 0) + 1
    for column, (channel, which) in enumerate(keys):
        if channel >= 0 and int(leader[channel]) != channel:
            sources.append(column)
            targets.append(place.get((int(leader[channel]), which), -1))
    source, target = (torch.tensor(columns, dtype=torch.long, device=weight.device) for columns in (sources, targets))
    known = target >= 0
    weight.index_add_(1, target[known], weight[:, source[known]])
    weight[:, source] = 0
    return torch.cat((source, target[known])).unique()


def mergeable_groups(
    op: str, model: nn.Module, example_input: Any, groups: Sequence[Group]
) -> dict[tuple[str, ...], MergeGroup]:
    """Finds the groups whose channels can be merged when they are equal.

    Each is tried on a copy with random weights, in which merging equal channels must not change the outputs. It does
    where something else tells the channels apart: another input that is added, a depthwise weight, an output.

    Args:
        op: The method's name, for errors.
        model: The network.
        example_input: What the network takes (see Example).
        groups: Some of coupled_groups(model, example_input).

    Returns:
        By a group's layers, its MergeGroup.
    """
    traced = trace(op, model, example_input)
    flow = ChannelAnalysis(traced, any_weights(model, traced, all_dead=True), even_groups=True)
    convs, reading = filter_uses(flow, model), layer_uses(flow, WeightRule)
    depth = _depths(flow, convs)
    modules, roots = dict(model.named_modules()), flow.classes.roots()
    found = {}
    for group in groups:
        if any(len(channels.unique()) < len(channels) for channels in group.filters.values()):
            continue  # the inputs of a grouped convolution live and die together, yet are different channels
        if any(isinstance(modules.get(name), nn.ConvTranspose2d) for name in group.filters):
            continue  # whose weight has its filters in another dimension
        if any(has_computed_weight(modules.get(name)) for name in group.filters):
            continue  # equal stored rows need not be equal filters
        place = torch.full((roots.numel(),), -1)
        for name, channels in group.filters.items():
            place[roots[convs[name][0][1].ids]] = channels
        readers = {n: place[roots[uses[0][0].ids]] for n, uses in reading.items() if _adds_up(modules.get(n))}
        readers = {n: channels for n, channels in readers.items() if bool((channels >= 0).any())}
        norms = {n: channels for n, channels in group.norms.items() if n in modules}
        layers = sorted(group.layers, key=lambda name: depth[name])
        found[group.layers] = MergeGroup(group.width, group.filters, norms, readers, layers)
    return _mergeable(traced, model, found)


def _adds_up(module: nn.Module | None) -> bool:
    """Whether the layer's output is the sum over its inputs of input times weight column."""
    if has_computed_weight(module):
        return False
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def _depths(flow: ChannelAnalysis, layers: Collection[str]) -> dict[str, int]:
    """By name of these layers, how many of them the longest path from the input to its output has."""
    depths: dict[fx.Node, int] = {}
    by_name: dict[str, int] = {}
    for node in flow.traced.graph.nodes:
        depths[node] = max((depths[n] for n in node.all_input_nodes), default=0)
        rule = flow.rules.get(node)
        if isinstance(rule, WeightRule) and flow.states[node] is not None:
            if (name := rule.name(flow.traced, node)) in layers:
                depths[node] += 1
                by_name.setdefault(name, depths[node])
    return by_name


@torch.no_grad()
def _mergeable(
    traced: Traced, model: nn.Module, found: Mapping[tuple[str, ...], MergeGroup]
) -> dict[tuple[str, ...], MergeGroup]:
    """Tries all groups at once, and one by one if that changes the outputs."""
    trial = _randomized(plain_copy(model).double())
    inputs = traced.inputs.double()
    random_state = {name: tensor.clone() for name, tensor in trial.state_dict().items()}

    def keeps_outputs(some: Iterable[MergeGroup]) -> bool:
        trial.load_state_dict(random_state)
        leaders = [_one_leader(group) for group in some]
        for group, leader in zip(some, leaders, strict=True):
            for tensor, channels, _ in group.tensors(trial):
                same = channels.to(tensor.device) >= 0
                tensor[same] = tensor[leader_rows(channels, leader).to(tensor.device)][same]
        before = pytree.tree_leaves(inputs.call(trial))
        for group, leader in zip(some, leaders, strict=True):
            group.merge(trial, leader)
        return all(map(_is_close, before, pytree.tree_leaves(inputs.call(trial))))

    if keeps_outputs(list(found.values())):
        return dict(found)
    return {layers: group for layers, group in found.items() if keeps_outputs([group])}


def leader_rows(channels: Tensor, leader: Tensor) -> Tensor:
    """By row, the row of its channel's leader; the row itself where its channel is -1.

    channels: int64 [rows]. leader: int64 [width], by joint channel.
    """
    row_of = torch.zeros(len(leader), dtype=torch.long)
    row_of[channels[channels >= 0]] = (channels >= 0).nonzero().flatten()
    return torch.where(channels >= 0, row_of[leader[channels.clamp(min=0)]], torch.arange(len(channels)))


def _one_leader(group: MergeGroup) -> Tensor:
    """Merges all that can be merged: the leader of a class is its first channel."""
    leader = torch.arange(group.width)
    for channels in group.classes():
        leader[channels] = channels[0]
    return leader


def _is_close(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not a.is_floating_point():
        return True
    return bool((a - b).abs().max() <= 1e-6 * a.abs().max()) if a.numel() else True


def _randomized(model: nn.Module) -> nn.Module:
    """Draws weights as for initialisation, and vectors (factors, statistics) from [1/2, 3/2]: none zero or equal."""
    generator = torch.Generator().manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.dim() >= 2:
            values = torch.randn(tensor.shape, generator=generator) * (2 / max(1, tensor[0].numel())) ** 0.5
            tensor.copy_(values)
        elif tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model
