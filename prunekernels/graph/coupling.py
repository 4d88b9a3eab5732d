"""coupled_groups: filters that meet in an add, and so can only be gone together."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.batch_norm import MaskedBatchNorm2d
from ..nn.conv import MaskedConv2d
from ..nn.convert import convert
from .analysis import ChannelAnalysis
from .channels import Channels
from .layer_uses import any_weights, layer_uses
from .rules.layers import ConvRule, NormRule, WeightRule
from .trace import trace

Uses = Mapping[str, list[tuple[Channels, Channels]]]


@dataclass(eq=False)
class Group:
    """Convolutions whose filters meet, directly or through others, in adds, products or depthwise layers.

    The group has width joint channels. filters, norms and readers say, by layer name, which of them each filter,
    channel or input (a linear layer's column) is: long tensors, -1 = none of the group's. Where a shortcut pads
    channels, a narrow layer's filters are an inner part of the joint channels. readers has an input only if it is
    exactly zero once the filters and the masked norms' channels are dead: not behind a plain norm or a sigmoid.
    """

    width: int
    filters: dict[str, Tensor] = field(repr=False)
    norms: dict[str, Tensor] = field(repr=False)
    readers: dict[str, Tensor] = field(repr=False)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the convolutions, in the network's order."""
        return tuple(self.filters)

    def combine(self, scores: Mapping[str, Tensor]) -> Tensor:
        """[width]: sums over the layers of a score per filter, by layer name."""
        total = torch.zeros(self.width, dtype=torch.float64)
        for name, score in scores.items():
            total.index_add_(0, self.filters[name], score.detach().cpu().double())
        return total

    def set_masks(self, model: nn.Module, keep: Tensor) -> None:
        """Makes the joint channels that keep [width] has as False dead, the others live, wherever model holds them.

        Hard-dead filters stay dead; layers without masks are passed over.
        """
        if keep.dtype != torch.bool or keep.shape != (self.width,):
            got = f"{keep.dtype} {list(keep.shape)}"
            raise ValueError(f"Group.set_masks: keep: expected torch.bool [{self.width}], got {got}")
        for name, channels in self.filters.items():
            layer = model.get_submodule(name)
            if isinstance(layer, MaskedConv2d):
                layer.set_masks(filter=self._spread(keep, channels, layer.filter_mask) & layer.hard_mask)
        for name, channels in self.norms.items():
            layer = model.get_submodule(name)
            if isinstance(layer, MaskedBatchNorm2d):
                layer.set_mask(self._spread(keep, channels, layer.channel_mask))
        for name, channels in self.readers.items():
            layer = model.get_submodule(name)
            if isinstance(layer, MaskedConv2d):
                layer.set_masks(input=self._spread(keep, channels, layer.input_mask))

    @staticmethod
    def _spread(keep: Tensor, channels: Tensor, mask: Tensor) -> Tensor:
        """The mask with keep written where it is the group's."""
        new = keep[channels.clamp(min=0)].to(mask.device)
        return torch.where((channels >= 0).to(mask.device), new, mask)


def coupled_groups(model: nn.Module, example_input: Any) -> list[Group]:
    """Every convolution of model in exactly one group, by the graph of its forward; alone where nothing meets.

    model may be masked or not yet; it stays as it is. A layer that is used twice is one layer. Convolutions that the
    trace does not follow (a functional one, one that is written in place) are in no group.

        >>> for group in pk.coupled_groups(model, images):
        ...     norms = {name: model.get_submodule(name).weight.flatten(1).norm(dim=1) for name in group.layers}
        ...     group.set_masks(model, group.combine(norms) > 1.0)
    """
    if not any(isinstance(module, (MaskedConv2d, MaskedBatchNorm2d)) for module in model.modules()):
        model = copy.deepcopy(model)
        convert(model)
    traced = trace("coupled_groups", model, example_input)
    analysis = ChannelAnalysis(traced, any_weights(model, traced, all_dead=True))
    roots = analysis.classes.roots()
    convs, norms, readers = (layer_uses(analysis, kind) for kind in (ConvRule, NormRule, WeightRule))
    convs = {name: uses for name, uses in convs.items() if name in traced.modules}
    filters = {name: roots[uses[0][1].ids] for name, uses in convs.items()}
    return [_group(members, filters, roots, norms, readers) for members in _components(filters)]


def _components(filters: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of layers that share a class, in the order of the first."""
    group_of: dict[int, list[str]] = {}
    for name, classes in filters.items():
        own = set(classes.tolist())
        met = {id(group_of[c]): group_of[c] for c in own if c in group_of}
        merged = [member for group in met.values() for member in group] + [name]
        for c in own | {c for c, group in group_of.items() if id(group) in met}:
            group_of[c] = merged
    order = list(filters)
    unique = {id(group): sorted(group, key=order.index) for group in group_of.values()}
    return sorted(unique.values(), key=lambda group: order.index(group[0]))


def _group(members: list[str], filters: Mapping[str, Tensor], roots: Tensor, norms: Uses, readers: Uses) -> Group:
    place = torch.full((roots.numel(),), -1)  # of a class among the joint channels
    width = 0
    for name in sorted(members, key=lambda name: -filters[name].numel()):  # the widest layer's are in order
        for c in filters[name].tolist():
            if place[c] < 0:
                place[c], width = width, width + 1
    seen_by = {name: place[roots[uses[0][1].ids]] for name, uses in norms.items()}
    read_by = {}
    for name, uses in readers.items():
        is_zero = torch.stack([x.values == 0 for x, _ in uses]).all(0)
        read_by[name] = place[roots[uses[0][0].ids]].masked_fill(~is_zero, -1)
    return Group(width, {name: place[filters[name]] for name in members}, _some(seen_by), _some(read_by))


def _some(channels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layers that see the group at all."""
    return {name: joint for name, joint in channels.items() if bool((joint >= 0).any())}
