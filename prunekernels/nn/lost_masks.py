"""Notices masked norms in whose place torch has put others: nn.SyncBatchNorm.convert_sync_batchnorm makes new layers.

Those have the parameters and statistics of the masked ones, by which they are known.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_KNOWN = ("weight", "running_mean")  # a norm without factors has statistics, or nothing to be known by
_masks: Any = WeakTensorKeyDictionary()  # by tensor of a masked norm, the layer's own dictionary: restore empties it


def remember_masks(layer: Any) -> None:
    """Notes that the tensors of a norm are those of a masked one."""
    for tensor in _tensors(layer):
        if not _masks.get(tensor):
            _masks[tensor] = layer._masks


def lost_mask(module: nn.Module) -> Tensor | None:
    """The channel mask of the masked norm that this norm has replaced; None: it has replaced none."""
    if not isinstance(module, nn.SyncBatchNorm) or hasattr(module, "channel_mask"):
        return None
    return next((masks["channel_mask"] for t in _tensors(module) if (masks := _masks.get(t))), None)


def check_no_mask_lost(op: str, model: nn.Module) -> None:
    """Raises ValueError where torch has replaced a masked norm."""
    for name, module in model.named_modules():
        if lost_mask(module) is not None:
            raise ValueError(
                f"{op}: {name or 'model'}: expected the masked norm that was there, got {type(module).__name__}, which "
                "torch's convert_sync_batchnorm has put in its place: pk.convert_sync_batchnorm(model) keeps masks, "
                "and pk.convert(model) gives this layer its mask back"
            )


def _tensors(norm: nn.Module) -> list[Tensor]:
    found = [norm._parameters.get(name, norm._buffers.get(name)) for name in _KNOWN]
    return [tensor for tensor in found if tensor is not None]
