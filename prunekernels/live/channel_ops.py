"""Compact values brought from one list of live channels to another, or to full width."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import functional
from ..ops import autograd
from .channel_list import LiveList

ops = autograd.ops
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # what the operators take


def to_dense(compact: Tensor, live: LiveList, fill: float = 0.0) -> Tensor:
    """compact [N, live.count, ...] -> [N, live.channels, ...], `fill` in the dead channels."""
    if live.full:
        return compact
    if fill:
        return regroup(compact, live, LiveList.all(live.channels), fill)
    size = compact.shape
    if compact.dtype not in FLOATS:
        dense = compact.new_zeros(size[0], live.channels, *size[2:])
        return dense.index_copy_(1, live.rows(compact.device), compact)
    planes = compact if compact.dim() == 4 else compact.reshape(size[0], size[1], math.prod(size[2:]), 1)
    dense = functional.scatter_channels(planes, live.index(compact.device), live.channels)
    return dense if compact.dim() == 4 else dense.reshape(size[0], live.channels, *size[2:])


def regroup(compact: Tensor, live: LiveList, to: LiveList, fill: float = 0.0) -> Tensor:
    """[N, live.count, ...] -> [N, to.count, ...]: drops channels that `to` lacks and puts in `fill` for new ones."""
    if to is live:
        return compact
    if fill:
        holes, y = live.holes(to), regroup(compact, live, to)
        return y.index_fill_(1, holes.rows(y.device), fill) if holes.count else y
    if compact.dtype not in FLOATS:
        return to_dense(compact, live).index_select(1, to.rows(compact.device))
    remap = live.remap(to, compact.device)
    if compact.dim() == 4:
        return ops.regroup_channels(compact, *remap)
    size = compact.shape
    planes = compact.reshape(size[0], size[1], math.prod(size[2:]), 1)
    return ops.regroup_channels(planes, *remap).reshape(size[0], to.count, *size[2:])


def reorder(compact: Tensor, live: LiveList, split: tuple[int, ...], order: tuple[int, ...]) -> tuple[Tensor, LiveList]:
    """[N, live.count, ...] with its channels, seen as a tensor of shape `split`, permuted by `order`; their list."""
    to, places = live.reordered(split, order, compact.device)
    return compact.index_select(1, places), to
