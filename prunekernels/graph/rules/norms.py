"""Rules of norms: batch norm works on each channel alone, group and layer norm take statistics of several."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...nn.adapted import keep_channels
from ...nn.norm_channels import NormChannels
from ..build import Builder
from ..channels import Channels, Kept, NetworkChannels, State
from ..trace import Traced, argument, sizes_of, value_of
from .base import Rule
from .layers import LayerRule, are_parameters


class NormRule(LayerRule):
    """Base of the rules of norms. tensors: what their layers call the parameters that parameters() returns."""

    tensors: tuple[str, ...] = ("weight", "bias")

    def parameters(self, node: fx.Node) -> tuple[Any, ...]:
        """Weight, bias, and running statistics where the norm has them; None where it has none."""
        return argument(node, 2), argument(node, 3)

    def name(self, traced: Traced, node: fx.Node) -> str:
        for attribute, parameter in zip(self.tensors, self.parameters(node), strict=True):
            if parameter is not None:
                return traced.owner_of(node, parameter, attribute)
        return traced.module_of(node) or node.name


class BatchNormRule(NormRule):
    """Batch norm: a constant channel stays constant, and a channel with weight 0 becomes its bias."""

    tensors = ("weight", "bias", "running_mean", "running_var")

    def parameters(self, node: fx.Node) -> tuple[Any, ...]:
        return tuple(node.args[1:5])

    def forward(self, net: NetworkChannels, node: fx.Node) -> State:
        parameters = node.args[1:5]
        x = net.channels(argument(node, 0), 1)
        both_statistics = (parameters[2] is None) == (parameters[3] is None)
        if x is None or not are_parameters(net, *parameters) or not both_statistics:
            return None
        for parameter in parameters:
            net.share(parameter, 0, x.ids)
        weight, bias, mean, var = (net.tensor(p) for p in parameters)
        weight = torch.ones(len(x), dtype=torch.float64) if weight is None else weight
        bias = torch.zeros(len(x), dtype=torch.float64) if bias is None else bias
        if argument(node, 5) or mean is None or var is None:  # statistics of the batch: zeros become the bias
            values = bias.masked_fill(x.values != 0, torch.nan)
        else:
            values = (x.values - mean) / (var + float(argument(node, 7))).sqrt() * weight + bias
        return Channels.of(1, torch.where(weight == 0, bias, values), x.ids)

    def _passes(self, net: NetworkChannels, node: fx.Node) -> Tensor | bool:
        weight = net.tensor(argument(node, 1))
        return True if weight is None else weight != 0

    def backward(self, net: NetworkChannels, node: fx.Node) -> None:
        x, out = self.ends(net, node)
        if net.statistics and argument(node, 3) is not None:
            out.read |= out.live
        x.read |= out.needed & self._passes(net, node)

    def emit(self, builder: Builder, node: fx.Node) -> fx.Node:
        out = builder.net.tracked(node)
        assert out is not None
        kept, old = builder.kept.of(out), builder.traced.modules.get(self.name(builder.traced, node))
        small = [None if p is None else builder.gather(p, {0: kept}) for p in node.args[1:5]]
        kind: Any = nn.BatchNorm2d if len(sizes_of(node)) == 4 else nn.BatchNorm1d
        if isinstance(old, nn.SyncBatchNorm):
            kind = partial(nn.SyncBatchNorm, process_group=old.process_group)
        momentum, affine, tracks = (
            getattr(old, "momentum", argument(node, 6)),
            small[0] is not None,
            small[2] is not None,
        )
        layer = kind(kept.numel(), argument(node, 7), momentum, affine, tracks, device="meta")
        if small[1] is None:
            layer.register_parameter("bias", None)
        if tracks:
            seen = getattr(old, "num_batches_tracked", None)
            none_seen = torch.zeros((), dtype=torch.long, device=value_of(node).device)
            layer.num_batches_tracked = none_seen if seen is None else seen.clone()
        return self.call(builder, node, layer, **dict(zip(self.tensors, small, strict=True)))


class NormOverChannelsRule(NormRule):
    """Layer norm and group norm: what is live of a group reads all channels that enter the group's statistics.

    Those are the ones that its mask leaves live, whatever their weights are, so the small network has to have all of
    them, and none of the others may enter.
    """

    def groups(self, node: fx.Node) -> int:
        return 1

    def fits(self, node: fx.Node) -> bool:
        return True

    def entering(self, net: NetworkChannels, node: fx.Node) -> Tensor:
        """Bool [C]: which channels the statistics are of."""
        C = sizes_of(node)[self.axis(node)]
        live = net.traced.norm_masks.get(self.name(net.traced, node))
        return torch.ones(C, dtype=torch.bool) if live is None else live

    def forward(self, net: NetworkChannels, node: fx.Node) -> State:
        parameters = self.parameters(node)
        if not self.fits(node) or not are_parameters(net, *parameters):
            return None
        x = net.channels(argument(node, 0), self.axis(node))
        if x is None:
            return None
        for parameter in parameters:
            net.share(parameter, 0, x.ids)
        weight, bias = (net.tensor(p) for p in parameters)
        values = torch.full((len(x),), torch.nan, dtype=torch.float64)
        if weight is not None:
            values = torch.where(weight == 0, torch.zeros_like(weight) if bias is None else bias, values)
        return Channels.of(self.axis(node), values.masked_fill(~self.entering(net, node), 0), x.ids)

    def backward(self, net: NetworkChannels, node: fx.Node) -> None:
        x, out = self.ends(net, node)
        groups, entering = self.groups(node), self.entering(net, node)
        used = out.needed.view(groups, -1).any(1).repeat_interleave(len(x) // groups)
        x.read |= used & entering
        out.read |= used & entering
        net.classes.pin(x.ids[used & entering & ~out.live])  # a weight of zero makes a constant of the result alone

    def hold(self, net: NetworkChannels, node: fx.Node, literal: int) -> None:
        owner = net.traced.modules.get(self.name(net.traced, node))
        weight = argument(node, 2)
        if not isinstance(owner, (nn.GroupNorm, nn.LayerNorm)) or weight is None:  # its sizes are not ours to change
            x, out = self.ends(net, node)
            net.classes.pin(x.ids)
            net.classes.pin(out.ids)

    def kept_channels(self, net: NetworkChannels, node: fx.Node, kept: Kept) -> NormChannels:
        """What the small norm normalizes, and in which groups."""
        x, out = self.ends(net, node)
        rows = kept.of(out)
        rows = torch.where(self.entering(net, node)[rows], rows, -1)
        return NormChannels.of_rows(rows.numpy(), self.groups(node), len(x))

    def emit(self, builder: Builder, node: fx.Node) -> fx.Node:
        channels = self.kept_channels(builder.net, node, builder.kept)
        out = builder.net.tracked(node)
        assert out is not None
        weight, bias = (
            None if p is None else builder.gather(p, {0: builder.kept.of(out)}) for p in self.parameters(node)
        )
        layer = self.layer(node, channels.channels, weight is not None)
        if bias is None:
            layer.register_parameter("bias", None)
        new = self.call(builder, node, layer, weight=weight, bias=bias)
        keep_channels(layer, channels)
        return new

    def layer(self, node: fx.Node, count: int, affine: bool) -> nn.Module:
        """A layer of torch.nn with so many channels."""
        raise NotImplementedError


class LayerNormRule(NormOverChannelsRule):
    def axis(self, node: fx.Node) -> int:
        return len(sizes_of(node)) - 1

    def fits(self, node: fx.Node) -> bool:
        return len(argument(node, 1)) == 1 and len(sizes_of(node)) >= 2

    def layer(self, node: fx.Node, count: int, affine: bool) -> nn.Module:
        return nn.LayerNorm(count, argument(node, 4, 1e-5), affine, device="meta")


class GroupNormRule(NormOverChannelsRule):
    def groups(self, node: fx.Node) -> int:
        return argument(node, 1)

    def layer(self, node: fx.Node, count: int, affine: bool) -> nn.Module:
        return nn.GroupNorm(1, count, argument(node, 4, 1e-5), affine, device="meta")


NORMS: dict[str, Rule] = {"batch_norm": BatchNormRule(), "layer_norm": LayerNormRule(), "group_norm": GroupNormRule()}
