"""Problem lines, suites of them, and seeded masks with exact live counts.

A problem is one line of text, `n16c64h56k64r3s1p1g1 "resnet50:conv2_x.3x3*3"`:
n batch, c input channels, h height (w width, the same when left out), k filters, r taps along each side, s stride,
p padding, g groups and d dilation (1 when left out), then a name and how often the network has this layer.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHAPES = Path(__file__).resolve().parents[1] / "shapes"
IMAGE_CHANNELS = 4  # so few channels are an image: never pruned, and no training step wants their gradient

_LINE = re.compile(
    r"n(\d+)c(\d+)h(\d+)(?:w(\d+))?k(\d+)r(\d+)(?:s(\d+))?(?:p(\d+))?(?:g(\d+))?(?:d(\d+))?"
    r'(?:\s+"([^"*]+)(?:\*(\d+))?")?'
)


@dataclass(frozen=True)
class Problem:
    """One convolution without bias, and how often the network it comes from has it."""

    batch: int
    channels: int
    height: int
    width: int
    filters: int
    taps: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    dilation: int = 1
    name: str = ""
    times: int = 1

    def __post_init__(self) -> None:
        if min(self.batch, self.channels, self.height, self.width, self.filters, self.taps) < 1:
            raise ValueError(f"problem {self.shape}: sizes must be at least 1")
        if min(self.stride, self.groups, self.dilation, self.times) < 1:
            raise ValueError(f"problem {self.shape}: stride, groups, dilation and multiplicity must be at least 1")
        if self.channels % self.groups or self.filters % self.groups:
            raise ValueError(f"problem {self.shape}: groups must divide channels and filters")
        if min(self.out_height, self.out_width) < 1:
            raise ValueError(f"problem {self.shape}: empty output, {self.out_height} x {self.out_width}")

    @classmethod
    def parse(cls, line: str) -> Problem:
        found = _LINE.fullmatch(line.strip())
        if not found:
            raise ValueError(f'malformed problem line {line.strip()!r}, expected e.g. n16c64h56k64r3s1p1g1 "name*3"')
        n, c, h, w, k, r, s, p, g, d, name, times = found.groups()
        sizes = (int(n), int(c), int(h), int(w or h), int(k), int(r))
        return cls(*sizes, int(s or 1), int(p or 0), int(g or 1), int(d or 1), name or "", int(times or 1))

    @property
    def shape(self) -> str:
        """The line without its name."""
        width = f"w{self.width}" if self.width != self.height else ""
        dilation = f"d{self.dilation}" if self.dilation != 1 else ""
        return (
            f"n{self.batch}c{self.channels}h{self.height}{width}k{self.filters}"
            f"r{self.taps}s{self.stride}p{self.padding}g{self.groups}{dilation}"
        )

    def format(self) -> str:
        if not self.name:
            return self.shape
        return f'{self.shape} "{self.name}{f"*{self.times}" if self.times > 1 else ""}"'

    @property
    def out_height(self) -> int:
        return self._out(self.height)

    @property
    def out_width(self) -> int:
        return self._out(self.width)

    def _out(self, size: int) -> int:
        return (size + 2 * self.padding - self.dilation * (self.taps - 1) - 1) // self.stride + 1

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, self.height, self.width

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.filters, self.channels // self.groups, self.taps, self.taps

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.filters, self.out_height, self.out_width

    @property
    def macs(self) -> int:
        """Multiply-adds of one image and one layer, dense."""
        return self.filters * (self.channels // self.groups) * self.taps**2 * self.out_height * self.out_width

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.channels

    @property
    def image_input(self) -> bool:
        return self.channels <= IMAGE_CHANNELS

    @property
    def conv_args(self) -> dict[str, Any]:
        return dict(stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups)


def suites() -> list[str]:
    return sorted(path.stem for path in SHAPES.glob("*.txt"))


def load_suite(name: str) -> list[Problem]:
    """Problems of shapes/<name>.txt; blank lines and lines that begin with # do not count."""
    if name not in suites():
        raise ValueError(f"unknown suite {name!r}, expected one of: {', '.join(suites())}")
    lines = (line.strip() for line in (SHAPES / f"{name}.txt").read_text().splitlines())
    return [Problem.parse(line) for line in lines if line and not line.startswith("#")]


def live_count(total: int, kept: float) -> int:
    """How many of `total` stay live: rounded half up, never none."""
    return max(1, int(kept * total + 0.5))


@dataclass(frozen=True)
class Masks:
    """Bool masks, True = live; None = all live. [K], [K, C/G] and [C]."""

    filter: Tensor | None
    kernel: Tensor | None
    input: Tensor | None
    pairs: Tensor  # [K, C/G] what the three leave live together

    def to(self, device: str) -> Masks:
        filters, kernels, inputs = (m if m is None else m.to(device) for m in (self.filter, self.kernel, self.input))
        return Masks(filters, kernels, inputs, self.pairs.to(device))

    @property
    def live_filters(self) -> Tensor:  # [K]
        return self.pairs.any(1)

    def live_inputs(self, groups: int) -> Tensor:  # [C]
        return self.pairs.view(groups, -1, self.pairs.shape[1]).any(1).flatten()


def _pick(total: int, kept: float, generator: torch.Generator) -> Tensor:
    mask = torch.zeros(total, dtype=torch.bool)
    mask[torch.randperm(total, generator=generator)[: live_count(total, kept)]] = True
    return mask


def parse_block(text: str) -> tuple[int, int]:
    """Filters and channels of a block, "64x16"."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise ValueError(f"expected filters x channels such as 64x16, got {text!r}")
    return int(found[1]), int(found[2])


def _pick_blocks(p: Problem, block: str, kept: float, generator: torch.Generator) -> Tensor:  # [K, C/G]
    """Blocks begin at the corner of every group; the last ones of a row or column may be smaller."""
    height, width = parse_block(block)
    filters, channels = p.filters // p.groups, p.channels // p.groups
    grid = p.groups, -(-filters // height), -(-channels // width)
    blocks = _pick(math.prod(grid), kept, generator).view(grid)
    kernels = blocks.repeat_interleave(height, 1)[:, :filters].repeat_interleave(width, 2)[:, :, :channels]
    return kernels.reshape(p.filters, channels)


def make_masks(problem: Problem, pattern: str, side: str, kept: float, seed: int = 0) -> Masks:
    """Masks with exactly `live_count` live filters and input channels (pattern "filter"), kernels ("kernel"), or blocks
    of kernels ("block", `side` is the size of one).

    Filter masks of grouped layers are drawn group by group, the same count in each, so that compaction stays possible.
    A depthwise layer's filters and inputs are the same channels, whatever the side.
    """
    generator = torch.Generator().manual_seed(seed)
    p, per_group = problem, problem.filters // problem.groups
    filter_mask = kernel_mask = input_mask = None
    if pattern == "kernel":
        kernel_mask = _pick(p.filters * p.channels // p.groups, kept, generator).view(p.filters, -1)
    elif pattern == "block":
        kernel_mask = _pick_blocks(p, side, kept, generator)
    elif p.depthwise:
        channels = _pick(p.channels, kept, generator)
        filter_mask = channels.repeat_interleave(per_group) if side in ("both", "out") else None
        input_mask = channels if side in ("both", "in") else None
    else:
        if side in ("both", "out"):
            filter_mask = torch.cat([_pick(per_group, kept, generator) for _ in range(p.groups)])
        if side in ("both", "in") and not p.image_input:
            input_mask = torch.cat([_pick(p.channels // p.groups, kept, generator) for _ in range(p.groups)])
    pairs = torch.ones(p.weight_shape[:2], dtype=torch.bool) if kernel_mask is None else kernel_mask.clone()
    if filter_mask is not None:
        pairs &= filter_mask[:, None]
    if input_mask is not None:
        pairs &= input_mask.view(p.groups, 1, -1).expand(-1, per_group, -1).reshape(pairs.shape)
    return Masks(filter_mask, kernel_mask, input_mask, pairs)
