"""Rules of the layers with weights: a zero kernel reads nothing, a constant input that is not padded becomes a bias."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...ops import mask_table
from ..build import Builder
from ..channels import Channels, ConvGroups, Kept, NetworkChannels, State
from ..trace import Traced, argument, sizes_of, value_of
from .base import Rule


def are_parameters(net: NetworkChannels, *nodes: Any) -> bool:
    return all(node is None or net.traced.is_parameter(node) for node in nodes)


class LayerRule(Rule):
    """An operator with parameters and one input, whose channels stay on their axis; becomes a layer of torch.nn."""

    def axis(self, node: fx.Node) -> int:
        return 1

    def name(self, traced: Traced, node: fx.Node) -> str:
        return traced.owner_of(node, argument(node, 1))

    def ends(self, net: NetworkChannels, node: fx.Node) -> tuple[Channels, Channels]:
        """The channels of the input (all live, if they are not followed) and of the result."""
        x, out = net.channels(argument(node, 0), self.axis(node)), net.tracked(node)
        assert x is not None and out is not None
        return x, out

    def hold(self, net: NetworkChannels, node: fx.Node, literal: int) -> None:
        pass

    def operands(self, builder: Builder, node: fx.Node) -> list[fx.Node]:
        return [argument(node, 0)]

    def call(self, builder: Builder, node: fx.Node, layer: nn.Module, **tensors: Any) -> fx.Node:
        return builder.layer(node, self.name(builder.traced, node), _with(layer, **tensors), argument(node, 0))


class WeightRule(LayerRule):
    """out[k] = bias[k] + sum over c of weight[k, c] * x[c]: convolutions and linear layers."""

    whole_groups = False  # whether groups are kept or removed as a whole

    def groups(self, node: fx.Node) -> int:
        return 1

    def padded(self, node: fx.Node) -> bool:
        return False

    def fits(self, node: fx.Node) -> bool:
        return True

    def filters_first(self, node: fx.Node, weight: Tensor) -> Tensor:
        """The weight as [K, C / groups, ...]."""
        return weight

    def index(self, node: fx.Node, rows: Tensor, columns: Tensor, by_group: Tensor) -> dict[int, Tensor]:
        """What is kept of the weight, given the filters and the input channels that are, the latter also by group."""
        return {0: rows, 1: by_group}

    def share(self, net: NetworkChannels, node: fx.Node, inputs: Tensor, filters: Tensor) -> None:
        """Ties the ids of input channels and filters to the dimensions of the weight that they count."""
        weight, by_group = argument(node, 1), inputs.view(self.groups(node), -1)
        net.share(weight, 0, filters)
        if len(by_group) == 1:
            net.share(weight, 1, inputs)
        elif by_group.shape[1] > 1:
            net.share(weight, 1, by_group)

    def foldable(self, node: fx.Node) -> bool:
        """Whether a constant input adds a constant to the output, and no other node uses the bias."""
        return not self.padded(node) and all(len(p.users) == 1 for p in node.args[1:3] if isinstance(p, fx.Node))

    def _weight(self, net: NetworkChannels, node: fx.Node) -> tuple[Tensor, Tensor]:
        """Of each kernel, [K, C / groups]: the sum of its taps, and whether one of them is not zero."""
        if node not in net.weights:
            stored = net.tensor(argument(node, 1))
            assert stored is not None
            weight = self.filters_first(node, stored)
            taps = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2)
            net.weights[node] = taps.sum(2), (taps != 0).any(2)
        return net.weights[node]

    def filters(self, node: fx.Node) -> int:
        """K"""
        return sizes_of(node)[self.axis(node)]

    def _by_kernel(self, node: fx.Node, channels: Tensor) -> Tensor:
        """What belongs to input channels, [C], for each kernel that reads them, [K, C / groups]."""
        groups = self.groups(node)
        return channels.view(groups, -1).repeat_interleave(self.filters(node) // groups, 0)

    def folded(self, net: NetworkChannels, node: fx.Node, values: Tensor) -> Tensor:
        """What inputs that are constant add to each filter's output, float64 [K]; values: [C], NaN = live."""
        if not bool(((values != 0) & ~values.isnan()).any()):
            return torch.zeros(self.filters(node), dtype=torch.float64)
        sums, alive = self._weight(net, node)
        x = self._by_kernel(node, values)
        return torch.where(alive & ~x.isnan() & (x != 0), sums * x, 0.0).sum(1)

    def forward(self, net: NetworkChannels, node: fx.Node) -> State:
        weight, bias = argument(node, 1), argument(node, 2)
        if not are_parameters(net, weight, bias) or weight is None or not self.fits(node):
            return None
        x = net.channels(argument(node, 0), self.axis(node))
        if x is None:
            return None
        ids = self._ids(net, node, x)
        self.share(net, node, x.ids, ids)
        net.share(bias, 0, ids)
        _, alive = self._weight(net, node)
        given = self._by_kernel(node, x.values)
        open_ = given.isnan() | ((given != 0) & (not self.foldable(node)))
        values = self.folded(net, node, x.values)
        offset = net.tensor(bias)
        if offset is not None:
            values = values + offset
        return Channels.of(self.axis(node), values.masked_fill((alive & open_).any(1), torch.nan), ids)

    def _ids(self, net: NetworkChannels, node: fx.Node, x: Channels) -> Tensor:
        K, groups = self.filters(node), self.groups(node)
        if groups == 1:
            return net.classes.new(K)
        by_group, name = x.ids.view(groups, -1), self.name(net.traced, node)
        if isinstance(net.traced.modules.get(name), (nn.Conv2d, nn.ConvTranspose2d)):
            net.numbers.setdefault((name, "groups"), by_group)
        finer = not net.even_groups or min(by_group.shape[1], K // groups) > groups
        if by_group.shape[1] > 1 and finer and not self.whole_groups:
            sides = ConvGroups(by_group, net.classes.new(K).view(groups, -1))
            net.groups.append(sides)
            for ids in sides if net.even_groups else ():
                net.classes.tie(ids[:1].expand(groups - 1, -1), ids[1:])
            return sides.filters.flatten()
        for c in range(1, by_group.shape[1]):  # kept or removed as a whole, with its filters
            net.classes.tie(by_group[:, 0], by_group[:, c])
        return by_group[:, 0].repeat_interleave(K // groups)

    def backward(self, net: NetworkChannels, node: fx.Node) -> None:
        x, out = self.ends(net, node)
        _, alive = self._weight(net, node)
        groups = self.groups(node)
        read = (alive & out.needed[:, None]).view(groups, -1, alive.shape[1]).any(1).flatten()
        x.read |= read
        if not self.foldable(node):
            net.classes.pin(x.ids[read & ~x.live & (x.values != 0)])

    def multiply_adds(self, net: NetworkChannels, node: fx.Node, kept: Kept) -> int:
        """What the layer costs with the channels that are kept."""
        x, out = self.ends(net, node)
        places = math.prod(sizes_of(node)) // max(len(out), 1)
        taps = math.prod(sizes_of(argument(node, 1))[1:])
        by_group = x.ids.view(self.groups(node), -1)
        columns = kept.of_ids(by_group).shape[1] / max(by_group.shape[1], 1)
        return round(places * kept.of(out).numel() * taps * columns)

    def _parts(
        self, builder: Builder, node: fx.Node
    ) -> tuple[Tensor, nn.Parameter | Tensor, nn.Parameter | Tensor | None]:
        """The input channels that are kept (their indices), the small weight and the small bias."""
        x, out = self.ends(builder.net, node)
        rows, columns = builder.kept.of(out), builder.kept.of(x)
        by_group = x.ids.view(self.groups(node), -1)
        own = columns if len(by_group) == 1 else builder.kept.of_ids(by_group)
        weight = builder.gather(argument(node, 1), self.index(node, rows, columns, own))
        bias = argument(node, 2)
        small = None if bias is None else builder.gather(bias, {0: rows})
        if self.foldable(node):
            values = x.values.clone()
            values[columns] = torch.nan
            extra = self.folded(builder.net, node, values)[rows]
            if bool((extra != 0).any()):
                small = builder.folded_bias(argument(node, 1), bias, rows, extra)
        return columns, weight, small


class ConvRule(WeightRule):
    module: type[nn.Module] = nn.Conv2d  # whose number of groups the small network may change

    def groups(self, node: fx.Node) -> int:
        return argument(node, 6, 1)

    def fits(self, node: fx.Node) -> bool:
        return len(sizes_of(argument(node, 0))) == 4

    def padded(self, node: fx.Node) -> bool:
        padding = argument(node, 4, 0)
        if isinstance(padding, str):
            return padding == "same" and max(sizes_of(argument(node, 1))[2:]) > 1
        return any(padding) if isinstance(padding, (list, tuple)) else bool(padding)

    def hold(self, net: NetworkChannels, node: fx.Node, literal: int) -> None:
        owner = net.traced.modules.get(self.name(net.traced, node))
        if self.groups(node) > 1 and not isinstance(owner, self.module):  # its number of groups is not ours to change
            x, out = self.ends(net, node)
            net.classes.pin(x.ids)
            net.classes.pin(out.ids)

    def emit(self, builder: Builder, node: fx.Node) -> fx.Node:
        columns, weight, bias = self._parts(builder, node)
        stride, padding, dilation = argument(node, 3, [1, 1]), argument(node, 4, [0, 0]), argument(node, 5, [1, 1])
        kernel: Any = tuple(weight.shape[2:])
        layer = nn.Conv2d(
            columns.numel(), weight.shape[0], kernel, _pair(stride),
            padding if isinstance(padding, str) else _pair(padding), _pair(dilation),
            1 if self.groups(node) == 1 else columns.numel() // weight.shape[1], bias is not None, device="meta",
        )  # fmt: skip
        return self.call(builder, node, layer, weight=weight, bias=bias)


class ConvTransposeRule(ConvRule):
    """A weight [C, K / groups, R, S]. A constant input is no constant behind it: pixels have different taps."""

    module = nn.ConvTranspose2d
    whole_groups = True

    def fits(self, node: fx.Node) -> bool:
        return super().fits(node) and set(node.all_input_nodes) <= set(node.args[:3])  # no sizes among its numbers

    def foldable(self, node: fx.Node) -> bool:
        return False

    def filters_first(self, node: fx.Node, weight: Tensor) -> Tensor:
        return mask_table.exchanged(weight, self.groups(node))

    def index(self, node: fx.Node, rows: Tensor, columns: Tensor, by_group: Tensor) -> dict[int, Tensor]:
        return {0: columns} if self.groups(node) > 1 else {0: columns, 1: rows}

    def share(self, net: NetworkChannels, node: fx.Node, inputs: Tensor, filters: Tensor) -> None:
        net.share(argument(node, 1), 0, inputs)
        if self.groups(node) == 1:
            net.share(argument(node, 1), 1, filters)

    def multiply_adds(self, net: NetworkChannels, node: fx.Node, kept: Kept) -> int:
        x, out = self.ends(net, node)
        places = math.prod(sizes_of(argument(node, 0))) // max(len(x), 1)
        taps = math.prod(sizes_of(argument(node, 1))[1:])
        rows = kept.of(out).numel() / len(out) if self.groups(node) == 1 else 1
        return round(places * kept.of(x).numel() * taps * rows)

    def emit(self, builder: Builder, node: fx.Node) -> fx.Node:
        columns, weight, bias = self._parts(builder, node)
        stride, padding, extra = argument(node, 3, [1, 1]), argument(node, 4, [0, 0]), argument(node, 5, [0, 0])
        old = sizes_of(argument(node, 1))[0] // self.groups(node)  # input channels of a group
        groups = 1 if self.groups(node) == 1 else columns.numel() // old
        kernel: Any = tuple(weight.shape[2:])
        layer = nn.ConvTranspose2d(
            columns.numel(), weight.shape[1] * groups, kernel, _pair(stride), _pair(padding), _pair(extra), groups,
            bias is not None, _pair(argument(node, 7, [1, 1])), device="meta",
        )  # fmt: skip
        return self.call(builder, node, layer, weight=weight, bias=bias)


class LinearRule(WeightRule):
    def axis(self, node: fx.Node) -> int:
        return len(sizes_of(node)) - 1

    def fits(self, node: fx.Node) -> bool:
        return len(sizes_of(node)) >= 2

    def emit(self, builder: Builder, node: fx.Node) -> fx.Node:
        columns, weight, bias = self._parts(builder, node)
        layer = nn.Linear(columns.numel(), weight.shape[0], bias is not None, device="meta")
        return self.call(builder, node, layer, weight=weight, bias=bias)


class PReLURule(LayerRule):
    """prelu, with one slope or with one for each channel."""

    def forward(self, net: NetworkChannels, node: fx.Node) -> State:
        x = net.tracked(argument(node, 0))
        if x is None or x.axis != 1 or not net.traced.is_parameter(argument(node, 1)):
            return None
        if value_of(argument(node, 1)).numel() == len(x):
            net.share(argument(node, 1), 0, x.ids)
        else:
            net.pin_parameter(argument(node, 1))
        return Channels.of(1, self.values(net, node, x.values), x.ids)

    def values(self, net: NetworkChannels, node: fx.Node, values: Tensor) -> Tensor:
        """The constants of the result, from those of the operand; both float64 [C], NaN = live."""
        slope = net.tensor(argument(node, 1))
        assert slope is not None
        return torch.where(values < 0, values * slope, values)

    def backward(self, net: NetworkChannels, node: fx.Node) -> None:
        x, out = net.ends(node)
        x.read |= out.needed

    def emit(self, builder: Builder, node: fx.Node) -> fx.Node:
        out, slope = builder.net.tracked(node), value_of(argument(node, 1))
        assert out is not None and slope is not None
        by_channel = slope.numel() == len(out)
        small = builder.gather(argument(node, 1), {0: builder.kept.of(out)} if by_channel else {})
        layer = nn.PReLU(small.numel(), device="meta")
        return self.call(builder, node, layer, weight=small)


def _pair(value: Any) -> Any:
    return value if isinstance(value, int) else tuple(value) if len(value) == 2 else (value[0], value[0])


def _with(layer: Any, **tensors: Any) -> Any:
    """Puts tensors into a layer; one that is no parameter becomes a buffer, even in a parameter's place."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        is_parameter = isinstance(tensor, nn.Parameter)
        layer._parameters.pop(name, None)
        if is_parameter:
            layer.register_parameter(name, tensor)
        elif name in layer._buffers:
            layer._buffers[name] = tensor
        else:
            layer.register_buffer(name, tensor)
    return layer


LAYERS: dict[str, Rule] = {
    "conv2d": ConvRule(),
    "conv_transpose2d": ConvTransposeRule(),
    "linear": LinearRule(),
    "prelu": PReLURule(),
}
