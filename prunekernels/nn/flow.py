"""flow: switches live mode on or off."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..live.tensor import full_width
from .mask_buffers import MaskBuffers


def _result_to_dense(module: nn.Module, args: Any, result: Any) -> Any:
    return full_width(result)


def flow(model: nn.Module, enabled: bool = True) -> nn.Module:
    """Switches live mode on or off, in place. The numbers are the same either way.

    In live mode masked convolutions and norms pass on the live channels alone, as live tensors, so dead channels cost
    nothing between the layers either. An operation that has a rule computes the live channels alone; any other gets
    the full-width tensor (`prunekernels.explain` lists those), and so does the caller of `model`. Under
    `torch.compile` the layers stay in masked mode: full-width tensors between them, work skipped inside.

    Args:
        model: A network with masked layers (see `convert`).
        enabled: True for live mode, False for masked mode.

    Returns:
        The same model.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
        >>> report = pk.convert(model)
        >>> model[0].set_masks(filter=torch.arange(8) > 3)
        >>> model[1].set_mask(torch.arange(8) > 3)
        >>> x = torch.randn(2, 3, 6, 6)
        >>> y = model(x)
        >>> torch.allclose(pk.flow(model)(x), y, atol=1e-6)
        True
    """
    if not isinstance(enabled, bool):
        raise ValueError(f"flow: enabled: expected True or False, got {enabled!r}")
    masked = [module for module in model.modules() if isinstance(module, MaskBuffers)]
    if enabled and not masked:
        raise ValueError(f"flow: model: expected masked layers, got none in {type(model).__name__}: see pk.convert")
    for module in masked:
        module._flow = enabled
    for part in model.modules():  # a part that was switched on by itself no longer has a caller outside of this model
        for key in [key for key, hook in part._forward_hooks.items() if hook is _result_to_dense]:
            del part._forward_hooks[key]
    if enabled:
        model.register_forward_hook(_result_to_dense)
    return model
