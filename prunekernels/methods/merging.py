"""Streams: the channels that filters make, all that has a row or a column for them, and how equal ones become one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..graph import Group
from ..graph.channels import Flow
from ..graph.layer_uses import any_weights, layer_uses
from ..graph.rules.layers import ConvRule, WeightRule
from ..graph.trace import Traced, plain_copy, trace


@dataclass(eq=False)
class Stream:
    """The channels of layers that meet in adds. filters, norms and readers are as in Group, but a reader is any layer
    that reads the channels, be they zero or not. layers: those with filters, from the nearest to the input on.
    """

    width: int
    filters: dict[str, Tensor] = field(repr=False)
    norms: dict[str, Tensor] = field(repr=False)
    readers: dict[str, Tensor] = field(repr=False)
    layers: list[str]

    def classes(self) -> list[Tensor]:
        """Channels that the same layers have: only such can be equal everywhere."""
        seen = [self._has(channels) for part in (self.filters, self.norms, self.readers) for channels in part.values()]
        by_pattern: dict[tuple[bool, ...], list[int]] = {}
        for channel, pattern in enumerate(zip(*(s.tolist() for s in seen), strict=True)):
            by_pattern.setdefault(pattern, []).append(channel)
        return [torch.tensor(channels) for channels in by_pattern.values()]

    def _has(self, channels: Tensor) -> Tensor:
        has = torch.zeros(self.width, dtype=torch.bool)
        has[channels[channels >= 0]] = True
        return has

    def rows(self, model: nn.Module) -> Iterable[tuple[Tensor, Tensor, bool]]:
        """Tensors with a row per channel, the channel of each row (-1: another's), and whether it is a statistic."""
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
    def merge(self, model: nn.Module, leader: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """Whoever reads channel c reads leader[c] instead: weights of equal channels are added up, the others' zero,
        as are their filters and their norms' weights. leader: int64 [width], itself where a channel stays.

        Returns the readers' weights and which of their columns changed.
        """
        changed = []
        for name, channels in self.readers.items():
            weight = model.get_submodule(name).weight
            assert isinstance(weight, nn.Parameter)
            changed.append((weight, _add_columns(weight, channels, leader)))
        gone = leader != torch.arange(self.width)
        for tensor, channels, is_statistic in self.rows(model):
            if not is_statistic:
                tensor[((channels >= 0) & gone[channels.clamp(min=0)]).to(tensor.device)] = 0
        return changed


def _add_columns(weight: Tensor, channels: Tensor, leader: Tensor) -> Tensor:
    """Moves columns to those of their leaders; of several of one channel (pixels), each to its like."""
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


def streams(op: str, model: nn.Module, example_input: Any, groups: Sequence[Group]) -> dict[tuple[str, ...], Stream]:
    """By layers, the streams of these groups (of coupled_groups) whose channels can be merged when they are equal.

    Tried out on a copy with random weights: merging equal channels must leave the outputs alone. It does not where
    something else tells channels apart: another input that is added, weights of its own, an output.
    """
    traced = trace(op, model, example_input)
    flow = Flow(traced, any_weights(model, traced, all_dead=True))
    convs, reading, depth = layer_uses(flow, ConvRule), layer_uses(flow, WeightRule), _depths(flow)
    modules, roots = dict(model.named_modules()), flow.classes.roots()
    found = {}
    for group in groups:
        if any(len(channels.unique()) < len(channels) for channels in group.filters.values()):
            continue  # filters of a group convolution's input live and die together, yet differ
        place = torch.full((roots.numel(),), -1)
        for name, channels in group.filters.items():
            place[roots[convs[name][0][1].ids]] = channels
        readers = {n: place[roots[uses[0][0].ids]] for n, uses in reading.items() if _adds_up(modules.get(n))}
        readers = {n: channels for n, channels in readers.items() if bool((channels >= 0).any())}
        norms = {n: channels for n, channels in group.norms.items() if n in modules}
        layers = sorted(group.layers, key=lambda name: depth[name])
        found[group.layers] = Stream(group.width, group.filters, norms, readers, layers)
    return _mergeable(traced, model, found)


def _adds_up(module: nn.Module | None) -> bool:
    """What this layer reads it multiplies by columns of weight and adds up."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def _depths(flow: Flow) -> dict[str, int]:
    """By convolution, how many there are on the longest way from the input to it."""
    depths: dict[fx.Node, int] = {}
    by_name: dict[str, int] = {}
    for node in flow.traced.graph.nodes:
        depths[node] = max((depths[n] for n in node.all_input_nodes), default=0)
        rule = flow.rules.get(node)
        if isinstance(rule, ConvRule) and flow.states[node] is not None:
            depths[node] += 1
            by_name.setdefault(rule.name(flow.traced, node), depths[node])
    return by_name


@torch.no_grad()
def _mergeable(
    traced: Traced, model: nn.Module, found: Mapping[tuple[str, ...], Stream]
) -> dict[tuple[str, ...], Stream]:
    """All at once, and one by one if that fails."""
    trial = _randomized(plain_copy(model).double())
    inputs = tuple(x.double() if x.is_floating_point() else x for x in traced.inputs)
    kept = {name: tensor.clone() for name, tensor in trial.state_dict().items()}

    def holds(some: Iterable[Stream]) -> bool:
        trial.load_state_dict(kept)
        leaders = [_one_leader(stream) for stream in some]
        for stream, leader in zip(some, leaders, strict=True):
            for tensor, channels, _ in stream.rows(trial):
                same = channels.to(tensor.device) >= 0
                tensor[same] = tensor[leader_rows(channels, leader).to(tensor.device)][same]
        before = pytree.tree_leaves(trial(*inputs))
        for stream, leader in zip(some, leaders, strict=True):
            stream.merge(trial, leader)
        return all(map(_is_close, before, pytree.tree_leaves(trial(*inputs))))

    if holds(list(found.values())):
        return dict(found)
    return {layers: stream for layers, stream in found.items() if holds([stream])}


def leader_rows(channels: Tensor, leader: Tensor) -> Tensor:
    """By row, the row of its channel's leader; its own where the row is no channel's."""
    row_of = torch.zeros(len(leader), dtype=torch.long)
    row_of[channels[channels >= 0]] = (channels >= 0).nonzero().flatten()
    return torch.where(channels >= 0, row_of[leader[channels.clamp(min=0)]], torch.arange(len(channels)))


def _one_leader(stream: Stream) -> Tensor:
    leader = torch.arange(stream.width)
    for channels in stream.classes():
        leader[channels] = channels[0]
    return leader


def _is_close(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not a.is_floating_point():
        return True
    return bool((a - b).abs().max() <= 1e-6 * a.abs().max()) if a.numel() else True


def _randomized(model: nn.Module) -> nn.Module:
    """Weights as at birth; the rest, factors and statistics, from 1/2 to 3/2, so that nothing is zero or the same."""
    generator = torch.Generator().manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.dim() >= 2:
            values = torch.randn(tensor.shape, generator=generator) * (2 / max(1, tensor[0].numel())) ** 0.5
            tensor.copy_(values)
        elif tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model
