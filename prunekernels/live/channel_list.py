"""LiveList: the sorted live channels of a live tensor, interned, so that equal lists are one object."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

_captured: dict[int, Tensor] = {}  # graphs go on reading these, whatever becomes of their lists
_KEPT = 256  # things derived from a list: one that outlives many others (masks change) must not collect them all


class ChannelRemap(NamedTuple):
    """How compact channels of one list go to the places of another list: the index arguments of regroup_channels."""

    gather_index: Tensor  # int32 [to.count]: the compact channel of the source that goes there, -1 where none does
    inverse: Tensor  # int32 [source.count]: the place that each compact channel goes to, -1 where it is dropped


class LiveList:
    """Which of `channels` channels are live, ascending. Made by LiveList.of and the methods below, never directly.

    Everything derived from a list (unions, moves, copies on a device) is made once and kept with it: a training step
    looks it up.
    """

    __slots__ = ("__weakref__", "_derived", "channels", "count", "host")
    _known: WeakValueDictionary[tuple[int, bytes], LiveList] = WeakValueDictionary()
    channels: int
    count: int
    host: np.ndarray  # int32 [count]
    _derived: dict[Any, Any]

    @staticmethod
    def of(host: np.ndarray, channels: int) -> LiveList:
        """The list of these channels, ascending."""
        host = np.ascontiguousarray(host, dtype=np.int32)
        key = (channels, host.tobytes())
        known = LiveList._known.get(key)
        if known is None:
            known = LiveList._known[key] = object.__new__(LiveList)
            known.channels, known.count, known.host, known._derived = channels, len(host), host, {}
        return known

    @staticmethod
    def of_mask(mask: Tensor) -> LiveList:
        """The list of a bool mask [channels]; waits for its device."""
        return LiveList.of(np.flatnonzero(mask.detach().cpu().numpy()), mask.numel())

    @staticmethod
    @functools.cache  # or, where no layer has it, a step would make it and all that is derived from it anew
    def all(channels: int) -> LiveList:
        """The list with nothing dead."""
        return LiveList.of(np.arange(channels), channels)

    @property
    def full(self) -> bool:
        """Whether nothing is dead."""
        return self.count == self.channels

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        found = self._derived.get(key)
        if found is None:
            if len(self._derived) >= _KEPT:
                self._derived.clear()
            with torch.inference_mode(False):  # it outlives the mode it is made in
                found = self._derived[key] = make()
        return found

    def index(self, device: torch.device) -> Tensor:
        """int32 [count] on a device."""
        return self._once(device, lambda: torch.from_numpy(self.host).to(device))

    def rows(self, device: torch.device) -> Tensor:
        """int64 [count] on a device, as torch's own indexing wants it."""
        rows: Tensor = self._once(("rows", device), lambda: torch.from_numpy(self.host).to(device, torch.int64))
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            _captured[rows.data_ptr()] = rows
        return rows

    def mask(self) -> np.ndarray:
        """bool [channels]."""
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
        """Live in either."""
        if other is self:
            return self
        return self._once(("|", other), lambda: LiveList.of(np.union1d(self.host, other.host), self.channels))

    def meet(self, other: LiveList) -> LiveList:
        """Live in both."""
        if other is self:
            return self
        return self._once(("&", other), lambda: LiveList.of(np.intersect1d(self.host, other.host), self.channels))

    def spread(self, size: int) -> LiveList:
        """Of the columns that flattening makes: each channel becomes `size` neighbours."""
        if size == 1:
            return self

        def make() -> LiveList:
            columns = self.host[:, None].astype(np.int64) * size + np.arange(size)
            return LiveList.of(columns.reshape(-1), self.channels * size)

        return self._once(("spread", size), make)

    def pad(self, before: int, after: int) -> LiveList:
        """With dead channels put around."""
        channels = self.channels + before + after
        return self._once(("pad", before, after), lambda: LiveList.of(self.host + before, channels))

    def slice(self, start: int, stop: int) -> tuple[LiveList, int, int]:
        """Of channels start..stop, and which of the compact channels those are: first and count."""

        def make() -> tuple[LiveList, int, int]:
            first, last = np.searchsorted(self.host, (start, stop)).tolist()
            return LiveList.of(self.host[first:last] - start, stop - start), first, last - first

        return self._once(("slice", start, stop), make)

    @staticmethod
    def cat(lists: Sequence[LiveList]) -> LiveList:
        """Of tensors put one after the other along their channels."""

        def make() -> LiveList:
            starts = np.cumsum([0] + [each.channels for each in lists])
            parts = [each.host + start for each, start in zip(lists, starts, strict=False)]
            return LiveList.of(np.concatenate(parts), int(starts[-1]))

        return lists[0]._once(("cat", *lists[1:]), make)

    def __reduce__(self) -> tuple[Any, ...]:
        return LiveList.of, (self.host, self.channels)  # copies and pickles are the interned list too

    def __repr__(self) -> str:
        return f"LiveList({self.count}/{self.channels})"


def _positions(source: LiveList, to: LiveList) -> np.ndarray:
    """int32 [to.count]: where each channel of `to` lies in `source`, -1 where it does not."""
    slot = np.full(source.channels, -1, np.int32)
    slot[source.host] = np.arange(source.count, dtype=np.int32)
    return slot[to.host]
