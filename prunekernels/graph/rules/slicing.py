"""Rules of operators that take some of the channels, add channels, or make a value of new ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from ..build import Builder
from ..channels import Channels, NetworkChannels, State
from ..trace import argument, op_name, sizes_of, value_of
from .base import Rule, SizeRule, sizes_among

SHARES = 4  # of a width, at most, that slices may cut


class SplitRule(Rule):
    """chunk, split: several results, which getitem nodes pick."""

    def forward(self, net: NetworkChannels, node: fx.Node) -> State:
        x = net.tracked(argument(node, 0))
        if x is None:
            return None
        if not self.along(node, x):
            return [Channels.of(x.axis, x.values, x.ids) for _ in node.meta["val"]]
        sizes = [int(part.shape[x.axis]) for part in node.meta["val"]]
        return [Channels.of(x.axis, v, i) for v, i in zip(x.values.split(sizes), x.ids.split(sizes), strict=True)]

    def backward(self, net: NetworkChannels, node: fx.Node) -> None:
        x, parts = net.tracked(argument(node, 0)), net.states[node]
        assert x is not None and isinstance(parts, list)
        needed = [part.needed for part in parts if part is not None]
        if self.along(node, x):
            x.read |= torch.cat(needed)
        else:
            x.read |= torch.stack(needed).any(0)

    def hold(self, net: NetworkChannels, node: fx.Node, literal: int) -> None:
        x = net.tracked(argument(node, 0))
        assert x is not None
        if self.along(node, x):
            sizes = [int(part.shape[x.axis]) for part in node.meta["val"]]
            if len(set(sizes)) > 1 or (literal and op_name(node) != "chunk"):
                net.classes.pin(x.ids)
            else:
                parts = x.ids.split(sizes)
                net.alike.append(parts)
                where = None if op_name(node) == "chunk" else net.traced.attribute_of(node, sizes[0])
                if where is not None:
                    net.count_by(where, parts[0])

    @staticmethod
    def along(node: fx.Node, x: Channels) -> bool:
        return argument(node, 2, 0) % len(sizes_of(argument(node, 0))) == x.axis

    def emit(self, builder: Builder, node: fx.Node) -> fx.Node:
        x = builder.net.tracked(argument(node, 0))
        parts = builder.net.states[node]
        assert x is not None and isinstance(parts, list)
        if not self.along(node, x):
            return builder.copy(node, compact=node.args[:1])
        sizes = [builder.kept.of(part).numel() for part in parts if part is not None]
        given = builder.compact(argument(node, 0))
        return builder.call(node, torch.ops.aten.split_with_sizes.default, (given, sizes, x.axis))


class UnbindRule(SplitRule):
    """unbind: the entries of another dimension than the channels, each a result of its own."""

    def forward(self, net: NetworkChannels, node: fx.Node) -> State:
        x, dim = net.tracked(argument(node, 0)), argument(node, 1, 0) % len(sizes_of(argument(node, 0)))
        if x is None or dim == x.axis:
            return None
        return [Channels.of(x.axis - (dim < x.axis), x.values, x.ids) for _ in node.meta["val"]]

    @staticmethod
    def along(node: fx.Node, x: Channels) -> bool:
        return False


class ItemRule(Rule):
    def forward(self, net: NetworkChannels, node: fx.Node) -> State:
        parts, i = net.states.get(argument(node, 0)), argument(node, 1)
        return parts[i] if isinstance(parts, list) and isinstance(i, int) else None

    def backward(self, net: NetworkChannels, node: fx.Node) -> None:
        if net.states[node] is None:
            super().backward(net, node)

    def hold(self, net: NetworkChannels, node: fx.Node, literal: int) -> None:
        pass

    def emit(self, builder: Builder, node: fx.Node) -> fx.Node:
        return builder.copy(node, compact=node.args[:1])


class SliceRule(Rule):
    """slice: along the channels it takes some of them; along another dimension all channels stay."""

    @staticmethod
    def arguments(node: fx.Node) -> tuple[int, Any, Any, Any]:
        dim, start, end, step = (argument(node, i, default) for i, default in enumerate((0, None, None, 1), 1))
        return dim % len(sizes_of(argument(node, 0))), start, end, step

    def positions(self, node: fx.Node, x: Channels) -> Tensor:
        dim, start, end, step = self.arguments(node)
        every = torch.arange(len(x))
        return every[start:end:step] if dim == x.axis else every

    def forward(self, net: NetworkChannels, node: fx.Node) -> State:
        x = net.tracked(argument(node, 0))
        sizes = sizes_among(node)
        if x is None or len(node.all_input_nodes) != 1 + len(sizes) or (sizes and self.arguments(node)[0] == x.axis):
            return None
        at = self.positions(node, x)
        return Channels.of(x.axis, x.values[at], x.ids[at])

    def backward(self, net: NetworkChannels, node: fx.Node) -> None:
        x, out = net.ends(node)
        x.read[self.positions(node, x)] |= out.needed

    def hold(self, net: NetworkChannels, node: fx.Node, literal: int) -> None:
        x = net.ends(node)[0]
        at = self.positions(node, x)
        if len(at) == len(x) or self.arguments(node)[0] != x.axis:
            return
        # With bounds at shares of the width, such as x[:, : width // 2], the shares have to stay alike.
        share = math.gcd(int(at[0]), int(at[-1]) + 1, len(x)) if len(at) else 1
        if literal or len(x) // share > SHARES or len(at) != int(at[-1]) - int(at[0]) + 1:
            net.classes.pin(x.ids)
        else:
            net.alike.append(x.ids.split(share))

    def emit(self, builder: Builder, node: fx.Node) -> fx.Node:
        x, out = builder.net.ends(node)
        if self.arguments(node)[0] != x.axis:
            return builder.copy(node, compact=node.args[:1])
        kept = self.positions(node, x)[builder.kept.of(out)]
        return builder.select(
            node, builder.compact(argument(node, 0)), x.axis, torch.searchsorted(builder.kept.of(x), kept)
        )


class PadRule(Rule):
    """pad: new channels hold the padding value; padded planes stay constant if they hold the same value."""

    @staticmethod
    def arguments(node: fx.Node) -> tuple[list[Any], float, bool]:
        """Amounts (from the last dimension on), value, and whether the padding is that value (not a reflection)."""
        pad: Any = argument(node, 1)
        if op_name(node) == "constant_pad_nd":
            return pad, float(argument(node, 2, 0)), True
        mode = argument(node, 2, "constant")
        value = argument(node, 3)
        return pad, float(value or 0), mode == "constant"

    def around(self, node: fx.Node, x: Channels) -> tuple[int, int]:
        """The numbers of channels that are added before and behind."""
        pad, at = self.arguments(node)[0], 2 * (len(sizes_of(argument(node, 0))) - 1 - x.axis)
        return (pad[at], pad[at + 1]) if at < len(pad) else (0, 0)

    def forward(self, net: NetworkChannels, node: fx.Node) -> State:
        x = net.tracked(argument(node, 0))
        if x is None or len(node.all_input_nodes) != 1 + len(sizes_among(node)):
            return None
        _, value, constant = self.arguments(node)
        before, behind = self.around(node, x)
        if isinstance(before, fx.Node) or isinstance(behind, fx.Node):
            return None
        if min(before, behind) < 0 or ((before or behind) and not constant):
            return None
        filled = torch.full((before + behind,), value, dtype=torch.float64)
        added = net.classes.new(before + behind)
        values = torch.cat([filled[:before], self.values(node, x, x.values), filled[before:]])
        return Channels.of(x.axis, values, torch.cat([added[:before], x.ids, added[before:]]))

    def values(self, node: fx.Node, x: Channels, values: Tensor) -> Tensor:
        """The constants of the channels that were there, padded in other dimensions; float64 [C], NaN = live."""
        pad, value, constant = self.arguments(node)
        at = 2 * (len(sizes_of(argument(node, 0))) - 1 - x.axis)
        others = [amount for i, amount in enumerate(pad) if i not in (at, at + 1)]
        elsewhere = any(isinstance(amount, fx.Node) or amount > 0 for amount in others)
        return torch.where(values == value, values, torch.nan) if elsewhere and constant else values

    def backward(self, net: NetworkChannels, node: fx.Node) -> None:
        x, out = net.ends(node)
        before = self.around(node, x)[0]
        x.read |= out.needed[before : before + len(x)]

    def hold(self, net: NetworkChannels, node: fx.Node, literal: int) -> None:
        x, out = net.ends(node)
        before, _ = self.around(node, x)
        for ids in (out.ids[:before], out.ids[before + len(x) :]):
            where = None if literal else net.traced.attribute_of(node, ids.numel())
            if where is not None:
                net.count_by(where, ids)
            elif ids.numel():
                net.classes.pin(ids)

    def emit(self, builder: Builder, node: fx.Node) -> fx.Node:
        x, out = builder.net.ends(node)
        pad, (before, _) = list(self.arguments(node)[0]), self.around(node, x)
        kept, at = builder.kept.of(out), 2 * (len(sizes_of(argument(node, 0))) - 1 - x.axis)
        if at < len(pad):
            pad[at], pad[at + 1] = int((kept < before).sum()), int((kept >= before + len(x)).sum())
        args = (builder.compact(argument(node, 0)), [builder.size(amount) for amount in pad], *node.args[2:])
        return builder.call(node, node.target, args, node.kwargs)


class CreateRule(SizeRule):
    """zeros, ones, ...: a new value of a given size."""

    def __init__(self, value: float, sizes_at: int) -> None:
        self.value, self.sizes_at = value, sizes_at

    needs_state = True

    def forward(self, net: NetworkChannels, node: fx.Node) -> State:
        if value_of(node) is None or len(sizes_of(node)) < 2:
            return None
        out = net.new(1, sizes_of(node)[1])
        out.values[:] = self.value
        return out

    def hold(self, net: NetworkChannels, node: fx.Node, literal: int) -> None:
        out = net.tracked(node)
        if literal and out is not None:
            net.classes.pin(out.ids)

    def emit(self, builder: Builder, node: fx.Node) -> fx.Node:
        sizes = [builder.size(size) for size in argument(node, self.sizes_at)]
        sizes[1] = builder.count(node)
        args: list[Any] = [builder.compact(arg) if isinstance(arg, fx.Node) else arg for arg in node.args]
        args[self.sizes_at] = sizes
        if op_name(node).startswith("new_"):
            return builder.call_method(node, op_name(node), tuple(args), node.kwargs)
        return builder.call(node, getattr(torch, op_name(node)), tuple(args), node.kwargs)


SLICING: dict[str, Rule] = {
    **dict.fromkeys(("chunk", "split", "split_with_sizes"), SplitRule()),
    "unbind": UnbindRule(),
    "getitem": ItemRule(),
    "slice": SliceRule(),
    **dict.fromkeys(("pad", "constant_pad_nd"), PadRule()),
    "zeros": CreateRule(0, 0),
    "ones": CreateRule(1, 0),
    "new_zeros": CreateRule(0, 1),
    "new_ones": CreateRule(1, 1),
}
