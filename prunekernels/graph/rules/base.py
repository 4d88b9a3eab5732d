"""What a rule is: how an ATen operator carries channels on, which of them it reads, how a small network computes it.

An operator without a rule works at full width: it reads everything that enters, and everything that leaves it is live.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..build import Builder
from ..channels import Channels, NetworkChannels, State
from ..trace import argument


class Rule:
    """The rule of operators that have none, and the base of the others."""

    needs_state = True  # if forward() gives None, the operator counts as one without a rule
    takes_parameters = False  # the channels of a parameter are followed through it

    def forward(self, net: NetworkChannels, node: fx.Node) -> State:
        """Channels of the result; None: they are not followed."""
        return None

    def backward(self, net: NetworkChannels, node: fx.Node) -> None:
        """Marks the channels of the arguments that the node reads."""
        for read in node.all_input_nodes:
            state = net.tracked(read)
            if state is not None:
                state.read[:] = True
            if net.traced.is_parameter(read):
                net.pin_parameter(read)

    def hold(self, net: NetworkChannels, node: fx.Node, literal: int) -> None:
        """Pins what the node needs if it runs in the user's own forward, on the channels that are kept.

        literal: which numbers are constants, rather than computed from the sizes of operands. 0: none; 1: those that
            count the channels of parts (split, slice, pad); 2: the sizes of views as well.
        """
        for read in node.all_input_nodes:
            state = net.tracked(read)
            if state is not None:
                net.classes.pin(state.ids)

    def operands(self, builder: Builder, node: fx.Node) -> list[fx.Node]:
        """Arguments that the small network has to compute."""
        return node.all_input_nodes

    def emit(self, builder: Builder, node: fx.Node) -> fx.Node:
        """Adds the operator to the small network; the new node."""
        return builder.copy(node)


UNKNOWN = Rule()


class SizeRule(Rule):
    """The size of a dimension, and arithmetic on sizes: reads no channel."""

    needs_state = False

    def backward(self, net: NetworkChannels, node: fx.Node) -> None:
        pass

    def hold(self, net: NetworkChannels, node: fx.Node, literal: int) -> None:
        pass

    def emit(self, builder: Builder, node: fx.Node) -> fx.Node:
        if node.target is torch.ops.aten.sym_size.int:
            return builder.call_method(node, "size", (builder.compact(argument(node, 0)), argument(node, 1)))
        return builder.copy(node)


SIZE = SizeRule()


class InsideRule(Rule):
    """A node inside of a shuffle: the node that ends the shuffle does it all."""

    def backward(self, net: NetworkChannels, node: fx.Node) -> None:
        pass

    def hold(self, net: NetworkChannels, node: fx.Node, literal: int) -> None:
        pass


INSIDE = InsideRule()


class TransparentRule(Rule):
    """One operand; each channel of the result is made of one channel of it. Subclasses give the axis and constants."""

    takes_parameters = True

    def axis(self, node: fx.Node, x: Channels) -> int | None:
        """The dimension of the channels in the result; None: they are not followed."""
        return x.axis

    def values(self, node: fx.Node, values: Tensor) -> Tensor:
        """The constants of the result, from those of the operand; both float64 [C], NaN = live."""
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

    def hold(self, net: NetworkChannels, node: fx.Node, literal: int) -> None:
        pass

    def emit(self, builder: Builder, node: fx.Node) -> fx.Node:
        return builder.copy(node, compact=node.args[:1])


def sizes_among(node: fx.Node) -> list[fx.Node]:
    """The arguments of a node that are symbolic sizes."""
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.SymInt)]
