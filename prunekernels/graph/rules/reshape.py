"""Rules of views and permutations: where the channels go."""

from __future__ import annotations

import math

import torch
from torch import fx

from ..build import Builder
from ..channels import Channels, NetworkChannels, State
from ..trace import argument, op_name, sizes_of, value_of
from .base import Rule, TransparentRule


class ReshapeRule(TransparentRule):
    """view, flatten, squeeze, ...: a channel becomes one entry of a dimension, or a block of neighbouring entries."""

    def axis(self, node: fx.Node, x: Channels) -> int | None:
        before, after = sizes_of(argument(node, 0)), sizes_of(node)
        left, right = math.prod(before[: x.axis]), math.prod(before[x.axis + 1 :])
        for axis, size in enumerate(after):
            block = size // len(x)
            same = block * math.prod(after[axis + 1 :]) == right and math.prod(after[:axis]) == left
            if size == block * len(x) and size > 1 and same:
                return axis
        return None

    def forward(self, net: NetworkChannels, node: fx.Node) -> State:
        out = super().forward(net, node)
        if isinstance(out, Channels):
            if type(value_of(node).shape[out.axis]) is not int:
                return None
            block = sizes_of(node)[out.axis] // len(out)
            out = Channels.of(out.axis, out.values.repeat_interleave(block), out.ids.repeat_interleave(block))
        return out

    def backward(self, net: NetworkChannels, node: fx.Node) -> None:
        x, out = net.ends(node)
        x.read |= out.needed.view(len(x), -1).any(1)

    def hold(self, net: NetworkChannels, node: fx.Node, literal: bool) -> None:
        x, out = net.ends(node)
        if op_name(node) in ("view", "reshape", "_unsafe_view") and literal and argument(node, 1)[out.axis] != -1:
            net.classes.pin(x.ids)
        if node.target is torch.ops.aten.squeeze.default:
            net.classes.pin(x.ids[:2])  # it would drop a single channel

    def emit(self, builder: Builder, node: fx.Node) -> fx.Node:
        aten, name = torch.ops.aten, op_name(node)
        x = builder.compact(argument(node, 0))
        if name in ("view", "reshape", "_unsafe_view"):
            sizes = list(argument(node, 1))
            axis = builder.axis(node)
            sizes[axis] = -1 if sizes[axis] == -1 else builder.count(node)
            return builder.call_method(node, "reshape", (x, [builder.size(size) for size in sizes]))
        if node.target is aten.squeeze.default:  # squeeze() would also drop a single channel that is left
            ones = [dim for dim, size in enumerate(sizes_of(argument(node, 0))) if size == 1]
            return builder.call(node, aten.squeeze.dims, (x, ones))
        return builder.copy(node, compact=node.args[:1])


class ExpandRule(TransparentRule):
    """expand: the channels stay where they are, counted from the right."""

    def axis(self, node: fx.Node, x: Channels) -> int | None:
        axis = x.axis + len(sizes_of(node)) - len(sizes_of(argument(node, 0)))
        return axis if sizes_of(node)[axis] == len(x) else None

    def hold(self, net: NetworkChannels, node: fx.Node, literal: bool) -> None:
        x, out = net.ends(node)
        if literal and argument(node, 1)[out.axis] != -1:
            net.classes.pin(x.ids)

    def emit(self, builder: Builder, node: fx.Node) -> fx.Node:
        sizes = list(argument(node, 1))
        sizes[builder.axis(node)] = -1
        x = builder.compact(argument(node, 0))
        return builder.call_method(node, "expand", (x, [builder.size(size) for size in sizes]))


class PermuteRule(TransparentRule):
    def axis(self, node: fx.Node, x: Channels) -> int | None:
        order = list(range(len(sizes_of(argument(node, 0)))))
        if op_name(node) == "permute":
            order = [order[d] for d in argument(node, 1)]
        else:
            i, j = argument(node, 1), argument(node, 2)
            order[i], order[j] = order[j], order[i]
        return order.index(x.axis)


RESHAPES: dict[str, Rule] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "squeeze", "unsqueeze"), ReshapeRule()),
    "expand": ExpandRule(),
    **dict.fromkeys(("permute", "transpose"), PermuteRule()),
}
