"""Masks under DistributedDataParallel, which broadcasts buffers before each forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def watch_broadcasts() -> None:
    """Within a forward pass of DDP: watches its network from now on. Layers call it."""
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is not None and not any(isinstance(hook, BroadcastWatch) for hook in ddp.module._forward_pre_hooks.values()):
        ddp.module.register_forward_pre_hook(BroadcastWatch(ddp.module))


def _broadcasting() -> Any:
    """The DDP module whose forward pass this is, if it broadcasts buffers."""
    ddp = DistributedDataParallel._active_ddp_module
    return ddp if ddp is not None and ddp.broadcast_buffers else None


class BroadcastWatch:
    """A forward pre-hook on the network that DDP wraps: finds the masks that a broadcast has changed.

    DDP writes buffers, when it is made and maybe before each step, without counting it as an edit. One comparison a
    step tells, for all layers together; only layers whose masks differ read them anew.
    """

    def __init__(self, network: nn.Module) -> None:
        self._masks: list[Tensor] = []  # of all layers, as of the last look
        self._look(network)

    def __call__(self, network: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and _broadcasting() is not None:
            self._look(network)

    @torch.no_grad()
    def _look(self, network: nn.Module) -> None:
        layers = [module for module in network.modules() if getattr(module, "_mask_names", ())]
        masks = [[layer._buffers[name] for name in layer._mask_names] for layer in layers]  # type: ignore[union-attr]
        flat: list[Tensor] = [mask.flatten() for of_layer in masks for mask in of_layer]  # type: ignore[union-attr]
        if len(self._masks) == len(flat) and _equal(self._masks, flat):
            return
        before = self._masks if len(self._masks) == len(flat) else [mask.new_empty(0) for mask in flat]
        self._masks = [mask.clone() for mask in flat]
        first = 0
        for layer, of_layer in zip(layers, masks, strict=True):
            last = first + len(of_layer)
            if not all(map(torch.equal, before[first:last], flat[first:last])):
                for mask in of_layer:
                    mask.copy_(mask.clone())  # type: ignore[union-attr]  # counts as an edit: optimizers look for it
                layer._refresh()  # type: ignore[operator]
            first = last


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two lists of masks are equal. On a GPU the host waits once, if all are on the same one."""
    if len({mask.device for mask in (*a, *b)}) > 1:
        return all(x.device == y.device and torch.equal(x, y) for x, y in zip(a, b, strict=True))
    return not a or torch.equal(torch.cat(a), torch.cat(b))
