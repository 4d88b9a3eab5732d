"""Numbers that all ranks of a training agree on, so that a method decides the same on each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..nn.process_groups import world_size

Value = TypeVar("Value")


def mean(scores: dict[str, Tensor], group: Any = None) -> dict[str, Tensor]:
    """The mean of each score over the ranks, by layer name, in float64: the same bits on every rank."""
    if world_size(group) == 1 or not scores:
        return scores
    sums = _reduced(torch.cat([score.double() for score in scores.values()]), group)
    parts = (sums / world_size(group)).split([len(score) for score in scores.values()])
    return dict(zip(scores, parts, strict=True))


def summed(counts: Sequence[int], like: Tensor, group: Any = None) -> list[int]:
    """The sums of some counts over the ranks. like: a tensor on the device that the group communicates from."""
    if world_size(group) == 1:
        return list(counts)
    return _reduced(torch.tensor(counts, dtype=torch.int64, device=like.device), group).tolist()


def largest(count: int, like: Tensor, group: Any = None) -> int:
    """The largest of a count's values on the ranks. like: as in summed."""
    if world_size(group) == 1:
        return count
    return int(_reduced(torch.tensor([count], dtype=torch.int64, device=like.device), group, dist.ReduceOp.MAX))


def of_rank_0(value: Value, group: Any = None) -> Value:
    """Rank 0's value, on all ranks; it is pickled on its way."""
    if world_size(group) == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]


def _reduced(values: Tensor, group: Any, operation: Any = None) -> Tensor:
    """The sum (or another operation) over the ranks of a new tensor, on its own device."""
    moved = values.cpu() if dist.get_backend(group) == "gloo" else values  # gloo takes it from the CPU
    dist.all_reduce(moved, operation or dist.ReduceOp.SUM, group=group)
    return moved.to(values.device)
