"""NormChannels: which channels a norm over several channels takes its statistics of, and in which groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Chunks = list[tuple[int, int]]
_HALF = (torch.bfloat16, torch.float16)


class NormChannels:
    """The channels that a norm normalizes, in groups; the other ones are zero behind it.

    Args:
        live: Which channels it normalizes, ascending, int [live].
        group: The group of each, ascending, int [live]. Groups may differ in size.
        channels: How many channels its input has.

    Attributes:
        order: The live channels, those in groups of equal size beside each other, int64 [live].
        place: Where each channel is in order, int64 [channels]; -1: nowhere.
        chunks: What order consists of: (groups, channels in each group) and so on.
    """

    def __init__(self, live: np.ndarray, group: np.ndarray, channels: int) -> None:
        _, number, sizes = np.unique(group, return_inverse=True, return_counts=True)
        each = sizes[number] if live.size else np.zeros(0, np.int64)
        self.channels = channels
        self.order = np.asarray(live, dtype=np.int64)[np.argsort(each, kind="stable")]
        self.place = np.full(channels, -1, np.int64)
        self.place[self.order] = np.arange(self.order.size)
        found, counts = np.unique(sizes, return_counts=True)
        self.chunks = [(int(count), int(size)) for size, count in zip(found, counts, strict=True)]
        self._known: dict[Any, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def of_rows(rows: np.ndarray, groups: int, channels: int) -> NormChannels:
        """Those that are left of a norm with so many groups and channels: rows, int [kept]; -1: zeros in between."""
        at = np.flatnonzero(rows >= 0)
        return NormChannels(at, rows[at] // (channels // groups), rows.size)

    @property
    def even(self) -> bool:
        """Whether all groups have the same size."""
        return len(self.chunks) == 1

    @property
    def plain(self) -> bool:
        """Whether a layer of torch.nn computes it: all channels, in groups of the same size."""
        return self.even and self.order.size == self.channels

    def moves(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Indices of index_select that bring live channels from ascending order to this one, and back: int64 [live]."""
        back = self.place[self.place >= 0]
        among = np.empty_like(back)
        among[back] = np.arange(back.size)
        return self._once("moves", device, among, back)

    def indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """order, and place with the number of live channels for those that have none; int64, on a device."""
        return self._once("indices", device, self.order, np.where(self.place < 0, self.order.size, self.place))

    def _once(self, what: str, device: torch.device, a: np.ndarray, b: np.ndarray) -> tuple[Tensor, Tensor]:
        key = (what, device)
        if key not in self._known:
            with torch.inference_mode(False):  # they outlive the mode that they are made in
                self._known[key] = torch.from_numpy(a).to(device), torch.from_numpy(b).to(device)
        return self._known[key]


def normalize_chunks(x: Tensor, chunks: Chunks, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Group norm of channels in the order of NormChannels. x: [N, live, ...]; weight, bias: [live] in that order."""
    if len(chunks) == 1:
        return torch.group_norm(x, chunks[0][0], weight, bias, eps, torch.backends.cudnn.enabled)
    parts, start = [], 0
    for groups, size in chunks:
        count = groups * size
        w = None if weight is None else weight.narrow(0, start, count)
        b = None if bias is None else bias.narrow(0, start, count)
        part = x.narrow(1, start, count)
        parts.append(torch.group_norm(part, groups, w, b, eps, torch.backends.cudnn.enabled))
        start += count
    return torch.cat(parts, 1)


def normalize_live(
    x: Tensor,
    live: Tensor,
    over: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """The norm at full width, in operators of torch whose sizes do not depend on the mask.

    x: [A, groups, C / groups, B]; live: bool [groups, C / groups]; over: the dimensions of x that a group's statistics
    are of, (2,) or (2, 3).
    """
    like = x
    x = x.float() if x.dtype in _HALF else x
    inside, zero = live.unsqueeze(-1), x.new_zeros(())
    count = live.sum(-1).clamp(min=1).to(x.dtype).view(-1, 1, 1) * (x.shape[3] if 3 in over else 1)
    x = torch.where(inside, x, zero)
    centered = torch.where(inside, x - x.sum(over, keepdim=True) / count, zero)
    y = centered * (centered.square().sum(over, keepdim=True) / count + eps).rsqrt()
    weight, bias = (None if p is None else torch.where(live, p.view(live.shape), p.new_zeros(())).unsqueeze(-1)
                    for p in (weight, bias))  # fmt: skip
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return torch.where(inside, y, y.new_zeros(())).to(_dtype_of_result(like))


def _dtype_of_result(x: Tensor) -> torch.dtype:
    """What torch's own norms give: on GPUs autocast has them run in float32."""
    wide = x.device.type == "cuda" and torch.is_autocast_enabled("cuda")
    return torch.float32 if wide and x.dtype in _HALF else x.dtype
