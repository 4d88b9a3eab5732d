"""A masked convolution of live tensors, lowered to the small convolution that its live filters and channels make."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..masks import make_table
from ..ops import mask_table
from ..transposed import exchanged_table
from .channel_list import ChannelRemap, LiveList


class LayerMasks(NamedTuple):
    """The masks of a layer on the host, and what else decides how it is lowered."""

    filters: np.ndarray  # bool [K]: live filters, hard-dead ones already dropped
    hard: np.ndarray  # bool [K]: False = dead for good
    kernels: np.ndarray  # bool [K, C / groups]
    inputs: np.ndarray  # bool [C]
    groups: int
    has_bias: bool
    dense_grad: bool  # weight_grad="dense": dead weights get a gradient, unless hard-dead
    device: torch.device  # where the tables go
    align: int = 1  # the number of live filters is padded to a multiple of it, except between groups


class Evened(NamedTuple):
    """Groups brought to as many filters and channels as the largest has: the others get zeros for what they lack."""

    weight: ChannelRemap  # of the kernels, weight seen as [1, K * C / groups, R, S]
    filters: ChannelRemap  # of bias and grad_scale, seen as [1, K, 1, 1]
    result: ChannelRemap | None  # leaves the zeros out of the result; None: there are none


class Padding(NamedTuple):
    """Which parts of a small convolution are not padding: weights and biases get zeros there, and no gradient."""

    kernels: Tensor  # bool [K, C / groups, 1, 1]
    filters: Tensor  # bool [K]


class Lowered(NamedTuple):
    """The small convolution that a layer makes of an input with certain live channels."""

    out: LiveList  # the live channels of the result
    remap: ChannelRemap | None  # brings the input's channels to those of the small convolution; None: they are the same
    pick: tuple[Tensor, int, int] | None  # what pack_weight takes: table of the rows and columns to keep, their counts
    table: Tensor | None  # mask table of the small convolution; None: nothing is dead in it
    grad_table: Tensor | None  # the same for the gradient of its weight
    all_live: Tensor  # a table of its size with nothing dead, for plans that need a table
    filters: int  # K, C and groups of the small convolution
    channels: int
    groups: int
    evened: Evened | None = None
    padding: Padding | None = None  # None: no list is padded


class SmallTransposed(NamedTuple):
    """The small transposed convolution of a layer in one group; of its tables, filters and channels are exchanged."""

    out: LiveList  # the live channels of the result
    pick: tuple[Tensor, int, int] | None  # what pack_weight takes; None: the whole weight
    filters: Tensor | None  # bool [out.count]: those that have a bias; None: all
    table: Tensor | None  # mask table of the small convolution; None: nothing is dead in it
    grad_table: Tensor | None  # that of the gradient of its weight, if it is another one
    padding: Padding | None  # as Lowered has it


class FullWidth(NamedTuple):
    """A layer that must compute at full width (masked mode), and why."""

    reason: str
    out: LiveList  # the channels of the result that may be nonzero


def lower(masks: LayerMasks, live: LiveList) -> Lowered | FullWidth:
    """What a layer with these masks does with an input whose channels `live` are not zero."""
    K, C = len(masks.filters), len(masks.inputs)
    kernels = masks.kernels & masks.filters[:, None]
    if masks.dense_grad and bool((masks.hard & ~masks.filters).any()):
        return FullWidth('weight_grad="dense" trains dead filters', LiveList.all(K))
    if masks.groups == 1:
        kernels = kernels & (masks.inputs & live.unpadded.mask())[None, :]
        rows = masks.filters if masks.has_bias or masks.dense_grad else kernels.any(1)
        return _lower_dense(masks, live, rows, kernels)
    if not masks.groups == K == C:
        kernels = kernels & (masks.inputs & live.unpadded.mask()).reshape(masks.groups, -1).repeat(K // masks.groups, 0)
        rows = masks.filters if masks.has_bias or masks.dense_grad else kernels.any(1)
        return _lower_groups(masks, live, rows, kernels)
    rows = masks.filters if masks.dense_grad else kernels[:, 0] & masks.inputs
    return _lower_depthwise(
        masks, live, masks.filters if masks.has_bias else rows & live.unpadded.mask(), kernels[:, 0]
    )


def lower_transposed(masks: LayerMasks, live: LiveList, lowered: Lowered) -> SmallTransposed:
    """What a transposed convolution in one group does, given what a convolution with its masks would do."""
    out, device, pick = lowered.out, masks.device, None
    if not (out.full and live.full):
        table = _table(device, live.mask(), None, out.mask(), live.channels, out.channels, 1)
        pick = (table, live.count, out.count)
    if lowered.table is None:
        return SmallTransposed(out, pick, None, None, None, lowered.padding)
    sizes = (out.count, live.count, 1)
    grad_table, filters = None, mask_table.live_filters(lowered.table, out.count)
    if masks.dense_grad:
        grad_table = exchanged_table(lowered.all_live if lowered.grad_table is None else lowered.grad_table, *sizes)
    table = exchanged_table(lowered.table, *sizes)
    return SmallTransposed(out, pick, filters, table, grad_table, lowered.padding)


def _lower_dense(masks: LayerMasks, live: LiveList, rows: np.ndarray, kernels: np.ndarray) -> Lowered | FullWidth:
    """groups = 1. rows: bool [K], filters to compute; kernels: bool [K, C], what is live of them."""
    K, C = kernels.shape
    out = LiveList.of(np.flatnonzero(rows), K)
    if not out.count or not live.count:
        return FullWidth("nothing is live", out)
    out, pick = out.widened(masks.align), None
    if not (out.full and live.full):
        pick = (_table(masks.device, out.mask(), None, live.mask(), K, C, 1), out.count, live.count)
    small, read = kernels[out.host][:, live.host], masks.inputs[live.host]
    return _lowered(masks, out, None, pick, rows[out.host], small, read, (out.count, live.count, 1), (out, live))


def _lower_depthwise(masks: LayerMasks, live: LiveList, rows: np.ndarray, kernels: np.ndarray) -> Lowered | FullWidth:
    """Filter k reads channel k alone, so the input is brought to the live filters. rows, kernels: bool [K]."""
    K = len(rows)
    out = LiveList.of(np.flatnonzero(rows), K)
    if not out.count:
        return FullWidth("nothing is live", out)
    out = out.widened(masks.align)
    remap, mask = None if live is out else live.remap(out, masks.device), out.mask()
    pick = None if out.full else (_table(masks.device, mask, None, mask, K, K, K), out.count, 1)
    small, read = kernels[out.host][:, None], masks.inputs[out.host]
    return _lowered(masks, out, remap, pick, rows[out.host], small, read, (out.count,) * 3, (out, LiveList.all(1)))


def _lower_groups(masks: LayerMasks, live: LiveList, rows: np.ndarray, kernels: np.ndarray) -> Lowered | FullWidth:
    """Groups of any size, those without filters left out. rows: bool [K]; kernels: bool [K, C / groups]."""
    (K, Cg), G = kernels.shape, masks.groups
    out = LiveList.of(np.flatnonzero(rows), K)
    read = (masks.inputs & live.unpadded.mask()).reshape(G, Cg)
    if not masks.dense_grad:
        read = read & kernels.reshape(G, -1, Cg).any(1)
    if not out.count or not read.any():
        return FullWidth("nothing is live", out)
    out = out.widened()
    if live.full and LiveList.of(np.flatnonzero(read), G * Cg).almost_full:
        read = np.ones_like(read)
    computed = out.mask().reshape(G, -1)
    groups = np.flatnonzero(computed.any(1))
    if not read[groups].any():
        return FullWidth("nothing is live", out)
    outs, ins = _evened(computed, groups), _evened(read, groups)
    size = (outs.size, ins.size, len(groups))
    row, column = outs.reshape(-1, 1), ins.repeat(outs.shape[1], 0)  # of each kernel of the small convolution
    at = np.where((row >= 0) & (column >= 0), row * Cg + column % Cg, -1)
    outs, ins = outs.reshape(-1), ins.reshape(-1)
    remap = _remap(_places(live, ins), live.count, masks.device)
    # What a group lacks is dead in the tables: kernels that skip single filters and channels then skip it.
    filters, inputs = (outs >= 0) & rows[outs], (ins >= 0) & masks.inputs[ins]
    lowered = _lowered(masks, out, remap, None, filters, (at >= 0) & kernels.reshape(-1)[at], inputs, size)
    if out.full and read.all():
        return lowered
    weight, per_filter = _to_places(at.reshape(-1), K * Cg, masks.device), _to_places(outs, K, masks.device)
    result = _remap(np.flatnonzero(outs >= 0), outs.size, masks.device)
    return lowered._replace(evened=Evened(weight, per_filter, result))


def _evened(members: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """int64 [groups, most]: the members of each of these groups, then -1 up to as many as the largest of them has.

    members: bool [G, any].
    """
    members = members[groups]
    most = members.sum(1).max()
    order = np.argsort(~members, axis=1, kind="stable")[:, :most]
    return np.where(np.take_along_axis(members, order, 1), order + groups[:, None] * members.shape[1], -1)


def _places(live: LiveList, channels: np.ndarray) -> np.ndarray:
    """The place of each channel among the live ones, -1 where it is none."""
    places = np.full(live.channels + 1, -1)  # the last is that of channel -1
    places[live.host] = np.arange(live.count)
    return places[channels]


def _remap(index: np.ndarray, count: int, device: torch.device) -> ChannelRemap | None:
    """Takes channels `index` out of `count`, zeros for -1; None where it takes all of them in order."""
    return None if np.array_equal(index, np.arange(count)) else _to_places(index, count, device)


def _to_places(index: np.ndarray, count: int, device: torch.device) -> ChannelRemap:
    inverse = np.full(count, -1, np.int32)
    inverse[index[index >= 0]] = np.flatnonzero(index >= 0)
    return ChannelRemap(*(torch.from_numpy(each.astype(np.int32)).to(device) for each in (index, inverse)))


def _lowered(
    masks: LayerMasks,
    out: LiveList,
    remap: ChannelRemap | None,
    pick: tuple[Tensor, int, int] | None,
    filters: np.ndarray,  # bool [K] of the small convolution
    kernels: np.ndarray,  # bool [K, C / groups] of it
    inputs: np.ndarray,  # bool [C] of it
    size: tuple[int, int, int],  # its K, C, groups
    sides: tuple[LiveList, LiveList] | None = None,  # of its filters and of the channels that one filter reads
) -> Lowered:
    """Makes the tables of the small convolution. What lists are padded with counts as live: its weights are zeros."""
    device, padding = masks.device, None
    if sides is not None and any(side.is_padded for side in sides):
        of_filters, of_channels = (side.unpadded.mask()[side.host] for side in sides)
        of_kernels = of_filters[:, None] & of_channels
        filters, kernels = filters | ~of_filters, kernels | ~of_kernels
        inputs = inputs | ~(of_channels if size[2] == 1 else of_filters)
        padding = Padding(*(torch.from_numpy(each).to(device) for each in (of_kernels[:, :, None, None], of_filters)))
    nothing_dead = bool(filters.all()) and bool(inputs.all())
    table = None if nothing_dead and kernels.all() else _table(device, filters, kernels, inputs, *size)
    grad_table = table
    if masks.dense_grad:
        grad_table = None if nothing_dead else _table(device, filters, None, inputs, *size)
    all_live = _table(device, None, None, None, *size)
    return Lowered(out, remap, pick, table, grad_table, all_live, *size, padding=padding)


def _table(
    device: torch.device,
    filters: np.ndarray | None,
    kernels: np.ndarray | None,
    inputs: np.ndarray | None,
    K: int,
    C: int,
    groups: int,
) -> Tensor:
    """make_table() of masks on the host, brought to a device."""

    def tensor(mask: np.ndarray | None) -> Tensor | None:
        return None if mask is None else torch.from_numpy(np.ascontiguousarray(mask))

    return make_table(tensor(filters), tensor(kernels), tensor(inputs), K, C, groups).to(device)
