"""check_same_masks: whether all processes (ranks) of a training have the same masks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .lost_masks import check_no_mask_lost
from .mask_buffers import MaskBuffers
from .process_groups import world_size


def check_same_masks(model: nn.Module, process_group: Any = None) -> int:
    """Compares the masks of a model over all ranks, by a hash of 16 bytes. Every rank calls it.

    Args:
        model: A network with masked layers.
        process_group: As in `torch.distributed`. None: the default group.

    Returns:
        The number of ranks that were compared; 1 where `torch.distributed` is not initialized. Masks that differ raise
        ValueError on all ranks, with the name of the first layer that differs.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
        >>> report = pk.convert(model)
        >>> f"masks equal on all {pk.check_same_masks(model)} ranks"
        'masks equal on all 1 ranks'
    """
    check_no_mask_lost("check_same_masks", model)
    ranks = world_size(process_group)
    if ranks == 1:
        return 1
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MaskBuffers)}
    own = {name: _hash(layer) for name, layer in layers.items()}
    device = next((mask.device for layer in layers.values() for mask in layer._masks.values()), torch.device("cpu"))
    if equal_on_all_ranks(
        digest(f"{name} {of_layer}".encode() for name, of_layer in own.items()), device, process_group
    ):
        return ranks
    found: list[dict[str, str]] = [{}] * ranks
    dist.all_gather_object(found, own, group=process_group)
    for rank, hashes in enumerate(found):
        for name in dict.fromkeys((*found[0], *hashes)):
            if found[0].get(name) != hashes.get(name):
                raise ValueError(
                    f"check_same_masks: {name or 'model'}: expected the masks of rank 0 on all {ranks} ranks, got "
                    f"others on rank {rank}: change masks alike on all ranks"
                )
    return ranks


def digest(parts: Iterable[bytes]) -> int:
    """63 bits of some parts and of where each begins."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(found.digest()[:8], "little") >> 1


def equal_on_all_ranks(number: int, device: torch.device, process_group: Any = None) -> bool:
    """Whether all ranks have the same number, by one all_reduce of 16 bytes. device: that of the network."""
    on_cpu = dist.get_backend(process_group) == "gloo"
    both = torch.tensor([number, -number], device="cpu" if on_cpu else device)  # the largest, and minus the smallest
    dist.all_reduce(both, dist.ReduceOp.MAX, group=process_group)
    return bool(both[0] == -both[1])


def _hash(layer: MaskBuffers) -> str:
    """Of all masks of a layer."""
    masks = b"".join(getattr(layer, name).cpu().numpy().tobytes() for name in layer._mask_names)
    return hashlib.sha256(masks).hexdigest()
