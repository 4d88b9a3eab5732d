"""What a rank does for wire.py: steps of a network in DistributedDataParallel, in each form, and what they send."""

from __future__ import annotations

import io
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import prunekernels as pk
from harness.ranks import Meter
from networks.models import NETWORKS, apply, draw, wires
from prunekernels.nn.masked_filters import MaskedFilters

FORMS = ("ddp", "hook", "compacted")
IMAGE, BATCH = 32, 2  # bytes do not depend on them


class Steps:
    """Training steps of a network in DDP, and the gradient that this rank gives to all_reduce in each."""

    def __init__(self, net: nn.Module, classes: int, hook: bool = False, **options: Any) -> None:
        given: dict[str, Any] = {"broadcast_buffers": False, "init_sync": False} | options
        with warnings.catch_warnings():  # broadcast_buffers has another name from torch 2.13 on
            warnings.simplefilter("ignore", FutureWarning)
            self.model = DistributedDataParallel(net, **given)
        self.state = pk.LiveGradients(net) if hook else None
        self.counted = 0
        self.model.register_comm_hook(self, self.count if self.state is None else self.live)
        generator = torch.Generator().manual_seed(dist.get_rank())
        self.images = torch.randn(BATCH, 3, IMAGE, IMAGE, generator=generator)
        self.labels = torch.randint(classes, (BATCH,), generator=generator)

    @staticmethod
    def count(self: Any, bucket):  # type: ignore[no-untyped-def]
        self.counted += bucket.buffer().nbytes
        return allreduce_hook(dist.group.WORLD, bucket)

    @staticmethod
    def live(self: Any, bucket):  # type: ignore[no-untyped-def]
        return pk.live_gradients_hook(self.state, bucket)

    def forward(self) -> None:
        self.loss = F.cross_entropy(self.model(self.images), self.labels)

    def step(self) -> None:
        self.counted = 0
        self.model.zero_grad()
        self.forward()
        self.loss.backward()

    @property
    def gradient_bytes(self) -> int:
        return self.counted if self.state is None else self.state.sent_bytes


class Masked:
    """A network with masks of joint filters, also of what its classifier reads."""

    def __init__(self, name: str, keep_ratio: float) -> None:
        network = NETWORKS[name]
        self.classes, self.keep_ratio = network.classes, keep_ratio
        torch.manual_seed(0)
        self.net = network.build()
        for module in self.net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0  # statistics of so few pixels would make the numbers of inference overflow
        self.wires = wires(self.net)
        pk.convert(self.net, linears=True)
        self.set_masks(0)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-3, momentum=0.9)

    def set_masks(self, seed: int) -> None:
        live = draw(self.wires, "joint", self.keep_ratio, seed)
        apply(self.net, self.wires, live, "cpu")
        self.net.classifier.set_masks(input=live.features)  # type: ignore[operator,union-attr]


def measured(meter: Meter, name: str, keep_ratio: float) -> list[dict[str, Any]]:
    """A row of each form: bytes of a step and of a change of masks, per rank, and of files."""
    masked = Masked(name, keep_ratio)
    rows = [_masked_row(meter, masked, form) for form in ("ddp", "hook")]
    masked.optimizer.step()
    layers = [layer for layer in masked.net.modules() if isinstance(layer, MaskedFilters)]
    alike = {
        "checkpoint_bytes": _file_size(masked.net.state_dict(), masked.optimizer.state_dict()),
        "filters": sum(layer.out_channels for layer in layers),
        "check_bytes": meter(lambda: pk.check_same_masks(masked.net)),
    }
    return [row | alike for row in (*rows, _compacted_row(meter, masked))]


def _masked_row(meter: Meter, masked: Masked, form: str) -> dict[str, Any]:
    steps = Steps(masked.net, masked.classes, hook=form == "hook")
    steps.step()
    steps.step()  # with the buckets for good
    row = _row(meter, steps, form)
    if steps.state is None:
        whole = Steps(masked.net, masked.classes, broadcast_buffers=True)
        whole.step()
        return row | {"buffer_wire_bytes": _less(meter(whole.step), row["wire_bytes"])}
    masked.set_masks(1)
    return row | {"change_bytes": meter(steps.state._look)}


def _compacted_row(meter: Meter, masked: Masked) -> dict[str, Any]:
    with pk.compacted(masked.net, torch.randn(BATCH, 3, IMAGE, IMAGE), masked.optimizer) as (small, _):
        made: list[Steps] = []
        wrapping = meter(lambda: made.append(Steps(small, masked.classes)))
        steps = made[0]
        steps.step()
        buckets = meter(steps.forward)  # which DDP makes anew in the order of the first backward pass
        row = _row(meter, steps, "compacted") | {"small_bytes": _file_size(small.state_dict())}
        return row | {"change_bytes": None if wrapping is None or buckets is None else wrapping + buckets}


def _row(meter: Meter, steps: Steps, form: str) -> dict[str, Any]:
    return {"form": form, "wire_bytes": meter(steps.step), "gradient_bytes": steps.gradient_bytes,
            "buffer_bytes": sum(buffer.nbytes for buffer in steps.model.buffers()), "buffer_wire_bytes": None,
            "change_bytes": None}  # fmt: skip


def _less(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _file_size(*state: Any) -> int:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getbuffer().nbytes
