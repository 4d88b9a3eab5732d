"""is_split and check_whole: refuse weights of which each process has but a part, as under FSDP."""

from __future__ import annotations

import sys

from torch import Tensor, nn
from torch.nn.utils import parametrize


def is_split(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, as fully_shard makes them."""
    distributed = sys.modules.get("torch.distributed.tensor")  # not loaded: there are none
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def check_whole(op: str, name: str, layer: nn.Module, weight: Tensor | None = None) -> None:
    """Raises ValueError where a masked layer's weight (None: its own) is split over ranks.

    Within a forward pass FSDP puts the whole weight there, so the layers themselves work. fully_shard leaves a DTensor
    outside of it, FullyShardedDataParallel a flat tensor.
    """
    computed = weight is None and parametrize.is_parametrized(layer, "weight")  # reading it would compute it
    weight = layer.weight if weight is None and not computed else weight  # type: ignore[assignment]
    if weight is None and not computed:
        return
    shape = layer._weight_shape() if hasattr(layer, "_weight_shape") else (layer._channel_count(),)  # type: ignore
    tensors = list(layer.parameters()) if weight is None else [weight]
    if any(map(is_split, tensors)) or (weight is not None and weight.shape != shape):
        raise ValueError(
            f"{op}: {name}: expected its whole weight on each rank, got one that FSDP has split: use "
            "DistributedDataParallel, or give fully_shard the parameters of masked layers as ignored_params, and "
            "average their gradients over the ranks"
        )
