"""A masked convolution of live tensors, lowered to the small convolution that its live filters and channels make."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..masks import make_table
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


class Lowered(NamedTuple):
    """The small convolution that a layer makes of an input with certain live channels."""

    out: LiveList  # the live channels of the result
    remap: ChannelRemap | None  # brings the input's channels to those of the small convolution; None: they are the same
    pick: tuple[Tensor, int, int] | None  # what pack_weight takes: table of the rows and columns to keep, their counts
    table: Tensor | None  # mask table of the small convolution; None: nothing is dead in it
    grad_table: Tensor | None  # the same for the gradient of its weight
    all_live: Tensor  # a table of its size with nothing dead, for plans that need a table
    groups: int


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
        kernels = kernels & (masks.inputs & live.mask())[None, :]
        rows = masks.filters if masks.has_bias or masks.dense_grad else kernels.any(1)
        return _lower_dense(masks, live, rows, kernels)
    if not masks.groups == K == C:
        return FullWidth("groups", LiveList.of(np.flatnonzero(masks.filters), K))
    rows = masks.filters if masks.dense_grad else kernels[:, 0] & masks.inputs
    return _lower_depthwise(masks, live, masks.filters if masks.has_bias else rows & live.mask(), kernels[:, 0])


def _lower_dense(masks: LayerMasks, live: LiveList, rows: np.ndarray, kernels: np.ndarray) -> Lowered | FullWidth:
    """groups = 1. rows: bool [K], filters to compute; kernels: bool [K, C], what is live of them."""
    K, C = kernels.shape
    out = LiveList.of(np.flatnonzero(rows), K)
    if not out.count or not live.count:
        return FullWidth("nothing is live", out)
    out, pick = out.widened(), None
    if not (out.full and live.full):
        pick = (_table(masks.device, out.mask(), None, live.mask(), K, C, 1), out.count, live.count)
    small, read = kernels[out.host][:, live.host], masks.inputs[live.host]
    return _lowered(masks, out, None, pick, rows[out.host], small, read, (out.count, live.count, 1))


def _lower_depthwise(masks: LayerMasks, live: LiveList, rows: np.ndarray, kernels: np.ndarray) -> Lowered | FullWidth:
    """Filter k reads channel k alone, so the input is brought to the live filters. rows, kernels: bool [K]."""
    K = len(rows)
    out = LiveList.of(np.flatnonzero(rows), K)
    if not out.count:
        return FullWidth("nothing is live", out)
    out = out.widened()
    remap, mask = None if live is out else live.remap(out, masks.device), out.mask()
    pick = None if out.full else (_table(masks.device, mask, None, mask, K, K, K), out.count, 1)
    small, read = kernels[out.host][:, None], masks.inputs[out.host]
    return _lowered(masks, out, remap, pick, rows[out.host], small, read, (out.count,) * 3)


def _lowered(
    masks: LayerMasks,
    out: LiveList,
    remap: ChannelRemap | None,
    pick: tuple[Tensor, int, int] | None,
    filters: np.ndarray,  # bool [K] of the small convolution
    kernels: np.ndarray,  # bool [K, C / groups] of it
    inputs: np.ndarray,  # bool [C] of it
    size: tuple[int, int, int],  # its K, C, groups
) -> Lowered:
    """Makes the tables of the small convolution."""
    device = masks.device
    nothing_dead = bool(filters.all()) and bool(inputs.all())
    table = None if nothing_dead and kernels.all() else _table(device, filters, kernels, inputs, *size)
    grad_table = table
    if masks.dense_grad:
        grad_table = None if nothing_dead else _table(device, filters, None, inputs, *size)
    return Lowered(out, remap, pick, table, grad_table, _table(device, None, None, None, *size), size[2])


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
