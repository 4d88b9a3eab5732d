"""What the masks alone say about layers, whatever their weights are and wherever the network uses them."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from ..nn.mask_buffers import MaskBuffers
from ..nn.masked_filters import MaskedFilters
from ..nn.masked_norm import MaskedNorm
from ..nn.reparametrized import deep_copy
from .analysis import ChannelAnalysis
from .channels import Channels
from .rules.layers import ConvRule, LayerRule, LinearRule, WeightRule
from .trace import Traced, make_plain


def any_weights(model: nn.Module, traced: Traced, all_dead: bool = False) -> dict[str, Tensor]:
    """The tensors of a traced network, with NaN for "any value" and zero where the masks of model make zeros.

    all_dead: every filter of a masked convolution and every channel of a masked norm counts as dead.
    """
    blank = deep_copy(model)
    with torch.no_grad():
        for module in blank.modules():
            masks = module._mask_names if isinstance(module, MaskBuffers) else ()
            buffers = [buffer for name, buffer in module._buffers.items() if name not in masks]
            for tensor in (*module._parameters.values(), *buffers):
                if tensor is not None and tensor.is_floating_point():
                    tensor.fill_(torch.nan)
        for module in blank.modules() if all_dead else ():
            if isinstance(module, MaskedFilters):
                module.set_masks(filter=torch.zeros_like(module.filter_mask))
            elif isinstance(module, MaskedNorm):
                module.set_mask(torch.zeros_like(module.channel_mask))
    make_plain(blank)
    named = dict(blank.named_buffers(remove_duplicate=False)) | dict(blank.named_parameters(remove_duplicate=False))
    return {name: named.get(name, tensor) for name, tensor in traced.tensors.items()}


def filter_uses(analysis: ChannelAnalysis, model: nn.Module) -> dict[str, list[tuple[Channels, Channels]]]:
    """layer_uses of the layers whose filters can be pruned: convolutions, and linear layers that are masked in model.

    In the order of the network.
    """
    modules = dict(model.named_modules())
    found = layer_uses(analysis, ConvRule)
    for name, uses in layer_uses(analysis, LinearRule).items():
        if isinstance(modules.get(name), MaskedFilters):
            found[name] = uses
    return {name: found[name] for name in layer_uses(analysis, WeightRule) if name in found and name in modules}


def layer_uses(analysis: ChannelAnalysis, kind: type[LayerRule]) -> dict[str, list[tuple[Channels, Channels]]]:
    """(channels in, channels out) of every use of each layer of a kind, by layer name.

    A layer whose parameters are also operands of something else is left out.
    """
    uses: dict[str, list[tuple[Channels, Channels]]] = {}
    for node, rule in analysis.rules.items():
        if isinstance(rule, kind) and analysis.states[node] is not None:
            parameters = [p for p in node.args[1:] if isinstance(p, fx.Node) and p in analysis.traced.names]
            if all(isinstance(analysis.rules.get(user), kind) for p in parameters for user in p.users):
                uses.setdefault(rule.name(analysis.traced, node), []).append(rule.ends(analysis, node))
    return uses
