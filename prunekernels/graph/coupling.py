"""coupled_groups: filters whose outputs meet in an add, so that they can only be removed together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.convert import convert
from ..nn.lost_masks import check_no_mask_lost
from ..nn.masked_filters import MaskedFilters
from ..nn.masked_norm import MaskedNorm
from ..nn.reparametrized import deep_copy
from .analysis import ChannelAnalysis
from .channels import Channels
from .layer_uses import any_weights, filter_uses, layer_uses
from .outputs import output_ids
from .rules.layers import WeightRule
from .rules.norms import NormRule
from .trace import trace

Uses = Mapping[str, list[tuple[Channels, Channels]]]


@dataclass(eq=False)
class Group:
    """Layers with filters whose outputs meet, directly or through others, in adds, products, depthwise or grouped ones.

    The channels that meet are the joint channels of the group, numbered from 0 to width - 1. Where a shortcut pads
    channels, the filters of a narrow layer are only some of them. All that a group of a grouped convolution reads and
    computes is one joint channel. Where groups have more filters and inputs than there are groups, the filters at the
    same place of every group are one instead, and so are the inputs: either way groups stay even, as small networks
    want them.

    Attributes:
        width: The number of joint channels.
        filters: For each layer with filters, by name, the joint channel of each filter: int64 [K].
        norms: For each norm behind them, the joint channel of each of its channels, int64 [C]; -1: none.
        readers: For each layer that reads them, the joint channel of each input channel (column of a linear layer),
            int64 [C]; -1: none. An input counts only if it is exactly zero once the filters, and the channels of masked
            norms, are dead; behind a plain norm or a sigmoid it is not.

        is_output: Whether some of the channels are outputs of the network, as are the classes of a convolutional
            classifier or segmentation head, the boxes of a detector, and the features of a network that returns them.

    Examples:
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b = torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(3, 4, 1)
        ...     def forward(self, x):
        ...         return self.a(x) + self.b(x)
        >>> group, = pk.coupled_groups(Block(), torch.randn(2, 3, 8, 8))
        >>> group.layers, group.width
        (('a', 'b'), 4)
        >>> group.is_output
        True
        >>> group.filters["b"]
        tensor([0, 1, 2, 3])
    """

    width: int
    filters: dict[str, Tensor] = field(repr=False)
    norms: dict[str, Tensor] = field(repr=False)
    readers: dict[str, Tensor] = field(repr=False)
    is_output: bool = False

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers with filters, in the order of the network."""
        return tuple(self.filters)

    def combine(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Adds up a score per filter over the layers.

        Args:
            scores: By layer name, the scores of its filters, [K].

        Returns:
            The score of each joint channel, float64 [width].

        Examples:
            >>> model = torch.nn.Sequential(pk.MaskedConv2d(3, 4, 1))
            >>> group, = pk.coupled_groups(model, torch.randn(2, 3, 8, 8))
            >>> group.combine({"0": torch.arange(4)})
            tensor([0., 1., 2., 3.], dtype=torch.float64)
        """
        total = torch.zeros(self.width, dtype=torch.float64)
        for name, score in scores.items():
            total.index_add_(0, self.filters[name], score.detach().cpu().double())
        return total

    def set_masks(self, model: nn.Module, keep: Tensor) -> None:
        """Masks the joint channels in every filter, norm and input of a model.

        Hard-dead filters stay dead. Layers without masks are left alone.

        Args:
            model: The network that the groups were found in, or a copy of it with masked layers.
            keep: bool [width]; True: live, False: dead.

        Examples:
            >>> model = torch.nn.Sequential(pk.MaskedConv2d(3, 4, 1), torch.nn.ReLU(), pk.MaskedConv2d(4, 2, 1))
            >>> group = pk.coupled_groups(model, torch.randn(2, 3, 8, 8))[0]
            >>> group.set_masks(model, torch.arange(4) < 3)
            >>> model[2].input_mask
            tensor([ True,  True,  True, False])
        """
        if keep.dtype != torch.bool or keep.shape != (self.width,):
            got = f"{keep.dtype} {list(keep.shape)}"
            raise ValueError(f"Group.set_masks: keep: expected torch.bool [{self.width}], got {got}")
        check_no_mask_lost("Group.set_masks", model)
        for name, channels in self.filters.items():
            layer = model.get_submodule(name)
            if isinstance(layer, MaskedFilters):
                layer.set_masks(filter=self._spread(keep, channels, layer.filter_mask) & layer.hard_mask)
        for name, channels in self.norms.items():
            layer = model.get_submodule(name)
            if isinstance(layer, MaskedNorm):
                layer.set_mask(self._spread(keep, channels, layer.channel_mask))
        for name, channels in self.readers.items():
            layer = model.get_submodule(name)
            if isinstance(layer, MaskedFilters):
                layer.set_masks(input=self._spread(keep, channels, layer.input_mask))

    @staticmethod
    def _spread(keep: Tensor, channels: Tensor, mask: Tensor) -> Tensor:
        """A layer's mask with keep [width] written to the channels that belong to the group."""
        new = keep[channels.clamp(min=0)].to(mask.device)
        return torch.where((channels >= 0).to(mask.device), new, mask)


def coupled_groups(model: nn.Module, example_input: Any) -> list[Group]:
    """Groups the convolutions of a model by what its graph adds up: their filters can only be removed together.

    Every convolution is in one group, alone if its output meets no other, and so is every linear layer that is masked
    (see `convert` with linears=True). Other linear layers only read. A layer that is used twice is one layer.
    Convolutions that the trace does not follow (a functional one, one whose output is written in place) are in no
    group. Groups whose channels are outputs of the network are marked (Group.is_output). The model stays as it is.

    Args:
        model: A network, with masked layers or without.
        example_input: What model takes: a tensor such as [N, C, H, W], a tuple or a dict of arguments (see Example).

    Returns:
        The groups, in the order of their first layers.

    Examples:
        >>> model = torch.nn.Sequential(pk.MaskedConv2d(3, 8, 3), pk.MaskedConv2d(8, 8, 3))
        >>> for group in pk.coupled_groups(model, torch.randn(2, 3, 16, 16)):
        ...     norms = {name: model.get_submodule(name).weight.flatten(1).norm(dim=1) for name in group.layers}
        ...     scores = group.combine(norms)
        ...     group.set_masks(model, scores >= scores.median())
        >>> model[0].filter_mask.sum(), model[1].input_mask.sum()
        (tensor(5), tensor(5))
    """
    if not any(isinstance(module, (MaskedFilters, MaskedNorm)) for module in model.modules()):
        model = deep_copy(model)
        convert(model)
    traced = trace("coupled_groups", model, example_input)
    analysis = ChannelAnalysis(traced, any_weights(model, traced, all_dead=True), even_groups=True)
    roots = analysis.classes.roots()
    norms, readers = (layer_uses(analysis, kind) for kind in (NormRule, WeightRule))
    filters = {name: roots[uses[0][1].ids] for name, uses in filter_uses(analysis, model).items()}
    found = [_group(members, filters, roots, norms, readers) for members in _components(filters)]
    outputs = torch.zeros(roots.numel(), dtype=torch.bool)
    outputs[roots[output_ids(analysis)]] = True
    for group in found:
        group.is_output = any(bool(outputs[filters[name]].any()) for name in group.layers)
    return found


def _components(filters: Mapping[str, Tensor]) -> list[list[str]]:
    """Lists of layers that share classes, directly or through others. filters: the class of each filter, by layer."""
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
    place = torch.full((roots.numel(),), -1)  # [classes] -> joint channel
    width = 0
    widest_first = sorted(members, key=lambda name: -filters[name].numel())  # its filters are numbered in order
    for name in widest_first:
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
    """The layers that have a channel of the group."""
    return {name: joint for name, joint in channels.items() if bool((joint >= 0).any())}
