"""evaluating: a block in which a network is tried under other masks, and after which it is as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .. import plan
from ..nn.mask_buffers import MaskBuffers
from ..nn.masked_filters import MaskedFilters
from ..nn.masked_norm import MaskedNorm


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and live mode inside the block; afterwards masks, modes and training flags are as before.

    Plans are chosen by cost, not by time: a mask is tried too few times to be worth timing plans for.
    """
    training = {module: module.training for module in model.modules()}
    layers = {m: (m._flow, _masks_of(m)) for m in model.modules() if isinstance(m, MaskBuffers)}
    model.eval()
    try:
        for layer in layers:
            layer._flow = True
        with torch.no_grad(), plan.measure(False):
            yield
    finally:
        for layer, (is_live, masks) in layers.items():
            layer._flow = is_live
            if isinstance(layer, MaskedFilters):
                layer.set_masks(**masks)
            elif isinstance(layer, MaskedNorm):
                layer.set_mask(**masks)
        for module, mode in training.items():
            module.training = mode


def _masks_of(layer: MaskBuffers) -> dict[str, Tensor]:
    """The masks that a trial changes, by the names that set them."""
    kinds = ("filter", "hard", "input") if isinstance(layer, MaskedFilters) else ("channel",)
    return {kind: getattr(layer, f"{kind}_mask").clone() for kind in kinds}
