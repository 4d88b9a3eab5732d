"""Groups of processes of torch.distributed, which layers hold and copies of layers share."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn


def world_size(process_group: Any = None) -> int:
    """The number of ranks in a group (None: the default one); 1 where torch.distributed is not initialized."""
    return dist.get_world_size(process_group) if dist.is_available() and dist.is_initialized() else 1


class HeldGroup:
    """A group in a layer's state: copies have the same one, files none."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: Any) -> HeldGroup:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("MaskedSyncBatchNorm: process_group: expected None for a layer that is pickled, got a group, "
                        "which means nothing to other processes: save its state_dict()")  # fmt: skip


def groups_in(module: nn.Module) -> list[Any]:
    """The groups that are attributes of a module."""
    if not dist.is_available():
        return []
    return [value for value in module.__dict__.values() if isinstance(value, dist.ProcessGroup)]
