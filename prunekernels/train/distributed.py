"""A run on several processes (ranks), as torchrun starts them: who they are, and what they tell each other.

    torchrun --nproc-per-node 2 -m prunekernels train --out runs/a

Every rank trains its share of each batch. Rank 0 alone reads and writes the run's folder and prints.
"""

from __future__ import annotations

import datetime
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..nn.process_groups import world_size
from ..optim.live_gradients import LiveGradients, live_gradients_hook

Value = TypeVar("Value")
OF_OTHERS = ("gloo", "NCCL", "c10d", "pair closure", "onnection")  # in errors of collectives


class LostRank(ConnectionError):
    """Another rank is gone, or did not answer in time. The process group is left as it is: its end may wait for it."""


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def local_rank() -> int | None:
    """This process's number on its machine; None where it is the only process."""
    return int(os.environ.get("LOCAL_RANK", rank())) if world_size() > 1 else None


@contextmanager
def joined(device: str | None, timeout: float) -> Iterator[None]:
    """Joins the ranks that torchrun started, for a `with` block; without torchrun, or in a group already, does nothing.

    Args:
        device: The device that was asked for, as in Config.
        timeout: Seconds that a rank waits for the others before its run ends with an error.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == 1 or world_size() > 1:
        yield
        return
    on_cuda = (device or "cuda").startswith("cuda") and torch.cuda.is_available()
    is_lost = False
    try:
        dist.init_process_group("nccl" if on_cuda else "gloo", timeout=datetime.timedelta(seconds=timeout))
        yield
    except RuntimeError as error:
        is_lost = _is_of_others(error)
        if not is_lost:
            raise
        reason = str(error).strip().splitlines()[-1]
        expected = f"rank {os.environ.get('RANK')}: expected all {started} ranks to answer within {timeout:g} s"
        raise LostRank(f"train: {expected}, got: {reason}; start those that are left again with --resume") from error
    finally:
        if not is_lost and dist.is_initialized():
            dist.destroy_process_group()


def _is_of_others(error: RuntimeError) -> bool:
    """Whether an error tells that another rank is gone or late. gloo raises a plain RuntimeError."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in OF_OTHERS)


def from_rank_0(work: Callable[[], Value]) -> Value:
    """What work returns on rank 0, on all ranks; an error of rank 0 is raised on all of them."""
    if world_size() == 1:
        return work()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = work()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def check_same(settings: Mapping[str, Any]) -> None:
    """Raises ValueError on all ranks where one was started with other settings than rank 0, or read other data."""
    if world_size() == 1:
        return
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, dict(settings))
    for other, theirs in enumerate(found):
        for name, value in found[0].items():
            if theirs.get(name) != value:
                got = f"{theirs.get(name)!r} on rank {other}"
                raise ValueError(f"train: {name}: expected {value!r} on all ranks, as on rank 0, got {got}")


def any_rank(holds: bool, device: torch.device) -> bool:
    """Whether something holds on any rank."""
    return bool(summed(torch.tensor(float(holds), device=device)) > 0)


def wrapped(model: nn.Module, *, synchronize: bool = True, live: LiveGradients | None = None) -> nn.Module:
    """The network in DistributedDataParallel, or as it is for one process.

    Buffers stay as they are: masks change alike on all ranks, and statistics of norms become means after each epoch.

    Args:
        model: The network.
        synchronize: Whether all ranks take over the parameters and buffers of rank 0 now.
        live: Sends live gradients alone.
    """
    if world_size() == 1:
        return model
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # from torch 2.13 on
    options: dict[str, Any] = {name: False}
    if "init_sync" in known:
        options["init_sync"] = synchronize
    model = DistributedDataParallel(model, **options)
    if live is not None:
        model.register_comm_hook(live, live_gradients_hook)
    return model


def live_gradients(model: nn.Module, timeout: float) -> LiveGradients | None:
    """What `wrapped` takes, for any number of wrappers of a model; None for one process. Every rank makes one."""
    return None if world_size() == 1 else LiveGradients(model, timeout=timeout)


def average_statistics(model: nn.Module) -> None:
    """Makes the running statistics of norms their means over the ranks, each of which sees its own images."""
    if world_size() == 1:
        return
    statistics = [
        buffer
        for name, buffer in model.named_buffers()
        if name.rpartition(".")[2] in ("running_mean", "running_var") and buffer is not None
    ]
    if statistics:
        means = summed(torch.cat([buffer.double() for buffer in statistics])) / world_size()
        for buffer, mean in zip(statistics, means.split([len(buffer) for buffer in statistics]), strict=True):
            buffer.copy_(mean)


def summed(values: Tensor) -> Tensor:
    """The sum over the ranks."""
    if world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


def share(count: int) -> slice:
    """This rank's part of so many images in a row: parts differ by one at most."""
    ranks, own = world_size(), rank()
    return slice(count * own // ranks, count * (own + 1) // ranks)
