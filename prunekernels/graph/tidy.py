"""tidy_masks: makes dead whatever the masks of a network leave without effect."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.masked_filters import MaskedFilters
from ..nn.masked_norm import MaskedNorm
from .analysis import ChannelAnalysis
from .channels import Channels
from .layer_uses import any_weights, layer_uses
from .rules.layers import WeightRule
from .rules.norms import NormRule
from .trace import trace

Uses = list[tuple[Channels, Channels]]


@dataclass
class Tidied:
    """What tidy_masks made dead.

    Attributes:
        filters: Filters of masked convolutions, a list of indices for each layer, by its name in the model.
        inputs: Input channels of masked convolutions, likewise.
        channels: Channels of masked norms, likewise.

    Examples:
        >>> model = torch.nn.Sequential(pk.MaskedConv2d(3, 4, 3, bias=False), pk.MaskedConv2d(4, 2, 1))
        >>> model[0].set_masks(filter=torch.tensor([True, True, False, True]))
        >>> print(pk.tidy_masks(model, torch.randn(2, 3, 8, 8)))
        1: inputs 2
    """

    filters: dict[str, list[int]] = field(default_factory=dict)
    inputs: dict[str, list[int]] = field(default_factory=dict)
    channels: dict[str, list[int]] = field(default_factory=dict)

    @property
    def found(self) -> int:
        """The number of filters, inputs and channels."""
        return sum(len(which) for dead in (self.filters, self.inputs, self.channels) for which in dead.values())

    def __str__(self) -> str:
        lines = []
        for what, dead in (("filters", self.filters), ("inputs", self.inputs), ("channels", self.channels)):
            lines += [f"{name}: {what} {', '.join(map(str, which))}" for name, which in dead.items()]
        return "\n".join(lines) or "nothing to tidy"


def tidy_masks(model: nn.Module, example_input: Any) -> Tidied:
    """Makes dead, in place, whatever the masks of a model leave without effect; its outputs stay the same.

    A filter dies if no live kernel reads it, or if it has no live kernel and no bias. A channel of a masked norm dies
    if no live kernel reads it. An input channel that is exactly zero dies in every layer that reads it. A second call
    finds nothing. Only masks count, not weights: a filter that happens to be zero may go on to train. Hard-dead filters
    stay hard-dead; a soft-dead weight that trains may get another gradient.

    Args:
        model: The masked network.
        example_input: What model takes: a tensor such as [N, C, H, W], a tuple or a dict of arguments (see Example).

    Returns:
        A Tidied that lists what died.

    Examples:
        >>> model = torch.nn.Sequential(pk.MaskedConv2d(3, 4, 3), pk.MaskedConv2d(4, 2, 1))
        >>> model[1].set_masks(input=torch.tensor([True, False, True, True]))  # filter 1 of the first is not read
        >>> tidied = pk.tidy_masks(model, torch.randn(2, 3, 8, 8))
        >>> tidied.filters, tidied.found
        ({'0': [1]}, 1)
        >>> model[0].filter_mask
        tensor([ True, False,  True,  True])
    """
    traced, report, found = trace("tidy_masks", model, example_input), Tidied(), -1
    modules = dict(model.named_modules())
    while found != report.found:  # a filter that died is a zero input for the layers behind it
        found = report.found
        analysis = ChannelAnalysis(traced, any_weights(model, traced))
        for name, uses in layer_uses(analysis, WeightRule).items():
            layer = modules.get(name)
            if isinstance(layer, MaskedFilters):
                _tidy_conv(name, layer, uses, report)
        for name, uses in layer_uses(analysis, NormRule).items():
            layer = modules.get(name)
            if isinstance(layer, MaskedNorm):
                _tidy_norm(name, layer, uses, report)
    return report


def _tidy_norm(name: str, layer: MaskedNorm, uses: Uses, report: Tidied) -> None:
    live = layer.channel_mask & _any(out.read for _, out in uses).to(layer.channel_mask.device)
    _record(report.channels, name, layer.channel_mask, live)
    layer.set_mask(live)


def _tidy_conv(name: str, layer: MaskedFilters, uses: Uses, report: Tidied) -> None:
    device = layer.filter_mask.device
    keeps = _any(out.read & (out.values != 0) if layer.bias is None else out.read for _, out in uses).to(device)
    filters = layer.filter_mask & keeps
    inputs = layer.input_mask & _any(x.values != 0 for x, _ in uses).to(device)
    _record(report.filters, name, layer.filter_mask, filters)
    _record(report.inputs, name, layer.input_mask, inputs)
    layer.set_masks(filter=filters, input=inputs)


def _any(masks: Iterable[Tensor]) -> Tensor:
    """True where one of several uses of a layer has True."""
    return torch.stack(list(masks)).any(0)


def _record(dead: dict[str, list[int]], name: str, before: Tensor, after: Tensor) -> None:
    died = torch.nonzero(before & ~after).flatten().tolist()
    if died:
        dead[name] = sorted(dead.get(name, []) + died)
