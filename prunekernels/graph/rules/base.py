"""Rules: how one ATen operator carries channels, who reads them, and how a small network computes it.

An operator without a rule takes and gives full width: everything that enters it is read, all that leaves it is live.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..build import Builder
from ..channels import Channels, NetworkChannels, State
from ..trace import argument


class Rule:
    """The rule of operators that have none."""

    needs_state = True

    def forward(self, net: NetworkChannels, node: fx.Node) -> State:
        """Channels of the result; None: not to be followed."""
        return None

    def backward(self, net: NetworkChannels, node: fx.Node) -> None:
        """Marks what the node reads of its arguments."""
        for read in node.all_input_nodes:
            state = net.tracked(read)
            if state is not None:
                state.read[:] = True
            if net.traced.is_parameter(read):
                net.pin_parameter(read)

    def operands(self, builder: Builder, node: fx.Node) -> list[fx.Node]:
        """Arguments that the small network has to compute."""
        return node.all_input_nodes

    def emit(self, builder: Builder, node: fx.Node) -> fx.Node:
        return builder.copy(node)


UNKNOWN = Rule()


class SizeRule(Rule):
    """The size of a dimension, and arithmetic on sizes: reads no channel."""

    needs_state = False

    def backward(self, net: NetworkChannels, node: fx.Node) -> None:
        pass

    def emit(self, builder: Builder, node: fx.Node) -> fx.Node:
        if node.target is torch.ops.aten.sym_size.int:
            return builder.call_method(node, "size", (builder.compact(argument(node, 0)), argument(node, 1)))
        return builder.copy(node)


SIZE = SizeRule()


class TransparentRule(Rule):
    """One operand, every channel for itself. A subclass says where the axis goes and what becomes of a constant."""

    def axis(self, node: fx.Node, x: Channels) -> int | None:
        return x.axis

    def values(self, node: fx.Node, values: Tensor) -> Tensor:
        return values

    def forward(self, net: NetworkChannels, node: fx.Node) -> State:
        x = net.tracked(argument(node, 0))
        axis = None if x is None else self.axis(node, x)
        if x is None or axis is None or len(node.all_input_nodes) != 1 + len(sizes_among(node)):
            return None
        return Channels.of(axis, self.values(node, x.values), x.ids)

    def backward(self, net: NetworkChannels, node: fx.Node) -> None:
        x, out = net.ends(node)
        x.read |= out.needed

    def emit(self, builder: Builder, node: fx.Node) -> fx.Node:
        return builder.copy(node, compact=node.args[:1])


def sizes_among(node: fx.Node) -> list[fx.Node]:
    """Arguments that are symbolic sizes."""
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.SymInt)]
