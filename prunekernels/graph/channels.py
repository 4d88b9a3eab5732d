"""What is known about the channels of every value in a network: zero, another constant, or live; read or not."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from .trace import Traced, argument, sizes_of, value_of


@dataclass
class Channels:
    """The channels of one value, the result of one node."""

    axis: int  # the dimension of the value that counts channels
    values: Tensor  # float64 [C]: the constant that a channel holds everywhere; NaN: live, it depends on the input
    ids: Tensor  # int64 [C]: ids of the same class (see Classes) stay or go together
    read: Tensor  # bool [C]: an output of the network depends on the channel

    @classmethod
    def of(cls, axis: int, values: Tensor, ids: Tensor) -> Channels:
        return cls(axis, values, ids, torch.zeros_like(ids, dtype=torch.bool))

    @property
    def live(self) -> Tensor:
        return self.values.isnan()

    @property
    def needed(self) -> Tensor:
        """Live and read: the small network has to compute these."""
        return self.read & self.live

    def __len__(self) -> int:
        return self.ids.numel()


@dataclass
class Operand:
    """One side of an elementwise operator."""

    node: fx.Node
    channels: Channels
    whole: bool = False  # broadcast over the channels of the result: all of them read all of it


@dataclass
class Move:
    """Where a node that moves entries has its channels from."""

    source: fx.Node  # the node whose channels they are: its operand, or that of the first node of a shuffle
    axis: int
    index: Tensor  # int64 [size, n]: the channels that lie at each entry along the axis
    # Of a shuffle. In the module form the channels of each row go together, and views name the sizes of some axes.
    rectangle: Tensor | None = None  # int64 [C / g, g]
    named: Sequence[tuple[fx.Node, int]] = ()


class Classes:
    """Union-find over the channel ids of the whole network: channels that meet in an add are of one class."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._pinned: set[int] = set()

    def new(self, count: int) -> Tensor:
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return torch.arange(first, first + count)

    def _find(self, i: int) -> int:
        parent = self._parent
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def tie(self, a: Tensor, b: Tensor) -> None:
        for i, j in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True):
            i, j = self._find(i), self._find(j)
            if i != j:
                self._parent[max(i, j)] = min(i, j)

    def pin(self, ids: Tensor) -> None:
        """Keeps these channels whether they are read or not."""
        self._pinned.update(ids.flatten().tolist())

    @property
    def pinned(self) -> Tensor:
        return torch.tensor(sorted(self._pinned), dtype=torch.long)

    def roots(self) -> Tensor:
        """[all ids]: the class of each."""
        return torch.tensor([self._find(i) for i in range(len(self._parent))], dtype=torch.long)


class ConvGroups(NamedTuple):
    """The groups of a convolution: those of which something is kept read equally many channels, and have equally many
    filters."""

    inputs: Tensor  # ids [groups, C / groups]
    filters: Tensor  # ids [groups, K / groups]


def missing_in_groups(inputs: Any, filters: Any) -> tuple[Any, Any]:
    """What a grouped convolution has to keep beyond what is kept of its inputs and filters; bool [groups, any] each.

    Groups are evened: those of which something is kept get dead channels, up to as many as the largest of them has.
    """
    stays = inputs.any(1) | filters.any(1)
    return _up_to_largest(inputs, stays), _up_to_largest(filters, stays)


def _up_to_largest(kept: Any, stays: Any) -> Any:
    counts = kept.sum(1)
    missing = (max(int(counts.max()), 1) - counts) * stays
    return ~kept & ((~kept).cumsum(1) <= missing[:, None])


State = Channels | list[Channels | None] | None  # of a node with one result, with several, with untracked channels
MOVING: State = []  # of a node inside a shuffle: its channels are on several axes


class NetworkChannels:
    """What is known of the channels of every value in a traced network, and what rules write into it.

    tensors: parameters and buffers by name, as the rules are to see them; NaN = any value (see layer_uses.py).
    """

    def __init__(self, traced: Traced, tensors: Mapping[str, Tensor] | None = None) -> None:
        self.traced = traced
        self.tensors = traced.tensors if tensors is None else tensors
        self.statistics = self.even_groups = False
        self.own_rules: Mapping[fx.Node, Any] = {}  # of every operator that has one, whether it fits there or not
        self.classes = Classes()
        self.states: dict[fx.Node, State] = {}
        self.operands: dict[fx.Node, list[Operand]] = {}  # of elementwise operators
        self.moves: dict[fx.Node, Move] = {}
        self.moving: set[fx.Node] = set()  # nodes inside of shuffles
        self.weights: dict[fx.Node, tuple[Tensor, Tensor]] = {}  # of layers, what they read of them
        self.alike: list[Sequence[Tensor]] = []  # ids; of each in a list, equally many are to be kept
        self.groups: list[ConvGroups] = []
        # (module, attribute) -> ids that this number counts; of ids [groups, any] it counts the groups
        self.numbers: dict[tuple[str, str], Tensor] = {}
        self._untracked: dict[tuple[fx.Node, int], Channels] = {}
        # (parameter, dimension) -> ids of what it counts; [groups, C / groups] if filters of each group read others
        self.tied: dict[tuple[str, int], Tensor] = {}

    def tracked(self, node: object) -> Channels | None:
        """The channels of a value; None if they are not followed, and the value has full width."""
        state = self.states.get(node) if isinstance(node, fx.Node) else None
        return state if isinstance(state, Channels) else None

    def channels_of(self, node: object) -> Channels:
        """The channels of a value that is tracked."""
        x = self.tracked(node)
        assert x is not None
        return x

    def channels(self, node: Any, axis: int) -> Channels | None:
        """The channels of a value along axis: live and kept if they are not followed, None if they lie elsewhere."""
        state = self.tracked(node)
        if state is not None:
            return state if state.axis == axis else None
        if (node, axis) not in self._untracked:
            self._untracked[node, axis] = self.new(axis, sizes_of(node)[axis])
            self.classes.pin(self._untracked[node, axis].ids)
        return self._untracked[node, axis]

    def ends(self, node: fx.Node) -> tuple[Channels, Channels]:
        """The channels of a node's first argument and of its result."""
        return self.channels_of(argument(node, 0)), self.channels_of(node)

    def new(self, axis: int, count: int) -> Channels:
        """Live channels, each of a class of its own."""
        return Channels.of(axis, torch.full((count,), torch.nan, dtype=torch.float64), self.classes.new(count))

    def tensor(self, node: Any) -> Tensor | None:
        """The values of a parameter or buffer, float64 on the CPU."""
        return None if node is None else self.tensors[self.traced.names[node]].detach().cpu().double()

    def share(self, node: Any, dim: int, ids: Tensor) -> None:
        """Ties channels that index a dimension of a parameter to those of the other nodes that use it."""
        if node is not None:
            first = self.tied.setdefault((self.traced.names[node], dim), ids)
            if first is ids:
                return
            if first.shape == ids.shape:
                self.classes.tie(first, ids)
            else:  # in one place it is the weight of several groups
                self.classes.pin(first)
                self.classes.pin(ids)

    def parameter_state(self, node: fx.Node) -> Channels | None:
        """The channels of a parameter with one dimension of a size, such as [C] or [1, C, 1, 1]."""
        value = value_of(node)
        dims = [dim for dim, size in enumerate(() if value is None else sizes_of(node)) if size > 1]
        tensor = self.tensor(node) if len(dims) == 1 else None
        if tensor is None:
            return None
        x = self.new(dims[0], tensor.numel())
        self.share(node, dims[0], x.ids)
        return Channels.of(dims[0], tensor.flatten(), x.ids)

    def pin_parameter(self, node: fx.Node) -> None:
        """Keeps all rows and columns of a parameter, for an operator without a rule."""
        value = value_of(node)
        for dim in range(0 if value is None else value.dim()):
            ids = self.tied.setdefault((self.traced.names[node], dim), self.classes.new(sizes_of(node)[dim]))
            self.classes.pin(ids)

    def _forget_constants(self) -> None:
        """Leaves zero and live as all that a channel can be."""
        states = [part for state in self.states.values() for part in (state if isinstance(state, list) else [state])]
        operands = [operand.channels for operands in self.operands.values() for operand in operands]
        for channels in (*states, *operands):
            if channels is not None:
                channels.values = torch.where(channels.values == 0, 0.0, torch.nan)

    def count_by(self, where: tuple[str, str], ids: Tensor) -> None:
        """Says that a number in the forward counts these channels: it has to become the number that is kept of them."""
        self.alike.append([self.numbers.setdefault(where, ids), ids])

    def parameter_channels(self, kept: Kept) -> dict[str, dict[int, Tensor]]:
        """By name of a parameter or buffer, what is kept of each dimension that counts channels (see Kept.of_ids)."""
        indices: dict[str, dict[int, Tensor]] = {}
        for (name, dim), ids in self.tied.items():
            indices.setdefault(name, {})[dim] = kept.of_ids(ids)
        return indices

    def pin_constants(self, own: Collection[str]) -> None:
        """Keeps all channels of tensors that are no parameters or buffers of the network: literals in its forward."""
        for (name, _), ids in self.tied.items():
            if name not in own:
                self.classes.pin(ids)

    def kept(self) -> Kept:
        """Channels that a small network has: every class with a member that is needed or pinned, and what makes groups
        even."""
        roots = self.classes.roots()
        kept = torch.zeros(roots.numel(), dtype=torch.bool)
        kept[roots[self.classes.pinned]] = True
        for state in self.states.values():
            if isinstance(state, Channels):
                kept[roots[state.ids[state.needed]]] = True
        groups = [ConvGroups(roots[inputs], roots[filters]) for inputs, filters in self.groups]
        while True:
            found = [missing_in_groups(kept[inputs], kept[filters]) for inputs, filters in groups]
            pairs = zip(groups, found, strict=True)
            added = [ids[missing] for its, sides in pairs for ids, missing in zip(its, sides, strict=True)]
            if not any(ids.numel() for ids in added):
                return Kept(kept[roots])
            kept[torch.cat(added)] = True


class Kept:
    """The channels that a small network has."""

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask

    def of(self, channels: Channels) -> Tensor:
        """The channels that stay, sorted, [kept]."""
        return self.of_ids(channels.ids)

    def of_ids(self, ids: Tensor) -> Tensor:
        """The positions in ids of those that stay, sorted.

        Of ids [groups, any]: positions in the flattened ids, [groups that stay, those that stay of each].
        """
        kept = self._mask[ids]
        positions = torch.nonzero(kept.flatten()).flatten()
        return positions if ids.dim() == 1 else in_groups(positions, int(kept.any(1).sum()))


def in_groups(positions: Any, groups: int) -> Any:
    """[groups, equally many] of positions."""
    return positions.reshape(groups, len(positions) // max(groups, 1))


Index = Mapping[int, Tensor]  # by dimension of a tensor, what is kept (see Kept.of_ids)


def take(tensor: Tensor, index: Index) -> Tensor:
    """The part of a tensor that index keeps."""
    for dim, kept in sorted(index.items()):
        kept = kept.to(tensor.device)
        if kept.dim() == 1:
            tensor = tensor.index_select(dim, kept)
        elif kept.shape[1] < tensor.shape[dim]:  # the rows of each group have columns of their own
            rows = torch.arange(len(tensor), device=tensor.device)
            columns = (kept % tensor.shape[1]).repeat_interleave(len(tensor) // len(kept), 0)
            tensor = tensor[rows[:, None], columns]
    return tensor
