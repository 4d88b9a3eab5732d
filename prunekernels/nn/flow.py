"""pk.flow: the network gear on or off."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..live.tensor import full_width
from .mask_buffers import MaskBuffers


def _widen_result(module: nn.Module, args: Any, result: Any) -> Any:
    return full_width(result)


def flow(model: nn.Module, enabled: bool = True) -> nn.Module:
    """Network gear on or off, in place: same numbers either way, and what is dead costs nothing between layers either.

    Masked convolutions and norms then hand on the live channels alone (live tensors), and every operation that has a
    rule computes only those; any other gets the full-width tensor (pk.explain names it), and so does the caller of
    `model`. Needs masked layers (pk.convert). Under torch.compile layers stay in the layer gear.
    """
    if not isinstance(enabled, bool):
        raise ValueError(f"flow: enabled: expected True or False, got {enabled!r}")
    masked = [module for module in model.modules() if isinstance(module, MaskBuffers)]
    if enabled and not masked:
        raise ValueError(f"flow: model: expected masked layers, got none in {type(model).__name__}: see pk.convert")
    for module in masked:
        module._flow = enabled
    for part in model.modules():  # inside this model none of them has a caller of its own any more
        for key in [key for key, hook in part._forward_hooks.items() if hook is _widen_result]:
            del part._forward_hooks[key]
    if enabled:
        model.register_forward_hook(_widen_result)
    return model
