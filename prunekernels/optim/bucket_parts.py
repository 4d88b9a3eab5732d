"""BucketParts: where the live entries of a bucket of gradients are; packs them into a row and brings them back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import mask_table

WORTH = 1 / 32  # the share of a bucket that has to be dead: packing reads and writes all that is live twice
OF_A_KERNEL = 4  # entries, for kernels to be told apart one by one: an index has two numbers of 64 bits


class _Part(NamedTuple):
    """A parameter in a bucket."""

    shape: torch.Size
    stride: tuple[int, ...]
    start: int  # in the bucket
    at: tuple[Tensor, ...] | None  # the index of what is live, for its first dimensions; None: all of it
    packed: torch.Size  # the shape of what is live


class BucketParts:
    """Where the live entries of these parameters are in a row of them.

    Args:
        parameters: In the order in which they lie in the bucket, each in its own memory format.
        tables: The mask table of those that have something dead.

    Attributes:
        count: How many entries are live.
    """

    def __init__(self, parameters: Sequence[Tensor], tables: Mapping[Tensor, Tensor]) -> None:
        self._kept_alive = parameters  # so that their ids stay theirs
        self._parts: list[_Part] = []
        start = 0
        for parameter in parameters:
            index = _live_index(parameter, tables[parameter]) if parameter in tables else None
            self._parts.append(_Part(parameter.shape, _stride(parameter), start, index, _packed(parameter, index)))
            start += parameter.numel()
        self._counts = [part.packed.numel() for part in self._parts]
        self.count, self._full = sum(self._counts), start

    @property
    def is_worth_it(self) -> bool:
        return self._full - self.count > WORTH * self._full

    def _views(self, packed: Tensor, bucket: Tensor) -> list[tuple[_Part, Tensor, Tensor]]:
        """Each parameter's place in a row of live entries, and in the bucket."""
        places = [piece.view(part.packed) for part, piece in zip(self._parts, packed.split(self._counts), strict=True)]
        offset = bucket.storage_offset()
        views = [bucket.as_strided(part.shape, part.stride, offset + part.start) for part in self._parts]
        return list(zip(self._parts, places, views, strict=True))

    def pack(self, bucket: Tensor) -> Tensor:
        """The live entries of a bucket in a row."""
        packed = bucket.new_empty(self.count)
        for part, place, view in self._views(packed, bucket):
            if part.at is None:
                place.copy_(view)
            elif len(part.at) == 1:
                torch.index_select(view, 0, part.at[0], out=place)
            elif part.at[0].dim() == 2:  # rows and columns: faster one after the other
                torch.index_select(view.index_select(0, part.at[0].flatten()), 1, part.at[1], out=place)
            else:
                place.copy_(view[part.at])
        return packed

    def unpack(self, packed: Tensor, bucket: Tensor) -> Tensor:
        """Brings them back into the bucket, and writes zeros beside them."""
        bucket.zero_()
        for part, place, view in self._views(packed, bucket):
            if part.at is None:
                view.copy_(place)
            elif len(part.at) == 1:
                view.index_copy_(0, part.at[0], place)
            else:
                view.index_put_(part.at, place)
        return bucket


def _stride(parameter: Tensor) -> tuple[int, ...]:
    """That of its gradient in a bucket: DDP keeps a memory format that leaves no gaps."""
    if torch.ops.aten.is_non_overlapping_and_dense(parameter):
        return parameter.stride()
    return torch.empty(parameter.shape, device="meta").stride()


def _packed(parameter: Tensor, index: tuple[Tensor, ...] | None) -> torch.Size:
    if index is None:
        return parameter.shape
    return torch.Size((*torch.broadcast_shapes(*(each.shape for each in index)), *parameter.shape[len(index) :]))


def _live_index(parameter: Tensor, table: Tensor) -> tuple[Tensor, ...] | None:
    """What to index a parameter with for its live entries; None: all are live.

    Rows; rows and columns, where they tell all; else kernel by kernel, where those are large enough.
    """
    K, C, G = table[1:4].tolist()  # the header of the table, as it is stored for this parameter
    if parameter.dim() == 1:
        rows = mask_table.live_filters(table, K)
        return None if bool(rows.all()) else (rows.nonzero().flatten(),)
    kernels = mask_table.live_kernels(table, K, C, C // G)
    rows, columns = kernels.any(1), kernels.any(0)
    if int(kernels.sum()) < int(rows.sum()) * int(columns.sum()) and parameter[0, 0].numel() >= OF_A_KERNEL:
        return tuple(kernels.nonzero().T.contiguous())
    if bool(columns.all()):
        return None if bool(rows.all()) else (rows.nonzero().flatten(),)
    return rows.nonzero(), columns.nonzero().flatten()
