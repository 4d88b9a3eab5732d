"""LiveList: the sorted live channels of a tensor. Lists are interned: equal lists are one object."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_captured: dict[int, Tensor] = {}  # by address: CUDA graphs go on reading these after their lists are gone
ALIGN = {"cuda": 8}  # by type of device: lists grow to a multiple, without which cuDNN leaves the tensor cores
ALMOST = 8  # a list is almost full where one channel in so many, or less, is dead
_MAX_DERIVED = 256  # of a list: one that outlives many mask changes must not collect what was derived with every other


class ChannelRemap(NamedTuple):
    """How compact channels of one list go to the places of another list: the index arguments of regroup_channels."""

    gather_index: Tensor  # int32 [to.count]: the compact channel of the source that goes there, -1 where none does
    inverse: Tensor  # int32 [source.count]: the place that each compact channel goes to, -1 where it is dropped


def outlives_lists(tensor: Tensor) -> Tensor:
    """The tensor, which a CUDA graph that is captured now goes on reading when what it was cached in is gone."""
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        _captured[tensor.data_ptr()] = tensor
    return tensor


def align_of(device: torch.device, wanted: int | None = None) -> int:
    """What the length of lists on a device should be a multiple of: as wanted, or by ALIGN."""
    return wanted or ALIGN.get(device.type, 1)


class LiveList:
    """Which of `channels` channels are live, ascending. Made by LiveList.of and the methods below, never directly.

    A list may be padded with dead channels, see aligned(); what they hold is that of all dead channels.

    Whatever is derived from a list (unions, remaps, copies on a device) is cached in it, so a training step only looks
    it up.

    Attributes:
        channels: How many channels there are, live and dead.
        count: How many are live.
        host: The live channels, int32 [count], ascending.
        is_padded: Whether dead channels are among them.
    """

    __slots__ = ("__weakref__", "_derived", "_unpadded", "channels", "count", "host", "is_padded")
    _known: WeakValueDictionary[tuple[int, bytes, bytes], LiveList] = WeakValueDictionary()
    channels: int
    count: int
    host: np.ndarray  # int32 [count]
    is_padded: bool
    _derived: dict[Any, Any]
    _unpadded: LiveList | None

    @staticmethod
    def of(host: np.ndarray, channels: int, unpadded: LiveList | None = None) -> LiveList:
        """The list of the channels `host`, int [count] and ascending, among `channels`.

        unpadded: The list of those that are not dead, if some are.
        """
        host = np.ascontiguousarray(host, dtype=np.int32)
        unpadded = None if unpadded is None or unpadded.count == len(host) else unpadded
        key = (channels, host.tobytes(), b"" if unpadded is None else unpadded.host.tobytes())
        known = LiveList._known.get(key)
        if known is None:
            known = LiveList._known[key] = object.__new__(LiveList)
            known.channels, known.count, known.host, known._derived = channels, len(host), host, {}
            known._unpadded, known.is_padded = unpadded, unpadded is not None
        return known

    @staticmethod
    def of_mask(mask: Tensor) -> LiveList:
        """The list of a mask, bool [channels], True = live. Waits for the device of the mask."""
        return LiveList.of(np.flatnonzero(mask.detach().cpu().numpy()), mask.numel())

    @staticmethod
    @functools.cache  # kept alive: where no layer holds it, each step would derive everything from it again
    def all(channels: int) -> LiveList:
        """The list of all channels."""
        return LiveList.of(np.arange(channels), channels)

    @property
    def full(self) -> bool:
        """Whether nothing is dead."""
        return self.count == self.channels

    @property
    def almost_full(self) -> bool:
        """Whether so little is dead that to leave it out costs more than it saves: odd numbers of channels slow down
        whatever works on vectors of them.
        """
        return ALMOST * (self.channels - self.count) <= self.channels

    @property
    def unpadded(self) -> LiveList:
        """The list without the dead channels that it is padded with."""
        return self if self._unpadded is None else self._unpadded

    def aligned(self, align: int) -> LiveList:
        """The list padded with the first dead channels, until its length is a multiple of align; all channels where
        there are not as many.
        """
        live = self.unpadded
        missing = -live.count % align
        if not missing or live.full:
            return live
        if live.count + missing >= live.channels:
            return LiveList.all(live.channels)

        def make() -> LiveList:
            dead = np.flatnonzero(~live.mask())[:missing]
            return LiveList.of(np.union1d(live.host, dead), live.channels, live)

        return live._once(("aligned", align), make)

    def widened(self, align: int = 1) -> LiveList:
        """The list that a layer makes live: this one, padded, or all channels where it is almost full."""
        return LiveList.all(self.channels) if self.almost_full else self.aligned(align)

    def is_live(self, device: torch.device) -> Tensor:
        """Bool [count] on a device: False for what the list is padded with."""
        live = lambda: torch.from_numpy(self.unpadded.mask()[self.host]).to(device)  # noqa: E731
        return outlives_lists(self._once(("is_live", device), live))

    def features(self, device: torch.device) -> Tensor:
        """The live channels on a device, int32 [count], with -1 for what the list is padded with."""
        padded = lambda: np.where(self.unpadded.mask()[self.host], self.host, -1).astype(np.int32)  # noqa: E731
        return self._once(("features", device), lambda: torch.from_numpy(padded()).to(device))

    def _padded_as(self, host: np.ndarray, channels: int, change: Callable[[LiveList], LiveList]) -> LiveList:
        """The list of channels `host` that change() makes of this one."""
        return LiveList.of(host, channels, None if self._unpadded is None else change(self._unpadded))

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What make() gives, cached under a key."""
        found = self._derived.get(key)
        if found is None:
            if len(self._derived) >= _MAX_DERIVED:
                self._derived.clear()
            # Tensors made here outlive the mode, the torch.func transform and the torch.export that they are made in.
            real = contextlib.nullcontext() if torch.compiler.is_dynamo_compiling() else _disable_current_modes()
            with torch.inference_mode(False), torch._C._DisableFuncTorch(), real:
                found = self._derived[key] = make()
        return found

    def index(self, device: torch.device) -> Tensor:
        """The live channels on a device, int32 [count]: what the operators take."""
        return self._once(device, lambda: torch.from_numpy(self.host).to(device))

    def rows(self, device: torch.device) -> Tensor:
        """The live channels on a device, int64 [count]: what torch's own indexing takes."""
        return outlives_lists(self._once(("rows", device), lambda: torch.from_numpy(self.host).to(device, torch.int64)))

    def mask(self) -> np.ndarray:
        """The list as a mask, bool [channels], True = live."""
        mask = np.zeros(self.channels, bool)
        mask[self.host] = True
        return mask

    def remap(self, to: LiveList, device: torch.device) -> ChannelRemap:
        """Brings compact channels of this list to the places they have in another list over the same channels."""

        def make() -> ChannelRemap:
            index, inverse = _positions(self, to), _positions(to, self)
            return ChannelRemap(torch.from_numpy(index).to(device), torch.from_numpy(inverse).to(device))

        return self._once(("remap", to, device), make)

    def union(self, other: LiveList) -> LiveList:
        """The channels live in either list."""
        if other is self:
            return self
        a, b = self.unpadded.host, other.unpadded.host
        return self._once(("|", other), lambda: LiveList.of(np.union1d(a, b), self.channels))

    def intersection(self, other: LiveList) -> LiveList:
        """The channels live in both lists."""
        if other is self:
            return self
        a, b = self.unpadded.host, other.unpadded.host
        return self._once(("&", other), lambda: LiveList.of(np.intersect1d(a, b), self.channels))

    def holes(self, to: LiveList) -> LiveList:
        """The places, among the channels of `to`, of those that this list lacks."""
        return self._once(("holes", to), lambda: LiveList.of(np.flatnonzero(_positions(self, to) < 0), to.count))

    def spread(self, size: int) -> LiveList:
        """The list after flattening: each channel becomes `size` neighbouring columns."""
        if size == 1:
            return self

        def make() -> LiveList:
            columns = self.host[:, None].astype(np.int64) * size + np.arange(size)
            return self._padded_as(columns.reshape(-1), self.channels * size, lambda live: live.spread(size))

        return self._once(("spread", size), make)

    def pad(self, before: int, after: int) -> LiveList:
        """The list after dead channels are added in front and behind."""
        channels = self.channels + before + after

        def make() -> LiveList:
            return self._padded_as(self.host + before, channels, lambda live: live.pad(before, after))

        return self._once(("pad", before, after), make)

    def slice(self, start: int, stop: int) -> tuple[LiveList, int, int]:
        """The list of channels start to stop - 1, where they begin among the compact channels, and their count."""

        def make() -> tuple[LiveList, int, int]:
            first, last = np.searchsorted(self.host, (start, stop)).tolist()
            host = self.host[first:last] - start
            part = self._padded_as(host, stop - start, lambda live: live.slice(start, stop)[0])
            return part, first, last - first

        return self._once(("slice", start, stop), make)

    def reordered(
        self, split: tuple[int, ...], order: tuple[int, ...], device: torch.device
    ) -> tuple[LiveList, Tensor]:
        """The list after the channels, seen as a tensor of shape `split`, are permuted by `order`; and the place of
        each of its channels in this one, int64 [count].
        """

        def make() -> tuple[LiveList, Tensor]:
            source = np.arange(self.channels).reshape(split).transpose(order).reshape(-1)
            host = np.flatnonzero(self.mask()[source])
            live = self._padded_as(host, self.channels, lambda live: live.reordered(split, order, device)[0])
            slot = np.zeros(self.channels, np.int64)
            slot[self.host] = np.arange(self.count)
            return live, torch.from_numpy(slot[source[live.host]]).to(device)

        live, places = self._once(("reordered", split, order, device), make)
        return live, outlives_lists(places)

    def by_factor(self, factor: int) -> tuple[LiveList, LiveList]:
        """Of the channels seen as [factor, rest]: those of the rest that are live anywhere, and all channels that have
        one of these.
        """

        def make() -> tuple[LiveList, LiveList]:
            anywhere = self.unpadded.mask().reshape(factor, -1).any(0)
            rest = LiveList.of(np.flatnonzero(anywhere), anywhere.size)
            return rest, LiveList.of(np.flatnonzero(np.tile(anywhere, factor)), self.channels)

        return self._once(("factor", factor), make)

    @staticmethod
    def cat(lists: Sequence[LiveList]) -> LiveList:
        """The list after tensors are concatenated along their channels."""

        def make() -> LiveList:
            starts = np.cumsum([0] + [each.channels for each in lists])
            parts = [each.host + start for each, start in zip(lists, starts, strict=False)]
            unpadded = None
            if any(each.is_padded for each in lists):
                unpadded = LiveList.cat([each.unpadded for each in lists])
            return LiveList.of(np.concatenate(parts), int(starts[-1]), unpadded)

        return lists[0]._once(("cat", *lists[1:]), make)

    def __reduce__(self) -> tuple[Any, ...]:
        return LiveList.of, (
            self.host,
            self.channels,
            self._unpadded,
        )  # copying and unpickling give the interned list too

    def __repr__(self) -> str:
        return f"LiveList({self.count}/{self.channels})"


def _positions(source: LiveList, to: LiveList) -> np.ndarray:
    """int32 [to.count]: the place of each channel of `to` in `source`, -1 where `source` lacks it or it is padding."""
    slot = np.full(source.channels, -1, np.int32)
    slot[source.host] = np.arange(source.count, dtype=np.int32)
    slot[~(source.unpadded.mask() & to.unpadded.mask())] = -1
    return slot[to.host]
