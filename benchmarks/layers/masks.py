"""Random masks with exact live counts."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from layers.problems import Problem


def live_count(total: int, keep_ratio: float) -> int:
    """How many of `total` stay live: rounded half up, at least one."""
    return max(1, int(keep_ratio * total + 0.5))


@dataclass(frozen=True)
class Masks:
    """Bool masks, True = live; None = all live. [K], [K, C/G] and [C]."""

    filter: Tensor | None
    kernel: Tensor | None
    input: Tensor | None
    pairs: Tensor  # [K, C/G] the kernels that all three leave live

    def to(self, device: str) -> Masks:
        filters, kernels, inputs = (m if m is None else m.to(device) for m in (self.filter, self.kernel, self.input))
        return Masks(filters, kernels, inputs, self.pairs.to(device))

    @property
    def live_filters(self) -> Tensor:  # [K]
        return self.pairs.any(1)

    def live_inputs(self, groups: int) -> Tensor:  # [C]
        return self.pairs.view(groups, -1, self.pairs.shape[1]).any(1).flatten()


def _pick(total: int, keep_ratio: float, generator: torch.Generator) -> Tensor:
    mask = torch.zeros(total, dtype=torch.bool)
    mask[torch.randperm(total, generator=generator)[: live_count(total, keep_ratio)]] = True
    return mask


def parse_block(text: str) -> tuple[int, int]:
    """Filters and channels of a block, "64x16"."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise ValueError(f"expected filters x channels such as 64x16, got {text!r}")
    return int(found[1]), int(found[2])


def _pick_blocks(p: Problem, block: str, keep_ratio: float, generator: torch.Generator) -> Tensor:  # [K, C/G]
    """Blocks begin at the corner of every group; the last ones of a row or column may be smaller."""
    height, width = parse_block(block)
    filters, channels = p.filters // p.groups, p.channels // p.groups
    grid = p.groups, -(-filters // height), -(-channels // width)
    blocks = _pick(math.prod(grid), keep_ratio, generator).view(grid)
    kernels = blocks.repeat_interleave(height, 1)[:, :filters].repeat_interleave(width, 2)[:, :, :channels]
    return kernels.reshape(p.filters, channels)


def make_masks(problem: Problem, pattern: str, side: str, keep_ratio: float, seed: int = 0) -> Masks:
    """Random masks with exactly `live_count` live filters and input channels (pattern "filter"), kernels ("kernel"), or
    blocks of kernels ("block", `side` is the size of one).

    Filter masks of grouped layers are drawn group by group, the same count in each, so that compaction stays possible.
    A depthwise layer's filters and inputs are the same channels, whatever the side.
    """
    generator = torch.Generator().manual_seed(seed)
    p, per_group = problem, problem.filters // problem.groups
    filter_mask = kernel_mask = input_mask = None
    if pattern == "kernel":
        kernel_mask = _pick(p.filters * p.channels // p.groups, keep_ratio, generator).view(p.filters, -1)
    elif pattern == "block":
        kernel_mask = _pick_blocks(p, side, keep_ratio, generator)
    elif p.depthwise:
        channels = _pick(p.channels, keep_ratio, generator)
        filter_mask = channels.repeat_interleave(per_group) if side in ("both", "out") else None
        input_mask = channels if side in ("both", "in") else None
    else:
        if side in ("both", "out"):
            filter_mask = torch.cat([_pick(per_group, keep_ratio, generator) for _ in range(p.groups)])
        if side in ("both", "in") and not p.image_input:
            input_mask = torch.cat([_pick(p.channels // p.groups, keep_ratio, generator) for _ in range(p.groups)])
    pairs = torch.ones(p.weight_shape[:2], dtype=torch.bool) if kernel_mask is None else kernel_mask.clone()
    if filter_mask is not None:
        pairs &= filter_mask[:, None]
    if input_mask is not None:
        pairs &= input_mask.view(p.groups, 1, -1).expand(-1, per_group, -1).reshape(pairs.shape)
    return Masks(filter_mask, kernel_mask, input_mask, pairs)
