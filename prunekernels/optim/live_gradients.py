"""live_gradients_hook: a communication hook of DistributedDataParallel that leaves out what masks make zero."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..nn.masked_filters import MaskedFilters
from ..nn.masked_norm import MaskedNorm
from ..nn.process_groups import world_size
from ..nn.ranks import check_same_masks, digest, equal_on_all_ranks
from .bucket_parts import BucketParts
from .dead_rows import DeadRows

TIMEOUT = 600.0  # seconds


class LiveGradients:
    """What `live_gradients_hook` knows of a network: its masks, and what it has sent. Every rank makes one.

    Args:
        model: The network with its masked layers, or the `DistributedDataParallel` around it.
        process_group: That of the `DistributedDataParallel`. None: the default group.
        timeout: When masks have changed, ranks tell each other which ones they have: seconds that a rank waits for the
            others then.

    Attributes:
        sent_bytes: What this rank gave to all_reduce in the last backward pass.
        full_bytes: What it would have been without the hook.

    Examples:
        >>> net = torch.nn.Sequential(pk.MaskedConv2d(3, 8, 3))
        >>> net[0].set_masks(filter=torch.arange(8) > 3)
        >>> state = pk.LiveGradients(net)
        >>> # ddp = DistributedDataParallel(net)
        >>> # ddp.register_comm_hook(state, pk.live_gradients_hook)
        >>> state
        LiveGradients(live=112/224)
    """

    def __init__(self, model: nn.Module, process_group: Any = None, timeout: float = TIMEOUT) -> None:
        self._model, self._group = model, process_group
        self._rows = DeadRows([m for m in model.modules() if isinstance(m, (MaskedFilters, MaskedNorm))], "dead")
        self._control = _control_group(process_group, timeout)
        self._tables: Mapping[Tensor, Tensor] = {}  # by parameter, as of the last look
        self._digest: int | None = None  # of the tables that all ranks have
        self._parts: dict[tuple[int, ...], BucketParts] = {}  # by the ids of a bucket's parameters
        self.sent_bytes = self.full_bytes = 0

    def _look(self) -> None:
        """Reads the masks; where they have changed, all ranks make sure that they have the same ones."""
        tables = self._rows.tables()
        if tables is not self._tables:
            of_parameters = [tables.get(p) for p in _parameters_of_one_layer(self._model)]
            number = digest(b"" if table is None else table.cpu().numpy().tobytes() for table in of_parameters)
            if number != self._digest:
                self._agree(number)
                self._parts.clear()
            self._tables, self._digest = tables, number

    def _agree(self, number: int) -> None:
        """Raises on all ranks where one has other masks, on this one where another has not changed its masks."""
        if self._control is None:
            return
        try:
            is_equal = equal_on_all_ranks(number, torch.device("cpu"), self._control)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise RuntimeError(
                "live_gradients_hook: expected all ranks to change their masks before the same step, as this one "
                f"(rank {dist.get_rank()}) did, got: {reason}"
            ) from error
        if not is_equal:
            check_same_masks(self._model, self._control)
            raise ValueError(
                "live_gradients_hook: expected all ranks to have the same masks and weight_grad, got equal masks, but "
                "another weight_grad on some of them"
            )

    def _parts_of(self, bucket: dist.GradBucket) -> BucketParts | None:
        """None: the bucket is sent whole."""
        parameters = bucket.parameters()
        key = tuple(map(id, parameters))
        if key not in self._parts:
            self._parts[key] = self._parts_with(parameters, self._tables)
        parts = self._parts[key]
        return parts if parts.is_worth_it else None

    @torch.no_grad()
    def _send(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        full = bucket.buffer()
        if bucket.index() == 0:
            self.sent_bytes = self.full_bytes = 0
            self._look()
        parts = self._parts_of(bucket) if full.layout == torch.strided else None
        sent = full if parts is None else parts.pack(full)
        self.sent_bytes += sent.numel() * sent.element_size()
        self.full_bytes += full.numel() * full.element_size()

        def received(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            mean = future.value()[0]
            return mean if parts is None else parts.unpack(mean, full)

        work = dist.all_reduce(sent.div_(world_size(self._group)), group=self._group, async_op=True)
        return work.get_future().then(received)

    def _parts_with(self, parameters: Sequence[Tensor], tables: Mapping[Tensor, Tensor]) -> BucketParts:
        unshared = set(_parameters_of_one_layer(self._model))
        return BucketParts(parameters, {p: tables[p] for p in parameters if p in tables and p in unshared})

    def __repr__(self) -> str:
        parameters = list(self._model.parameters())
        live = self._parts_with(parameters, self._rows.tables()).count
        return f"LiveGradients(live={live}/{sum(p.numel() for p in parameters)})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_group": None, "_control": None}  # a DDP module is pickled without its groups


def live_gradients_hook(state: LiveGradients, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Averages gradients over the ranks as DistributedDataParallel does, and sends those of live entries alone.

    Dead filters, input channels and kernels, their biases and the dead channels of norms are zero afterwards, whatever
    the loss adds to them. Soft-dead filters that learn (`weight_grad` "dense") are sent. Register it before the first
    backward pass.

    Args:
        state: A `LiveGradients` of the network.
        bucket: Gradients of some parameters, from DistributedDataParallel.

    Returns:
        A future of the bucket's gradients. Where ranks have different masks it raises ValueError on all of them, and
        where only some have changed theirs RuntimeError on those, after the `timeout` of state.

    Examples:
        >>> net = torch.nn.Sequential(pk.MaskedConv2d(3, 8, 3))
        >>> # ddp = DistributedDataParallel(net)
        >>> # ddp.register_comm_hook(pk.LiveGradients(net), pk.live_gradients_hook)
    """
    return state._send(bucket)


live_gradients_hook.__annotations__ = {}  # DDP compares them with classes; here they are strings


def _control_group(process_group: Any, timeout: float) -> Any:
    """A group for a few bytes from CPU to CPU, which cannot be taken for a bucket of a rank that goes on."""
    if world_size(process_group) == 1:
        return None
    given: dict[str, Any] = {}
    if process_group is not None:
        given = {"ranks": dist.get_process_group_ranks(process_group), "use_local_synchronization": True}
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout), **given)


def _parameters_of_one_layer(model: nn.Module) -> list[Tensor]:
    """The parameters that no two modules share: what is dead in one of two may be live in the other."""
    owners: dict[Tensor, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[parameter] = owners.get(parameter, 0) + 1
    return [parameter for parameter, count in owners.items() if count == 1]
