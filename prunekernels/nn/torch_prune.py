"""Takes over what torch.nn.utils.prune did to a layer: whole filters, channels and kernels become masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from .adapted import computes_weight
from .masked_norm import MaskedNorm
from .reparametrized import is_reparametrized

Pruned = dict[str, Tensor]  # "weight", "bias" -> bool mask of its shape, True = kept


def _hooks(layer: nn.Module) -> dict[Any, BasePruningMethod]:
    """The pruning hooks of weight and bias, by their handles' ids."""
    hooks = {key: hook for key, hook in layer._forward_pre_hooks.items() if isinstance(hook, BasePruningMethod)}
    return {key: hook for key, hook in hooks.items() if f"{hook._tensor_name}_orig" in layer._parameters}


@torch.no_grad()
def take_off(layer: nn.Module) -> Pruned:
    """Makes weight and bias parameters again (the same objects), zero where they were pruned; returns the masks.

    A mask with other values than 0 and 1 is no mask: such a tensor stays as it is.
    """
    found: Pruned = {}
    for key, hook in _hooks(layer).items():
        name = hook._tensor_name
        mask = getattr(layer, f"{name}_mask")
        if not bool(((mask == 0) | (mask == 1)).all()):
            continue
        found[name] = mask != 0
        parameter = layer._parameters.pop(f"{name}_orig")
        assert parameter is not None
        parameter.masked_fill_(mask == 0, 0)
        del layer._forward_pre_hooks[key], layer._buffers[f"{name}_mask"]
        layer.__dict__.pop(name, None)  # what the hook computed
        layer._parameters[name] = parameter
    if found:  # the order that a plain layer has, which optimizers and state dicts go by
        first = {name: layer._parameters.pop(name) for name in ("weight", "bias") if name in layer._parameters}
        rest = dict(layer._parameters)
        layer._parameters.clear()
        layer._parameters.update(first | rest)
    return found


@torch.no_grad()
def take_over(layer: Any, pruned: Pruned) -> str:
    """Gives a masked layer the masks that take_off found, as far as it computes the same; says what it could not."""
    if isinstance(layer, MaskedNorm):
        if not layer._each_alone:  # a pruned channel counts in the statistics, a dead one would not
            return _describe({}, sum(int((~mask).sum()) for mask in pruned.values()))
        channels = ~_dead_rows(layer, pruned, layer._channel_count())
        layer.set_mask(layer.channel_mask & channels)
        return _describe({"channels": channels}, _zeros_outside(pruned, channels, channels))
    K, G = layer.out_channels, layer.groups
    if "weight" in pruned:
        pruned = pruned | {"weight": layer.filters_first(pruned["weight"])}
    filters = ~_dead_rows(layer, pruned, K)
    live = torch.ones_like(layer.kernel_mask)
    if "weight" in pruned:
        live = pruned["weight"].reshape(*live.shape, -1).any(2)
    if computes_weight(layer):  # zeros in the weight that it stores are not zeros in the weight that it uses
        live = torch.ones_like(live)
    by_group = live.view(G, K // G, -1).any(1)  # [G, C / groups]
    by_group |= ~by_group.any(1, keepdim=True)  # a group whose filters are all dead reads nothing anyway
    inputs = by_group.repeat_interleave(K // G, 0)  # [K, C / groups]
    kernels = live | ~filters[:, None] | ~inputs
    layer.set_masks(layer.filter_mask & filters, layer.kernel_mask & kernels, layer.input_mask & by_group.flatten())
    counts = {"filters": filters, "input channels": by_group, "kernels": kernels}
    return _describe(counts, _zeros_outside(pruned, live & filters[:, None], filters))


def _dead_rows(layer: Any, pruned: Pruned, count: int) -> Tensor:
    """Bool [count]: filters or channels that give zero, since their weights were pruned and their bias is zero."""
    if "weight" not in pruned or is_reparametrized(layer):
        return torch.zeros(count, dtype=torch.bool, device=layer._device_of_parameters())
    dead = ~pruned["weight"].reshape(count, -1).any(1)
    if computes_weight(layer):
        dead = dead & ~layer._computed_weight().flatten(1).any(1)
    return dead if layer.bias is None else dead & (layer.bias == 0)


def _zeros_outside(pruned: Pruned, live: Tensor, rows: Tensor) -> int:
    """How many pruned entries no mask drops: those in kernels or channels `live`, and those of biases in `rows`."""
    found = 0
    if "weight" in pruned:
        weight = pruned["weight"]
        found += int((~weight & live.view(*live.shape, *[1] * (weight.dim() - live.dim()))).sum())
    if "bias" in pruned:
        found += int((~pruned["bias"] & rows).sum())
    return found


def _describe(masks: dict[str, Tensor], zeros: int) -> str:
    parts = [f"{int((~mask).sum())} {what}" for what, mask in masks.items() if not bool(mask.all())]
    text = f"dead: {', '.join(parts)}" if parts else "no mask"
    return f"{text}; {zeros} entries that no mask can drop stay as zeros, and train" if zeros else text
