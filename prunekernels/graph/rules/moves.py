"""Rules of operators that move entries: permutations, views, shuffles of channels and pixels."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ..build import Builder
from ..channels import MOVING, Channels, Move, NetworkChannels, State
from ..layout import Layout, axes_of, channels_along, layout_of, regroup
from ..trace import apply, argument, fixed_size, op_name, sizes_of, value_of
from .base import Rule, TransparentRule, sizes_among
from .elementwise import CatRule, ElementwiseRule
from .pointwise import ReduceRule, SoftmaxRule
from .slicing import ItemRule, SplitRule

SIZED = {"view": 1, "reshape": 1, "_unsafe_view": 1}  # the argument with the sizes


class MoveRule(Rule):
    """Every entry of the result is one of the operand. The channels end up on one axis, in one of three ways:

    - each entry along an axis belongs to one channel: it has those channels, some several times;
    - several channels share an entry, because a view splits them: they stay or go together;
    - they are split only to be put together again in another order, by operators behind this one: a shuffle.
    """

    takes_parameters = True

    def layout(self, node: fx.Node, x: Layout) -> Layout | None:
        """The layout of the result."""
        return regroup(x, sizes_of(node), _free(node))

    def sizes(self, node: fx.Node) -> tuple[list[Any], int]:
        """The sizes among the arguments, and the dimension of the result that the first one is of."""
        return (list(argument(node, SIZED[op_name(node)])), 0) if op_name(node) in SIZED else ([], 0)

    def forward(self, net: NetworkChannels, node: fx.Node) -> State:
        move = net.moves.get(node)
        if move is None:
            source = argument(node, 0)
            x = net.tracked(source)
            if x is None or len(node.all_input_nodes) != 1 + len(sizes_among(node)):
                return None
            layout = self.layout(node, layout_of(sizes_of(source), x.axis, _free(source)))
            axes = [] if layout is None else axes_of(layout)
            if layout is None or not axes or not _are_fixed(node, axes):
                return None
            if len(axes) > 1 and self._put_together(net, node, layout, x):
                return MOVING
            axis = self._choose(net, node, layout, x)
            if axis is None:
                return None
            move = net.moves[node] = Move(source, axis, channels_along(layout, axis))
        x = net.channels_of(move.source)
        first, *others = move.index.T
        values = x.values[first]
        for other in others:
            net.classes.tie(x.ids[first], x.ids[other])
            values = torch.where(values == x.values[other], values, torch.nan)
        return Channels.of(move.axis, values, x.ids[first])

    def axes(self, node: fx.Node, layout: Layout) -> list[int]:
        """The dimensions of the result that may become smaller."""
        return axes_of(layout)

    def _choose(self, net: NetworkChannels, node: fx.Node, layout: Layout, x: Channels) -> int | None:
        """The axis: that of the most channels, of which nothing behind the node makes one value."""
        axes = self.axes(node, layout)
        if len(axes) == 1:
            return axes[0]
        if not _is_joined(net, node, layout, set()):
            return None
        reduced = {dim for user in node.users for dim in _reduced(net, user)}
        axes = [axis for axis in axes if axis not in reduced]
        return _widest(layout, x, axes) if axes else None

    def _put_together(self, net: NetworkChannels, node: fx.Node, layout: Layout, x: Channels) -> bool:
        """Whether the nodes behind this one end a shuffle that it begins; notes what each of them does as a whole."""
        found = _ends_of_shuffle(net, node, layout, _Shuffle(argument(node, 0), x))
        if not found:
            return False
        widest = _widest(layout, x, axes_of(layout))
        rectangle = channels_along(layout, widest)
        for end, (axis, index, on_the_way) in found.items():
            net.moves[end] = Move(argument(node, 0), axis, index, rectangle, [(node, widest), *on_the_way])
            net.moving.update(view for view, _ in on_the_way if view is not end)
        return True

    def backward(self, net: NetworkChannels, node: fx.Node) -> None:
        move, out = net.moves[node], net.channels_of(node)
        net.channels_of(move.source).read[move.index[out.needed].flatten()] = True

    def hold(self, net: NetworkChannels, node: fx.Node, literal: int) -> None:
        move, ids = net.moves[node], net.channels_of(net.moves[node].source).ids
        if move.rectangle is not None:
            for other in move.rectangle.T[1:]:
                net.classes.tie(ids[move.rectangle[:, 0]], ids[other])
        for view, dim in move.named or [(node, move.axis)]:
            rule = net.own_rules[view]
            sizes, first = rule.sizes(view) if isinstance(rule, MoveRule) else ([], 0)
            if literal > 1 and first <= dim < first + len(sizes) and sizes[dim - first] != -1:
                net.classes.pin(ids)
        if node.target is torch.ops.aten.squeeze.default:
            net.classes.pin(ids[:2])  # it would drop a single channel

    def operands(self, builder: Builder, node: fx.Node) -> list[fx.Node]:
        return [builder.net.moves[node].source, *sizes_among(node)]

    def emit(self, builder: Builder, node: fx.Node) -> fx.Node:
        move = builder.net.moves[node]
        if move.rectangle is not None:
            return self._emit_shuffle(builder, node, move)
        if node.target is torch.ops.aten.squeeze.default:  # squeeze() would also drop a single channel that is left
            ones = [dim for dim, size in enumerate(sizes_of(move.source)) if size == 1]
            return builder.call(node, torch.ops.aten.squeeze.dims, (builder.compact(move.source), ones))
        sizes, first = self.sizes(node)
        if not first <= move.axis < first + len(sizes):
            return builder.copy(node, compact=[move.source])
        return self._emit_sized(builder, node, builder.compact(move.source), sizes, first)

    def _emit_sized(self, builder: Builder, node: fx.Node, x: fx.Node, sizes: list[Any], first: int) -> fx.Node:
        at = builder.axis(node) - first
        sizes[at] = -1 if sizes[at] == -1 else builder.count(node)
        return builder.call_method(node, "reshape", (x, [builder.size(size) for size in sizes]))

    def _emit_shuffle(self, builder: Builder, node: fx.Node, move: Move) -> fx.Node:
        x, out = builder.net.channels_of(move.source), builder.net.channels_of(node)
        order = torch.searchsorted(builder.kept.of(x), move.index[builder.kept.of(out), 0])
        small = builder.gather_channels(node, builder.compact(move.source), x.axis, order)
        if sizes_of(node) == sizes_of(move.source):
            return small
        return self._emit_sized(builder, node, small, *self.sizes(node))


class UnflattenRule(MoveRule):
    def sizes(self, node: fx.Node) -> tuple[list[Any], int]:
        return list(argument(node, 2)), argument(node, 1) % len(sizes_of(argument(node, 0)))

    def _emit_sized(self, builder: Builder, node: fx.Node, x: fx.Node, sizes: list[Any], first: int) -> fx.Node:
        at = builder.axis(node) - first
        sizes[at] = -1 if sizes[at] == -1 else builder.count(node)
        return builder.call(node, node.target, (x, argument(node, 1), [builder.size(size) for size in sizes]))


class PermuteRule(MoveRule):
    def layout(self, node: fx.Node, x: Layout) -> Layout | None:
        marks = torch.empty(tuple(range(2, 2 + len(x))), device="meta")
        return [x[size - 2] for size in apply(node, marks, *node.args[1:]).shape]


class PixelShuffleRule(MoveRule):
    """[.., C * r * r, H, W] becomes [.., C, H * r, W * r]."""

    def layout(self, node: fx.Node, x: Layout) -> Layout | None:
        *before, _, high, wide = sizes_of(argument(node, 0))
        r = argument(node, 1)
        parts = regroup(x, [*before, sizes_of(node)[-3], r, r, high, wide])
        if parts is None:
            return None
        *outer, c, down, right, rows, columns = parts
        return [*outer, c, [*rows, *down], [*columns, *right]]

    def axes(self, node: fx.Node, layout: Layout) -> list[int]:
        return [len(layout) - 3]


class PixelUnshuffleRule(MoveRule):
    """[.., C, H * r, W * r] becomes [.., C * r * r, H, W]."""

    def layout(self, node: fx.Node, x: Layout) -> Layout | None:
        *before, c, _, _ = sizes_of(argument(node, 0))
        *_, high, wide = sizes_of(node)
        r = argument(node, 1)
        parts = regroup(x, [*before, c, high, r, wide, r])
        if parts is None:
            return None
        *outer, channels, rows, down, columns, right = parts
        return [*outer, [*channels, *down, *right], rows, columns]


class ChannelShuffleRule(MoveRule):
    """[N, g * C, ..] as [N, g, C, ..], transposed and put together again."""

    def forward(self, net: NetworkChannels, node: fx.Node) -> State:
        x, groups = net.tracked(argument(node, 0)), argument(node, 1)
        if x is None or x.axis != 1:
            return None
        parts = torch.arange(len(x)).view(groups, -1)
        net.moves[node] = Move(argument(node, 0), 1, parts.T.reshape(-1, 1), parts.T)
        return super().forward(net, node)


class ExpandRule(TransparentRule):
    """expand: the channels stay where they are, counted from the right."""

    def axis(self, node: fx.Node, x: Channels) -> int | None:
        axis = x.axis + len(sizes_of(node)) - len(sizes_of(argument(node, 0)))
        return axis if sizes_of(node)[axis] == len(x) else None

    def hold(self, net: NetworkChannels, node: fx.Node, literal: int) -> None:
        x, out = net.ends(node)
        if literal > 1 and argument(node, 1)[out.axis] != -1:
            net.classes.pin(x.ids)

    def emit(self, builder: Builder, node: fx.Node) -> fx.Node:
        sizes = list(argument(node, 1))
        sizes[builder.axis(node)] = -1
        x = builder.compact(argument(node, 0))
        return builder.call_method(node, "expand", (x, [builder.size(size) for size in sizes]))


def _widest(layout: Layout, x: Channels, axes: list[int]) -> int:
    """The axis along which the most channels lie, the last of several."""
    return max(axes, key=lambda axis: (x.ids[channels_along(layout, axis)[:, 0]].unique().numel(), axis))


def _free(node: fx.Node) -> list[bool]:
    """Which dimensions may be any size greater than 1."""
    sizes = zip(value_of(node).shape, sizes_of(node), strict=True)
    return [fixed_size(size) is None and hint > 1 for size, hint in sizes]


def _are_fixed(node: fx.Node, axes: list[int]) -> bool:
    return all(type(value_of(node).shape[axis]) is int for axis in axes)


def _reduced(net: NetworkChannels, node: fx.Node) -> list[int]:
    """The dimensions that a node adds up or norms."""
    rule = net.own_rules.get(node)
    return rule.dims(node) if isinstance(rule, (ReduceRule, SoftmaxRule)) else []


def _is_joined(net: NetworkChannels, node: fx.Node, layout: Layout | None, seen: set[fx.Node]) -> bool:
    """Whether channels that lie on several axes can be followed to where these are one again, or are added up.

    If not, something needs them all, and they are better left apart. layout: None where it is not known.
    """
    for user in set(node.users) - seen:
        seen.add(user)
        rule, after = net.own_rules.get(user), None
        if rule is None or type(rule) is Rule:
            return False
        if isinstance(rule, MoveRule):
            after = None if layout is None else rule.layout(user, layout)
            if layout is not None and after is None:
                return False
            fewer = len(sizes_of(user)) < len(sizes_of(argument(user, 0)))
            if fewer if after is None else len(axes_of(after)) == 1:
                continue
        elif isinstance(rule, ReduceRule) or not isinstance(rule, PASSING):
            continue
        elif _same_sizes(user, node):
            after = layout
        if not _is_joined(net, user, after, seen):
            return False
    return True


def _same_sizes(a: fx.Node, b: fx.Node) -> bool:
    return value_of(a) is not None and value_of(b) is not None and sizes_of(a) == sizes_of(b)


PASSING = (TransparentRule, SplitRule, ItemRule, ElementwiseRule, CatRule)


class _Shuffle(NamedTuple):
    source: fx.Node
    x: Channels

    def ends_at(self, rule: MoveRule, node: fx.Node, layout: Layout) -> bool:
        """Whether a node has the channels in the source's place, on one axis, and all else as it was."""
        axis, sizes = axes_of(layout)[0], sizes_of(self.source)
        others = [factor.stride for factors in layout for factor in factors if not factor.step and factor.size > 1]
        in_place = math.prod(sizes_of(node)[:axis]) == math.prod(sizes[: self.x.axis])
        named, first = rule.sizes(node)
        can_be_written = sizes_of(node) == sizes or first <= axis < first + len(named)
        return (
            in_place
            and can_be_written
            and others == sorted(others, reverse=True)
            and all(factor.step for factor in layout[axis])
        )


Ends = dict[fx.Node, tuple[int, Tensor, list[tuple[fx.Node, int]]]]


def _ends_of_shuffle(net: NetworkChannels, node: fx.Node, layout: Layout, shuffle: _Shuffle) -> Ends:
    """Where all that is made of a split value has its channels on one axis again.

    Returns:
        Of each such node: the axis, the channels along it, [C, 1], and the nodes on the way, each with the axis of
        the most channels. Nothing if the split value has another use.
    """
    ends: Ends = {}
    for user in node.users:
        rule = net.own_rules.get(user)
        is_copy = rule is not None and op_name(user) in ("contiguous", "clone")
        after = rule.layout(user, layout) if isinstance(rule, MoveRule) else layout if is_copy else None
        axes = [] if after is None else axes_of(after)
        if after is None or not axes or not _are_fixed(user, axes):
            return {}
        if isinstance(rule, MoveRule) and len(axes) == 1:
            if not shuffle.ends_at(rule, user, after):
                return {}
            ends[user] = axes[0], channels_along(after, axes[0]), [(user, axes[0])]
            continue
        further = _ends_of_shuffle(net, user, after, shuffle)
        if not further:
            return {}
        for end, (axis, index, on_the_way) in further.items():
            ends[end] = axis, index, [(user, _widest(after, shuffle.x, axes)), *on_the_way]
    return ends


VIEWS = "view reshape _unsafe_view flatten squeeze unsqueeze"
PERMUTATIONS = "permute transpose t mT numpy_T movedim moveaxis swapaxes swapdims"
MOVES: dict[str, Rule] = {
    **dict.fromkeys(VIEWS.split(), MoveRule()),
    **dict.fromkeys(PERMUTATIONS.split(), PermuteRule()),
    "expand": ExpandRule(),
    "unflatten": UnflattenRule(),
    "pixel_shuffle": PixelShuffleRule(),
    "pixel_unshuffle": PixelUnshuffleRule(),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), ChannelShuffleRule()),
}
