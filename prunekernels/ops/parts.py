"""Rows and columns of many tensors at once: into small tensors, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .fallback_parts import ops

Lists = Sequence[Tensor | None]


@torch.no_grad()
def gather_parts(parts: Sequence[Tensor], wholes: Sequence[Tensor], rows: Lists, columns: Lists) -> None:
    """parts[n][i, j] = wholes[n][rows[n][i], columns[n][j]], with all dimensions beyond the second; in place.

    Args:
        parts: tensors to write, each on the device of its whole and of its dtype. In any memory format; a part in that
            of its whole takes least time.
        wholes: tensors of 1 to 5 dimensions, on any devices and of any dtypes.
        rows, columns: int64 tensors on the CPU, whatever the device of the whole. -1: zeros. None: all, in order; the
            columns of a whole of one dimension are None. columns [groups, length]: the rows of a part are in as many
            equal groups, and those of group g take columns[g].
    """
    for at in _by_device(parts):
        ops.gather_parts_(*([values[n] for n in at] for values in (parts, wholes, rows, columns)))


@torch.no_grad()
def scatter_parts(wholes: Sequence[Tensor], parts: Sequence[Tensor], rows: Lists, columns: Lists) -> None:
    """wholes[n][rows[n][i], columns[n][j]] = parts[n][i, j]; -1 is left out, and the rest of wholes stays as it is.

    Of a row or column that a list has twice, either of the two arrives. Arguments as in gather_parts.
    """
    for at in _by_device(wholes):
        ops.scatter_parts_(*([values[n] for n in at] for values in (wholes, parts, rows, columns)))


def _by_device(tensors: Sequence[Tensor]) -> list[list[int]]:
    places: dict[torch.device, list[int]] = {}
    for n, tensor in enumerate(tensors):
        places.setdefault(tensor.device, []).append(n)
    return list(places.values())
