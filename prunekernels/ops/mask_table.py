"""The mask table (csrc/core/mask_table.h) in Python: its size, views of its parts on any device, and its making."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MAGIC = 0x314D4B50
DEAD, CONSTANT = -1, -2  # slots: of a dead filter or channel; of a live filter without live kernels (a constant)
HEADER_WORDS = 16
LIVE_FILTERS, LIVE_INPUTS, LIVE_PAIRS = 7, 8, 9  # header words


def words(K: int, C: int, G: int) -> int:
    """How many int32 words the table of a convolution has."""
    return HEADER_WORDS + 2 * K + 2 * C + K * -(-(C // G) // 32)


def live_filters(table: Tensor, K: int) -> Tensor:
    """bool [K]: the filter mask."""
    return table[HEADER_WORDS + K : HEADER_WORDS + 2 * K] != DEAD


def computed_filters(table: Tensor, K: int) -> Tensor:
    """bool [K]: filters with a live kernel."""
    return table[HEADER_WORDS + K : HEADER_WORDS + 2 * K] >= 0


def read_channels(table: Tensor, K: int, C: int) -> Tensor:
    """bool [C]: channels that a live kernel reads."""
    start = HEADER_WORDS + 2 * K + C
    return table[start : start + C] >= 0


def live_kernels(table: Tensor, K: int, C: int, channels_per_group: int) -> Tensor:
    """bool [K, C / groups]: kernels that all three masks leave."""
    pairs = table[HEADER_WORDS + 2 * K + 2 * C :].view(K, -1, 1)
    bits = pairs >> torch.arange(32, dtype=torch.int32, device=table.device) & 1
    return bits.view(K, -1)[:, :channels_per_group] != 0


def exchanged(tensor: Tensor, groups: int) -> Tensor:
    """[K, C / groups, ...] of the one convolution as [C, K / groups, ...] of the other; a view where groups is 1."""
    if groups == 1:
        return tensor.transpose(0, 1)
    A, B, *rest = tensor.shape
    return tensor.reshape(groups, A // groups, B, *rest).transpose(1, 2).reshape(groups * B, A // groups, *rest)


def _lists(live: np.ndarray, groups: np.ndarray) -> tuple[int, np.ndarray, np.ndarray, bool]:
    """Lists of the live members, bool [G, members], of the given groups: longest count, index, slot, whether ragged."""
    per_group, counts = live.shape[1], live.sum(axis=1)
    most = int(counts[groups].max(initial=0))
    index, slot = np.full(live.size, DEAD, np.int32), np.full(live.size, DEAD, np.int32)
    for position, g in enumerate(groups):
        members = g * per_group + np.flatnonzero(live[g])
        places = position * most + np.arange(len(members))
        index[places], slot[members] = members, places
    return most, index, slot, bool((counts[groups] < most).any())


def build(
    filter_mask: Tensor | None, kernel_mask: Tensor | None, input_mask: Tensor | None, K: int, C: int, G: int
) -> Tensor:
    """build_mask_table of csrc/core/mask_table.cpp, in numpy."""
    Cg, Kg = C // G, K // G
    f = np.ones(K, bool) if filter_mask is None else filter_mask.numpy()
    i = np.ones(C, bool) if input_mask is None else input_mask.numpy()
    pairs = np.ones((K, Cg), bool) if kernel_mask is None else kernel_mask.numpy().copy()
    pairs &= f[:, None] & i.reshape(G, Cg).repeat(Kg, axis=0)
    rows = np.any(pairs, axis=1).reshape(G, Kg)
    columns = np.any(pairs.reshape(G, Kg, Cg), axis=1)
    groups = np.flatnonzero(rows.any(axis=1))
    out_count, out_index, out_slot, ragged_out = _lists(rows, groups)
    in_count, in_index, in_slot, ragged_in = _lists(columns, groups)
    constant = f & ~rows.reshape(K)
    out_slot[constant] = CONSTANT
    box = int((rows.sum(axis=1) * columns.sum(axis=1)).sum())
    counts = [f.sum(), i.sum(), pairs.sum(), constant.sum(), pairs.sum() == box, ragged_out or ragged_in]
    header = np.zeros(HEADER_WORDS, np.int32)
    header[:13] = [MAGIC, K, C, G, len(groups), out_count, in_count, *counts]
    padded = np.zeros((K, -(-Cg // 32) * 32), bool)
    padded[:, :Cg] = pairs
    bits = np.packbits(padded, axis=1, bitorder="little").view("<i4").reshape(-1) if padded.size else header[:0]
    return torch.from_numpy(np.concatenate([header, out_index, out_slot, in_index, in_slot, bits]).astype(np.int32))
