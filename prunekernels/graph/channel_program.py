"""The steps of a channel program: what an operator makes of live channels and reads of them, over bool arrays.

Every channel of every value has a place in two flat arrays, live and read. A channel is either live or holds a constant
that the network alone decides, so one bit says what the masks make of it. Operators that only move channels have no
step: their results have the places of their operands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Places = Any  # a slice of the flat arrays, or int64 indices


@dataclass
class MaskArrays:
    """What is live in a layer. None: all of it."""

    rows: Bools | None = None  # [K]: filters that are live and not hard-dead, or the channels of a norm
    columns: Bools | None = None  # [C]: the input channels that a convolution reads
    kernels: Bools | None = None  # [K, C / groups]: its single kernels

    def equals(self, other: MaskArrays) -> bool:
        pairs = (self.rows, other.rows), (self.columns, other.columns), (self.kernels, other.kernels)
        return all(a is b or (a is not None and b is not None and np.array_equal(a, b)) for a, b in pairs)


def rows_of(masks: MaskArrays) -> Any:
    """bool [K], or True."""
    return True if masks.rows is None else masks.rows


def places(at: npt.NDArray[np.int64]) -> Places:
    """A slice where that does: views of the arrays are faster than copies."""
    first = int(at[0]) if at.size else 0
    return slice(first, first + at.size) if np.array_equal(at, np.arange(first, first + at.size)) else at


def mark(read: Bools, at: Places, which: Any) -> None:
    """Marks the places of which, bool [places] or True, as read; a place may be there several times."""
    if which is True:
        read[at] = True
    elif isinstance(at, slice):
        read[at] |= which
    else:
        read[at[which]] = True


class Step(Protocol):
    def forward(self, live: Bools) -> None:
        """Says which channels of the result are live."""

    def backward(self, live: Bools, read: Bools) -> None:
        """Marks which channels of the operands are read, given which of the result are."""


class Input(NamedTuple):
    """The channels that a layer reads."""

    at: Places
    channels: int
    constant: Bools | None  # [channels]: those that hold another constant than zero where they are not live; None: none

    def not_zero(self, live: Bools) -> Bools:
        x: Bools = live[self.at]
        return x if self.constant is None else x | self.constant


@dataclass
class WeightStep:
    """A convolution or linear layer. Without masks of single kernels the live kernels are rows times columns."""

    x: Input
    out: slice
    groups: int
    weight: MaskArrays
    bias: MaskArrays | None

    def forward(self, live: Bools) -> None:
        rows, columns, kernels = rows_of(self.weight), self.weight.columns, self.weight.kernels
        if self.bias is not None and (self.bias is self.weight or self.bias.rows is None):
            live[self.out] = rows_of(self.bias)  # whatever enters
            return
        x = self.x.not_zero(live)
        x = x if columns is None else x & columns
        fed: Any
        if kernels is not None:
            fed = (self._by_group(kernels) & x.reshape(self.groups, 1, -1)).any(2).reshape(-1)
        elif self.groups == 1:
            fed = x.any()
        else:
            fed = x.reshape(self.groups, -1).any(1).repeat((self.out.stop - self.out.start) // self.groups)
        live[self.out] = fed & rows if self.bias is None else fed & rows | rows_of(self.bias)

    def backward(self, live: Bools, read: Bools) -> None:
        rows, columns, kernels = rows_of(self.weight), self.weight.columns, self.weight.kernels
        needed = read[self.out] & live[self.out] & rows
        every = True if columns is None else columns
        if kernels is not None:
            reads = (self._by_group(kernels) & needed.reshape(self.groups, -1, 1)).any(1).reshape(-1)
            mark(read, self.x.at, reads & every)
        elif self.groups > 1:
            reads = needed.reshape(self.groups, -1).any(1).repeat(self.x.channels // self.groups)
            mark(read, self.x.at, reads & every)
        elif needed.any():
            mark(read, self.x.at, every)

    def _by_group(self, kernels: Bools) -> Bools:
        """[groups, K / groups, C / groups]"""
        return kernels.reshape(self.groups, -1, kernels.shape[1])


@dataclass
class NormStep:
    """Batch norm. A dead channel is zero; any other is live, but for one of zeros, by_batch, that has no bias.

    tracks: it has running statistics, which move in training, so that its live channels count as read.
    """

    x: Input
    out: slice
    weight: MaskArrays
    bias: MaskArrays | None
    by_batch: bool
    tracks: bool

    def forward(self, live: Bools) -> None:
        bias = False if self.bias is None else rows_of(self.bias)
        passes = rows_of(self.weight)
        live[self.out] = (passes & self.x.not_zero(live) if self.by_batch else passes) | bias

    def backward(self, live: Bools, read: Bools) -> None:
        if self.tracks:
            read[self.out] |= live[self.out]
        mark(read, self.x.at, read[self.out] & live[self.out] & rows_of(self.weight))


@dataclass
class NormOverChannelsStep:
    """Group or layer norm. Where something live of a group is read, all that its mask leaves live is."""

    x: Input
    out: slice
    groups: int
    weight: MaskArrays
    bias: MaskArrays | None

    def forward(self, live: Bools) -> None:
        live[self.out] = rows_of(self.weight) | (False if self.bias is None else rows_of(self.bias))

    def backward(self, live: Bools, read: Bools) -> None:
        needed = (read[self.out] & live[self.out]).reshape(self.groups, -1).any(1)
        needed = needed.repeat(self.x.channels // self.groups) & rows_of(self.weight)
        read[self.out] |= needed
        mark(read, self.x.at, needed)


class Term(NamedTuple):
    """A channel is live where all of some operands are."""

    operands: tuple[int, ...]
    where: Bools | None  # [C]; None: everywhere


@dataclass
class MeetStep:
    """An operator on each channel of its operands alone: live where one of the terms holds."""

    operands: Sequence[Places]
    out: slice
    terms: Sequence[Term]
    whole: Sequence[Places] = field(default_factory=tuple)  # operands of which every channel of the result reads all

    def forward(self, live: Bools) -> None:
        result: Any = False
        for members, where in self.terms:
            holds: Any = True if where is None else where
            for i in members:
                holds = live[self.operands[i]] & holds
            result = result | holds
        live[self.out] = result

    def backward(self, live: Bools, read: Bools) -> None:
        needed = read[self.out] & live[self.out]
        for at in self.operands:
            mark(read, at, needed)
        if self.whole and needed.any():
            for at in self.whole:
                mark(read, at, True)


@dataclass
class TogetherStep:
    """A view behind which several channels share an entry: live where one of them is."""

    index: npt.NDArray[np.int64]  # [entries, n], places of the channels
    out: slice
    differs: Bools  # [entries]: they hold several constants where none is live

    def forward(self, live: Bools) -> None:
        live[self.out] = live[self.index].any(1) | self.differs

    def backward(self, live: Bools, read: Bools) -> None:
        read[self.index[read[self.out] & live[self.out]]] = True


@dataclass
class Program:
    """live, read: what holds for all masks, [places]. steps: in the order of the network.

    constant: where a channel that is not live holds another constant than zero, [places]. Something has to compute it.
    """

    live: Bools
    read: Bools
    constant: Bools
    steps: list[Step]

    def needed(self) -> Bools:
        """Which channels are read and not zero, bool [places], under the masks that the steps have now."""
        live, read = self.live.copy(), self.read.copy()
        for step in self.steps:
            step.forward(live)
        live |= self.constant
        for step in reversed(self.steps):
            step.backward(live, read)
        return live & read
