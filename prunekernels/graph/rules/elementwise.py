"""Rules of operators with several operands: their channels meet and stay or go together, or stand side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from ..build import Builder
from ..channels import Channels, NetworkChannels, Operand, State
from ..trace import apply, argument, op_name, sizes_of, value_of
from .base import Rule


class ElementwiseRule(Rule):
    """add, sub, mul, ...: a channel that one operand needs is kept in all of them, as zeros where it is dead."""

    def forward(self, net: NetworkChannels, node: fx.Node) -> State:
        sides = self.sides(net, node)
        if sides is None:
            return None
        from_right, count = sides
        operands = [o for n in node.all_input_nodes if (o := self._operand(net, n, from_right, count)) is not None]
        if len(operands) != len(node.all_input_nodes):
            return None
        members = [operand for operand in operands if not operand.whole]
        for operand in members[1:]:
            net.classes.tie(members[0].channels.ids, operand.channels.ids)
        axis = len(sizes_of(node)) - from_right
        net.operands[node] = operands
        live = torch.full((count,), torch.nan, dtype=torch.float64)
        known = {operand.node: live if operand.whole else operand.channels.values for operand in operands}
        return Channels.of(axis, self.values(node, known), members[0].channels.ids)

    def sides(self, net: NetworkChannels, node: fx.Node) -> tuple[int, int] | None:
        """The dimension of the channels, counted from the right, and their number; None: the operands do not agree."""
        tracked = [n for n in node.all_input_nodes if net.tracked(n) is not None]
        wide = [n for n in tracked if len(net.channels_of(n)) > 1] or tracked
        if not wide:
            return None
        largest = max(wide, key=lambda n: math.prod(sizes_of(n)))  # another may be broadcast over its channels
        x = net.channels_of(largest)
        from_right = len(sizes_of(largest)) - x.axis
        fits = len(sizes_of(node)) >= from_right and sizes_of(node)[-from_right] == len(x)
        return (from_right, len(x)) if fits else None

    def _operand(self, net: NetworkChannels, node: fx.Node, from_right: int, count: int) -> Operand | None:
        if value_of(node) is None:
            return None
        sizes = sizes_of(node)
        if len(sizes) < from_right or (sizes[-from_right] == 1 and count > 1):
            x = net.tracked(node)
            if x is not None:
                net.classes.pin(x.ids)
            if net.traced.is_parameter(node):
                net.pin_parameter(node)
            return Operand(node, x or net.new(0, 1), whole=True)
        if net.traced.is_parameter(node):
            dim, x = len(sizes) - from_right, net.new(0, count)
            net.share(node, dim, x.ids)
            tensor = net.tensor(node)
            if tensor is not None and tensor.numel() == count:
                x.values = tensor.flatten()
            return Operand(node, x)
        dim, x = len(sizes) - from_right, net.tracked(node)
        if x is None:  # it has all channels, of which the graph form takes those that are kept
            return Operand(node, net.new(dim, count))
        return Operand(node, x) if x.axis == dim else None

    def values(self, node: fx.Node, known: Mapping[fx.Node, Tensor]) -> Tensor:
        """The constants of the result, from those of each operand; all float64 [C], NaN = live."""
        if op_name(node) == "expand_as":
            return known[argument(node, 0)]
        args = [known[arg] if isinstance(arg, fx.Node) else arg for arg in node.args]
        values = apply(node, *args, **node.kwargs).double().expand(len(next(iter(known.values()))))
        if op_name(node) == "mul":
            for side in known.values():
                values = torch.where(side == 0, 0.0, values)
        return values

    def backward(self, net: NetworkChannels, node: fx.Node) -> None:
        out = net.tracked(node)
        assert out is not None
        for operand in net.operands[node]:
            operand.channels.read |= out.needed.any() if operand.whole else out.needed

    def operands(self, builder: Builder, node: fx.Node) -> list[fx.Node]:
        alone = self._alone(builder, node)
        return node.all_input_nodes if alone is None else [alone]

    def hold(self, net: NetworkChannels, node: fx.Node, literal: int) -> None:
        for operand in net.operands[node]:
            if net.tracked(operand.node) is None and not net.traced.is_parameter(operand.node) and not operand.whole:
                net.classes.pin(operand.channels.ids)

    def _alone(self, builder: Builder, node: fx.Node) -> fx.Node | None:
        """The operand that equals the result because all kept channels of the other one are zero."""
        if (
            op_name(node) not in ("add", "sub")
            or len(node.all_input_nodes) != 2
            or argument(node, 0) is argument(node, 1)
        ):
            return None
        first, second = (o for n in node.args for o in builder.net.operands[node] if o.node is n)
        for one, other in ((first, second), (second, first)):
            if other is first and (op_name(node) == "sub" or node.kwargs):
                continue
            is_like_result = _shape_and_dtype(one.node) == _shape_and_dtype(node)
            is_followed = builder.net.tracked(one.node) is not None and not builder.traced.is_parameter(one.node)
            if is_like_result and is_followed and not other.whole:
                if bool((other.channels.values[builder.kept.of(other.channels)] == 0).all()):
                    return one.node
        return None

    def emit(self, builder: Builder, node: fx.Node) -> fx.Node:
        alone = self._alone(builder, node)
        if alone is not None:
            return builder.compact(alone)
        args: dict[fx.Node, fx.Node] = {}
        for operand in builder.net.operands[node]:
            if operand.whole:
                args[operand.node] = builder.full(operand.node)
            elif builder.traced.is_parameter(operand.node):
                dim = len(sizes_of(operand.node)) - (len(sizes_of(node)) - builder.axis(node))
                args[operand.node] = builder.parameter(operand.node, {dim: builder.kept.of(operand.channels)})
            elif builder.net.tracked(operand.node) is None and len(kept := builder.kept.of(operand.channels)) < len(
                operand.channels
            ):
                args[operand.node] = builder.part(operand.node, operand.channels.axis, kept)
            else:
                args[operand.node] = builder.compact(operand.node)
        return builder.copy(node, args=args)


def _shape_and_dtype(node: fx.Node) -> tuple[tuple[int, ...], torch.dtype]:
    value = value_of(node)
    assert value is not None
    return sizes_of(node), value.dtype


class CatRule(Rule):
    """cat: along the channels they stand side by side; along another dimension they meet as in an add."""

    @staticmethod
    def parts(node: fx.Node) -> list[fx.Node]:
        return list(argument(node, 0))

    @staticmethod
    def dim(node: fx.Node) -> int:
        return int(argument(node, 1, 0)) % len(sizes_of(node))

    def axis(self, node: fx.Node, axis: int) -> int:
        """The dimension of the result that is one of the parts."""
        return axis

    def axis_of_parts(self, node: fx.Node, axis: int) -> int:
        """The dimension of the parts that is one of the result."""
        return axis

    def forward(self, net: NetworkChannels, node: fx.Node) -> State:
        axes = {self.axis(node, x.axis) for n in self.parts(node) if (x := net.tracked(n)) is not None}
        if len(axes) != 1:
            return None
        axis = axes.pop()
        parts = [net.channels(n, self.axis_of_parts(node, axis)) for n in self.parts(node)]
        known = [part for part in parts if part is not None]
        if self.dim(node) == axis:
            return Channels.of(axis, torch.cat([p.values for p in known]), torch.cat([p.ids for p in known]))
        values = known[0].values
        for part in known[1:]:
            net.classes.tie(known[0].ids, part.ids)
            values = torch.where(values == part.values, values, torch.nan)
        return Channels.of(axis, values, known[0].ids)

    def backward(self, net: NetworkChannels, node: fx.Node) -> None:
        out = net.tracked(node)
        assert out is not None
        parts = [net.channels(n, self.axis_of_parts(node, out.axis)) for n in self.parts(node)]
        sizes = [len(part) for part in parts if part is not None]
        along = self.dim(node) == out.axis
        for part, needed in zip(parts, out.needed.split(sizes) if along else [out.needed] * len(parts), strict=True):
            assert part is not None
            part.read |= needed

    def hold(self, net: NetworkChannels, node: fx.Node, literal: int) -> None:
        pass

    def operands(self, builder: Builder, node: fx.Node) -> list[fx.Node]:
        if self.dim(node) != builder.axis(node):
            return self.parts(node)
        return [n for n in self.parts(node) if builder.count(n) > 0] or self.parts(node)[:1]

    def emit(self, builder: Builder, node: fx.Node) -> fx.Node:
        parts = [builder.compact(n) for n in self.operands(builder, node)]
        return builder.call(node, node.target, (parts, self.dim(node)))


class StackRule(CatRule):
    """stack: the parts meet, along a new dimension."""

    def axis(self, node: fx.Node, axis: int) -> int:
        return axis + (self.dim(node) <= axis)

    def axis_of_parts(self, node: fx.Node, axis: int) -> int:
        return axis - (self.dim(node) < axis)


ELEMENTWISE: dict[str, Rule] = {
    **dict.fromkeys(("add", "sub", "mul", "div", "maximum", "minimum", "expand_as"), ElementwiseRule()),
    "cat": CatRule(),
    "stack": StackRule(),
}
