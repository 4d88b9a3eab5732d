"""Layers whose weight is computed before they read it: by torch.nn.utils.parametrize, or the older forms, hooks."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .process_groups import groups_in

Model = TypeVar("Model", bound=nn.Module)
_SERVED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm)
_NOT_COPIED = ("__dict__", "__weakref__", "__doc__", "__module__")


def is_reparametrized(layer: nn.Module) -> bool:
    """Whether weight or bias of a convolution or norm is computed from other tensors."""
    return any(name not in layer._parameters and name not in layer._buffers for name in ("weight", "bias"))


def layer_class(layer: nn.Module) -> type[nn.Module]:
    """The class of a layer, without the one that torch.nn.utils.parametrize puts above it."""
    return parametrize.type_before_parametrizations(layer)


def set_layer_class(layer: nn.Module, cls: type[nn.Module]) -> None:
    """Changes the class of a layer and leaves its parametrizations in place."""
    if parametrize.is_parametrized(layer):
        own = {name: value for name, value in vars(type(layer)).items() if name not in _NOT_COPIED}
        cls = type(f"Parametrized{cls.__name__}", (cls,), own)  # one for each layer, as torch makes them
    layer.__class__ = cls


def remove_reparametrization(op: str, name: str, layer: nn.Module) -> None:
    """Makes weight and bias parameters that hold what they were computed to be; name: of the layer, for errors."""
    set_layer_class(layer, layer_class(layer))  # torch takes the weight off the class, which a deep copy shares
    with torch.enable_grad():  # without it torch would make them buffers
        for tensor in list(layer.parametrizations) if parametrize.is_parametrized(layer) else ():  # type: ignore[arg-type]
            parametrize.remove_parametrizations(layer, tensor, leave_parametrized=True)
        for hook in list(layer._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(layer, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(layer, hook.name)
            elif isinstance(hook, prune.BasePruningMethod):
                prune.remove(layer, hook._tensor_name)
    if isinstance(layer, _SERVED) and is_reparametrized(layer):
        raise ValueError(f"{op}: {name}: expected a weight and a bias that are parameters, or that torch.nn.utils "
                         "computes, got others: make them parameters first")  # fmt: skip


def has_reparametrization(layer: nn.Module) -> bool:
    """Whether `remove_reparametrization` has something to do, for any module."""
    known = (WeightNorm, SpectralNorm, prune.BasePruningMethod)
    return parametrize.is_parametrized(layer) or any(isinstance(h, known) for h in layer._forward_pre_hooks.values())


def deep_copy(model: Model, memo: dict[int, Any] | None = None) -> Model:
    """copy.deepcopy of a network, also of what deepcopy refuses: tensors with an autograd history that hooks have left,
    and groups of processes, which stay the same ones.

    memo: by id, what stands in the copy for an object.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
        for group in groups_in(module):
            memo.setdefault(id(group), group)
    return copy.deepcopy(model, memo)
