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
ALMOST = 8  # a list is almost full where one channel in so many, or less, is dead
_MAX_DERIVED = 256  # of a list: one that outlives many mask changes must not collect what was derived with every other


class ChannelRemap(NamedTuple):
    """How compact channels of one list go to the places of another list: the index arguments of regroup_channels."""

    gather_index: Tensor  # int32 [to.count]: the compact channel of the source that goes there, -1 where none does
    inverse: Tensor  # int32 [source.count]: the place that each compact channel goes to, -1 where it is dropped


class LiveList:
    """Which of `channels` channels are live, ascending. Made by LiveList.of and the methods below, never directly.

    Whatever is derived from a list (unions, remaps, copies on a device) is cached in it, so a training step only looks
    it up.

    Attributes:
        channels: How many channels there are, live and dead.
        count: How many are live.
        host: The live channels, int32 [count], ascending.
    """

    __slots__ = ("__weakref__", "_derived", "channels", "count", "host")
    _known: WeakValueDictionary[tuple[int, bytes], LiveList] = WeakValueDictionary()
    channels: int
    count: int
    host: np.ndarray  # int32 [count]
    _derived: dict[Any, Any]

    @staticmethod
    def of(host: np.ndarray, channels: int) -> LiveList:
        """The list of the channels `host`, int [count] and ascending, among `channels`."""
        host = np.ascontiguousarray(host, dtype=np.int32)
        key = (channels, host.tobytes())
        known = LiveList._known.get(key)
        if known is None:
            known = LiveList._known[key] = object.__new__(LiveList)
            known.channels, known.count, known.host, known._derived = channels, len(host), host, {}
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

    def widened(self) -> LiveList:
        """The list that a layer makes live: this one, or all channels where it is almost full."""
        return LiveList.all(self.channels) if self.almost_full else self

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
        rows: Tensor = self._once(("rows", device), lambda: torch.from_numpy(self.host).to(device, torch.int64))
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            _captured[rows.data_ptr()] = rows
        return rows

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
        return self._once(("|", other), lambda: LiveList.of(np.union1d(self.host, other.host), self.channels))

    def intersection(self, other: LiveList) -> LiveList:
        """The channels live in both lists."""
        if other is self:
            return self
        return self._once(("&", other), lambda: LiveList.of(np.intersect1d(self.host, other.host), self.channels))

    def holes(self, to: LiveList) -> LiveList:
        """The places, among the channels of `to`, of those that this list lacks."""
        return self._once(("holes", to), lambda: LiveList.of(np.flatnonzero(_positions(self, to) < 0), to.count))

    def spread(self, size: int) -> LiveList:
        """The list after flattening: each channel becomes `size` neighbouring columns."""
        if size == 1:
            return self

        def make() -> LiveList:
            columns = self.host[:, None].astype(np.int64) * size + np.arange(size)
            return LiveList.of(columns.reshape(-1), self.channels * size)

        return self._once(("spread", size), make)

    def pad(self, before: int, after: int) -> LiveList:
        """The list after dead channels are added in front and behind."""
        channels = self.channels + before + after
        return self._once(("pad", before, after), lambda: LiveList.of(self.host + before, channels))

    def slice(self, start: int, stop: int) -> tuple[LiveList, int, int]:
        """The list of channels start to stop - 1, where they begin among the compact channels, and their count."""

        def make() -> tuple[LiveList, int, int]:
            first, last = np.searchsorted(self.host, (start, stop)).tolist()
            return LiveList.of(self.host[first:last] - start, stop - start), first, last - first

        return self._once(("slice", start, stop), make)

    @staticmethod
    def cat(lists: Sequence[LiveList]) -> LiveList:
        """The list after tensors are concatenated along their channels."""

        def make() -> LiveList:
            starts = np.cumsum([0] + [each.channels for each in lists])
            parts = [each.host + start for each, start in zip(lists, starts, strict=False)]
            return LiveList.of(np.concatenate(parts), int(starts[-1]))

        return lists[0]._once(("cat", *lists[1:]), make)

    def __reduce__(self) -> tuple[Any, ...]:
        return LiveList.of, (self.host, self.channels)  # copying and unpickling give the interned list too

    def __repr__(self) -> str:
        return f"LiveList({self.count}/{self.channels})"


def _positions(source: LiveList, to: LiveList) -> np.ndarray:
    """int32 [to.count]: the place of each channel of `to` among those of `source`, -1 where `source` lacks it."""
    slot = np.full(source.channels, -1, np.int32)
    slot[source.host] = np.arange(source.count, dtype=np.int32)
    return slot[to.host]
