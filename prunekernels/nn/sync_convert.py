"""convert_sync_batchnorm: as torch's function of that name, for networks with masked norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .adapted import plain_adapter
from .batch_norm import MaskedBatchNorm2d
from .lost_masks import lost_mask
from .masked_norm import MaskedNorm
from .reparametrized import layer_class, set_layer_class
from .sync_batch_norm import MaskedSyncBatchNorm


def convert_sync_batchnorm(model: nn.Module, process_group: Any = None) -> nn.Module:
    """Makes batch norms share statistics among processes, as `nn.SyncBatchNorm.convert_sync_batchnorm` does.

    Masked norms become `MaskedSyncBatchNorm`, in place, with the masks that they have. torch's own function puts an
    unmasked norm in the place of each. Batch norms without masks become `nn.SyncBatchNorm`, which are new modules with
    the same parameters. An error changes nothing.

    Args:
        model: A network, with masked layers or without.
        process_group: The processes that share statistics; None: all of them.

    Returns:
        The same network; a new layer, if model is itself a batch norm without masks.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> report = pk.convert(model)
        >>> model[1].set_mask(torch.arange(8) > 3)
        >>> type(pk.convert_sync_batchnorm(model)[1]).__name__, model[1].channel_mask.sum().item()
        ('MaskedSyncBatchNorm', 4)
    """
    for name, module in model.named_modules():
        _check(name, module)
    for module in model.modules():
        if isinstance(module, MaskedBatchNorm2d):
            if not isinstance(module, MaskedSyncBatchNorm):
                set_layer_class(module, MaskedSyncBatchNorm)
            module.process_group = process_group  # type: ignore[assignment]
    return _plain_ones(model, process_group, {})


def _check(name: str, module: nn.Module) -> None:
    op = f"convert_sync_batchnorm: {name or 'model'}"
    if lost_mask(module) is not None:
        raise ValueError(f"{op}: expected the masked norm that was there, got the layer that torch's function has put "
                         "in its place: call pk.convert(model), which gives its mask back")  # fmt: skip
    cls = layer_class(module)
    if isinstance(module, MaskedBatchNorm2d) and not isinstance(module, MaskedSyncBatchNorm):
        if cls is not MaskedBatchNorm2d and not plain_adapter(cls):
            raise ValueError(f"{op}: expected a norm that computes what nn.BatchNorm2d does, got {cls.__name__}: make "
                             "it a synchronized one before pk.convert, as timm.layers.convert_sync_batchnorm "
                             "does")  # fmt: skip


def _plain_ones(module: nn.Module, group: Any, known: dict[int, nn.Module]) -> nn.Module:
    """The module with torch's layers in place of its batch norms without masks."""
    if isinstance(module, MaskedNorm):
        return module
    if isinstance(module, _BatchNorm):
        if id(module) not in known:
            known[id(module)] = torch.nn.SyncBatchNorm.convert_sync_batchnorm(module, group)
        return known[id(module)]
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = _plain_ones(child, group, known)
    return module
