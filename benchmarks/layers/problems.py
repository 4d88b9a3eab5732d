"""Problem lines, and suites of them.

A problem is one line of text, `n16c64h56k64r3s1p1g1 "resnet50:conv2_x.3x3*3"`:
n batch, c input channels, h height (w width, the same when left out), k filters, r taps along each side, s stride,
p padding, g groups and d dilation (1 when left out), then a name and how often the network has this layer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
