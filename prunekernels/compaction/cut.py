"""Cut: what a small network has of every parameter and statistic under one set of masks, and the tensors it trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..graph.narrow import Narrowing
from ..nn.masked_filters import MaskedFilters
from ..nn.masked_norm import MaskedNorm
from ..nn.norm_channels import NormChannels
from ..ops import mask_table
from ..ops.parts import gather_parts

Bools = np.ndarray
Indices = np.ndarray  # int64
NORM = ("weight", "bias", "running_mean", "running_var")
Vectors = dict[tuple[int, int], "Part | None"]
Rows = Tensor | None  # int64 on the CPU, -1: a frozen zero; None: all, in order
Columns = Tensor | None  # the same, or [groups, any]: the rows are in as many equal groups, each with its own columns


@dataclass(eq=False)
class Block:
    """A part of a tensor: its rows and columns.

    merged: how many of the leading dimensions count as one together with the next; the columns are what follows.
    holes: bool [rows, columns] of the part, dead kernels: zeros that do not go back.
    """

    whole: Tensor
    part: Tensor
    rows: Rows
    columns: Columns
    merged: int = 0
    holes: Tensor | None = None

    @classmethod
    def of(
        cls,
        whole: Tensor,
        rows: Rows,
        columns: Columns,
        kind: type[Tensor] = Tensor,
        *,
        merged: int = 0,
        holes: Tensor | None = None,
    ) -> Block:
        shape = list(whole.shape)
        for dim, index in ((0, rows), (merged + 1, columns)):
            if index is not None:
                shape[dim] = index.shape[-1]
        nhwc = whole.dim() == 4 and whole.is_contiguous(memory_format=torch.channels_last) and not whole.is_contiguous()
        layout = torch.channels_last if nhwc else torch.contiguous_format
        part = torch.empty(shape, dtype=whole.dtype, device=whole.device, memory_format=layout)
        part = nn.Parameter(part, whole.requires_grad) if kind is nn.Parameter else part
        return cls(whole, part, rows, columns, merged, holes)

    def of_state(self, whole: Tensor) -> Block:
        """The same part of another tensor of the same shape, as an optimizer's state is."""
        return Block.of(whole, self.rows, self.columns, merged=self.merged, holes=self.holes)

    def with_rows(self, tensor: Tensor) -> Tensor:
        """A tensor like whole or part, with rows and columns as its first dimensions."""
        return tensor.detach().flatten(0, self.merged) if self.merged else tensor

    def punch(self) -> None:
        """Writes zeros into the holes of what was gathered."""
        if self.holes is not None:
            self.part.detach()[self.holes.to(self.part.device)] = 0

    def filled(self) -> Tensor:
        """The part as it goes back: with what the whole has in the holes."""
        part = self.part.detach()
        if self.holes is None:
            return part
        filled = torch.empty_like(part)
        gather_parts([filled], [self.whole.detach()], [self.rows], [self.columns])
        trained = ~self.holes.to(part.device)
        filled[trained] = part[trained]
        return filled


@dataclass(eq=False)
class Part:
    """What the small network has of a parameter or statistic, and what else of it an optimizer moves."""

    name: str
    block: Block
    live: Tensor | None  # bool, expands to the part: its entries that are no frozen zeros; None: all of them
    carried: list[Block] = field(default_factory=list)  # zero gradients, moved by momentum and weight decay

    def freeze(self) -> None:
        """Zeroes gradients of frozen zeros, also if the parameter is to be trained only later."""
        part, live = self.block.part, self.live
        if live is not None:
            trains, dead = part.requires_grad, ~live.to(part.device)
            part.requires_grad_().register_hook(lambda g: g.masked_fill(dead, 0))
            part.requires_grad_(trains)


@dataclass
class Sides:
    """Which entries of a tensor masks leave live: by row, by column, by kernel. None: all."""

    rows: Bools | None = None
    columns: Bools | None = None  # [C], or [groups, C / groups] of a grouped convolution
    kernels: Bools | None = None
    hard: Bools | None = None  # rows that hard masks leave live; under freeze="hard" no others stand still
    hard_columns: Bools | None = None  # the same of columns


def masked_sides(layer: nn.Module) -> dict[str, Sides]:
    """By attribute of a masked layer, what its masks leave live."""
    if isinstance(layer, MaskedNorm):
        live = _read(layer, "channel_mask")
        names = NORM if layer._each_alone else NORM[:2]
        return {} if layer._all_live else dict.fromkeys(names, Sides(live, hard=live))
    if not isinstance(layer, MaskedFilters) or layer._all_live:
        return {}
    hard = _read(layer, "hard_mask")
    rows, hard_rows = _unless_full(_read(layer, "filter_mask") & hard), _unless_full(hard)
    weight = Sides(rows, hard=hard_rows)
    if layer.groups == 1:
        weight.columns = _unless_full(_read(layer, "input_mask"))
    elif layer.groups < layer.in_channels:
        weight.columns = _unless_full(_read(layer, "input_mask").reshape(layer.groups, -1))
    kernels = None
    if has_holes(layer):
        sizes = (layer.out_channels, layer.in_channels, layer.in_channels // layer.groups)
        kernels = mask_table.live_kernels(layer._mask_table, *sizes).cpu()
        weight.kernels = kernels.numpy()
    if isinstance(layer, nn.ConvTranspose2d):  # filters are the second dimension, those of its group
        weight = Sides(weight.columns, rows, hard_columns=hard_rows) if layer.groups == 1 else Sides()
        if kernels is not None:
            weight.kernels = mask_table.exchanged(kernels, layer.groups).numpy()
    return {"weight": weight, "bias": Sides(rows, hard=hard_rows)}


def _read(layer: Any, name: str) -> Bools:
    return layer._masks[name].cpu().numpy()


def has_holes(layer: Any) -> bool:
    """Whether a layer has dead kernels beside those of dead rows and columns of its weight."""
    if layer.groups > 1 and isinstance(layer, nn.ConvTranspose2d):
        return not layer._all_live
    if layer.groups == layer.in_channels > 1:
        return not (_read(layer, "kernel_mask").all() and _read(layer, "input_mask").all())
    filters = _read(layer, "filter_mask") & _read(layer, "hard_mask")
    rows, columns = (mask.reshape(layer.groups, -1).sum(1) for mask in (filters, _read(layer, "input_mask")))
    return layer._live[2] != int((rows * columns).sum())


def _unless_full(mask: Bools) -> Bools | None:
    return None if mask.all() else mask


class Cut:
    """The small tensors of one set of masks.

    parts: by id of a parameter or statistic of the model, what the small network has of it.
    narrowed: their names, with whether they have fewer rows, and fewer columns.
    """

    def __init__(
        self,
        narrowing: Narrowing,
        tensors: Mapping[str, Tensor],
        layers: Iterable[nn.Module],
        freezes: Mapping[int, str],
    ) -> None:
        """tensors: by name, those of the plain layers; layers: masked ones; freezes: by id of a parameter that an
        optimizer moves, "dead" or "hard"."""
        self.numbers = narrowing.numbers
        self.parts: dict[int, Part] = {}
        self.by_name: dict[str, Part] = {}
        self.states: dict[tuple[int, str], Block] = {}
        self._norms: dict[str, NormChannels] = {}
        sides: dict[int, Sides] = {}
        for layer in layers:
            for attribute, its in masked_sides(layer).items():
                tensor = getattr(layer, attribute)
                if tensor is not None:
                    sides.setdefault(id(tensor), its)
        indices: dict[int, dict[int, Tensor]] = {}
        for name, tensor in tensors.items():
            indices.setdefault(id(tensor), {}).update(narrowing.indices.get(name, {}))
        every = Sides()
        vectors: Vectors = {}
        for name, tensor in tensors.items():
            if id(tensor) not in self.parts:
                its = sides.get(id(tensor), every)
                part = _part(name, tensor, indices[id(tensor)], its, vectors)
                if part is None:
                    continue
                freeze = freezes.get(id(tensor))
                if freeze is not None and isinstance(tensor, nn.Parameter):
                    part.carried = list(_carried(part, its, freeze))
                if isinstance(tensor, nn.Parameter):
                    part.freeze()
                self.parts[id(tensor)] = part
            self.by_name[name] = self.parts[id(tensor)]
        blocks = [(name, part.block) for name, part in self.by_name.items()]
        self.narrowed = {(name, block.rows is not None, block.columns is not None) for name, block in blocks}

    def rows(self, name: str) -> Rows:
        """Which rows of a layer's weight the small network has."""
        part = self.by_name.get(f"{name}.weight" if name else "weight")
        return None if part is None else part.block.rows

    def norm_channels(self, name: str, norm: Any) -> NormChannels:
        """What the small network's form of a norm over several channels normalizes; norm: that of the model."""
        if name not in self._norms:
            count = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.normalized_shape[0]
            rows = self.rows(name)
            host = np.arange(count) if rows is None else rows.numpy()
            self._norms[name] = NormChannels.of_rows(host, getattr(norm, "num_groups", 1), count)
        return self._norms[name]

    def small(self) -> dict[int, Tensor]:
        return {identity: part.block.part for identity, part in self.parts.items()}

    def state_of(self, block: Block, key: str, whole: Tensor) -> Block:
        """The part of an optimizer's state that belongs to a block; the same tensor whenever this cut is entered."""
        known = self.states.get((id(block), key))
        if known is None or known.part.dtype != whole.dtype or known.part.device != whole.device:
            known = block.of_state(whole)
        known.whole = whole
        self.states[id(block), key] = known
        return known


def _part(name: str, tensor: Tensor, index: Mapping[int, Tensor], sides: Sides, vectors: Vectors) -> Part | None:
    """None: the small network has the tensor as it is. vectors: what was found for tensors of one dimension."""
    if tensor.dim() != 1:
        return _new_part(name, tensor, index, sides)
    key = (id(index.get(0)), id(sides))  # a norm's weight, bias and statistics are alike
    if key not in vectors:
        vectors[key] = _new_part(name, tensor, index, sides)
        return vectors[key]
    known = vectors[key]
    if known is None:
        return None
    kind = nn.Parameter if isinstance(tensor, nn.Parameter) else Tensor
    return Part(name, Block.of(tensor, known.block.rows, None, kind), known.live)


def _new_part(name: str, tensor: Tensor, index: Mapping[int, Tensor], sides: Sides) -> Part | None:
    kept = {dim: rows.numpy() for dim, rows in index.items() if rows.dim() > 1 or rows.numel() < tensor.shape[dim]}
    if not kept and sides.rows is None and sides.columns is None and sides.kernels is None:
        return None
    merged = max([0, *(dim - 1 for dim in kept)])
    if merged and (len(kept) > 1 or not tensor.is_contiguous()):
        raise ValueError(
            f"compacted: {name}: expected channels in the first two dimensions of a tensor, or in one of a contiguous "
            f"one, got them in {sorted(kept)} of {list(tensor.shape)}"
        )
    rows = _with_zeros(kept.get(0), sides.rows)
    columns = _with_zeros(kept.get(merged + 1), sides.columns)
    if columns is not None and columns.ndim == 2:
        columns = _of_each_group(columns, tensor.shape[merged + 1])
    holes = _holes(sides, rows, columns)
    if rows is None and columns is None and holes is None:
        return None
    kind = nn.Parameter if isinstance(tensor, nn.Parameter) else Tensor
    block = Block.of(tensor, _tensor(rows), _tensor(columns), kind, merged=merged, holes=_tensor(holes))
    return Part(name, block, _live(block.part, rows, columns, holes))


def _tensor(array: Any) -> Any:
    return None if array is None else torch.from_numpy(array)


def _with_zeros(kept: Indices | None, live: Bools | None) -> Indices | None:
    """The indices that are kept, -1 where they are dead."""
    if live is None:
        return kept
    rows = np.arange(live.size).reshape(live.shape) if kept is None else kept
    return np.where(live.reshape(-1)[rows], rows, -1)


def _of_each_group(columns: Indices, channels: int) -> Indices | None:
    """Counted in each group alone, instead of over all; None: each group has all of its channels.

    columns: [groups, any].
    """
    own = np.where(columns < 0, -1, columns % channels)
    return None if own.shape[1] == channels and own.min(initial=0) >= 0 else own


def _by_row(columns: Indices, rows: int) -> Indices:
    """[rows, columns] or [1, columns]: those of each row."""
    return columns[None] if columns.ndim == 1 else columns.repeat(rows // max(len(columns), 1), 0)


def _holes(sides: Sides, rows: Indices | None, columns: Indices | None) -> Bools | None:
    """Bool [rows, columns]: the dead kernels; those that are dead as a whole row or column are no holes."""
    if sides.kernels is None:
        return None
    dead = ~(sides.kernels if rows is None else sides.kernels[rows])  # -1 reads the last one, which does not count
    if rows is not None:
        dead[rows < 0] = False
    if columns is not None:
        its = _by_row(columns, len(dead))
        dead = np.take_along_axis(dead, np.broadcast_to(its, (len(dead), its.shape[1])), 1) & (its >= 0)
    return dead if dead.any() else None


def _live(part: Tensor, rows: Indices | None, columns: Indices | None, holes: Bools | None) -> Tensor | None:
    """Bool, expands to the part: what is no frozen zero; None: all of it."""
    live: Any = None
    dims = part.dim()
    if rows is not None and rows.min(initial=0) < 0:
        live = (rows >= 0).reshape(-1, *(1,) * (dims - 1))
    if columns is not None and columns.min(initial=0) < 0:
        own = _by_row(columns, len(part)) >= 0
        its = own.reshape(*own.shape, *(1,) * (dims - 2))
        live = its if live is None else live & its
    if holes is not None:
        its = ~holes.reshape(*holes.shape, *(1,) * (dims - 2))
        live = its if live is None else live & its
    return _tensor(live)


def _carried(part: Part, sides: Sides, freeze: str) -> Iterator[Block]:
    """Blocks of the entries that are no part of the small network, but that an optimizer moves."""
    block = part.block
    whole, live_rows, live_columns = block.whole, sides.rows, sides.columns
    if freeze == "hard":
        live_rows, live_columns = sides.hard, sides.hard_columns

    def carry(rows: Indices | None, columns: Indices | None) -> Block:
        holes = None if freeze == "hard" else _holes(sides, rows, columns)
        index = (_tensor(rows), _tensor(columns))
        return Block.of(whole, *index, nn.Parameter, merged=block.merged, holes=_tensor(holes))

    outside = _beyond(block.rows, live_rows, whole.shape[0])
    if outside is not None:
        if live_columns is not None and live_columns.ndim == 2:
            yield carry(*_rows_of_groups(outside, whole.shape[0], live_columns))
        else:
            yield carry(outside, None if live_columns is None else live_columns.nonzero()[0])
    if block.columns is None:
        return
    if block.columns.dim() == 2:
        rows = None if block.rows is None else block.rows.numpy()
        beside = _beside_in_groups(rows, block.columns.numpy(), whole.shape, live_columns)
        if beside.any():
            yield carry(rows, _evened(beside))
        return
    rest = _beyond(block.columns, live_columns, whole.shape[block.merged + 1])
    if rest is not None:
        yield carry(None if block.rows is None else _indices(block.rows), rest)


def _rows_of_groups(rows: Indices, count: int, live: Bools) -> tuple[Indices, Indices]:
    """Rows among count, those of each group equally many (-1: none), and their live columns. live: [groups, any]."""
    chosen = np.zeros(count, dtype=bool)
    chosen[rows] = True
    by_group: Bools = chosen.reshape(len(live), -1)
    groups = np.flatnonzero(by_group.any(1))
    own = _evened(by_group[groups])
    return np.where(own < 0, -1, own + groups[:, None] * by_group.shape[1]).reshape(-1), _evened(live[groups])


def _beside_in_groups(rows: Indices | None, columns: Indices, shape: torch.Size, live: Bools | None) -> Bools:
    """Bool [groups, C / groups]: which columns of each group are live but not kept.

    rows, columns: as in a Block. shape: of the whole. live: bool, for all groups of the whole.
    """
    last = np.arange(len(columns)) if rows is None else rows.reshape(len(columns), -1).max(1)  # -1: no row is live
    rest = np.ones((len(columns), shape[1] + 1), dtype=bool)  # one more, for columns that are -1
    if live is not None:
        rest[:, :-1] = live if rows is None else live[last * len(live) // shape[0]]
    np.put_along_axis(rest, columns, False, 1)
    return rest[:, :-1] & (last >= 0)[:, None]


def _evened(members: Bools) -> Indices:
    """int64 [groups, most]: the members of each group, then -1 up to as many as the largest of them has.

    members: bool [groups, any].
    """
    most = members.sum(1).max(initial=0)
    order = np.argsort(~members, axis=1, kind="stable")[:, :most]
    return np.where(np.take_along_axis(members, order, 1), order, -1)


def _beyond(kept: Rows, live: Bools | None, count: int) -> Indices | None:
    """Indices among count that are live but not kept; None: there are none."""
    if kept is None:
        return None
    inside = _indices(kept)
    if inside.size == (count if live is None else np.count_nonzero(live)):  # what is kept and no zero is live
        return None
    rest = np.ones(count, dtype=bool) if live is None else live.copy()
    rest[inside] = False
    return rest.nonzero()[0] if rest.any() else None


def _indices(rows: Tensor) -> Indices:
    """Those that are not -1."""
    array = rows.numpy()
    return array[array >= 0]
