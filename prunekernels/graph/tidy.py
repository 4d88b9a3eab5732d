"""tidy_masks: what masks imply about each other, written into the masks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.batch_norm import MaskedBatchNorm2d
from ..nn.conv import MaskedConv2d
from .analysis import ChannelAnalysis
from .channels import Channels
from .layer_uses import any_weights, layer_uses
from .rules.layers import NormRule, WeightRule
from .trace import trace

Uses = list[tuple[Channels, Channels]]


@dataclass
class Tidied:
    """What tidy_masks made dead, by layer: filters and input channels of convolutions, channels of norms."""

    filters: dict[str, list[int]] = field(default_factory=dict)
    inputs: dict[str, list[int]] = field(default_factory=dict)
    channels: dict[str, list[int]] = field(default_factory=dict)

    @property
    def found(self) -> int:
        """How much died."""
        return sum(len(which) for dead in (self.filters, self.inputs, self.channels) for which in dead.values())

    def __str__(self) -> str:
        lines = []
        for what, dead in (("filters", self.filters), ("inputs", self.inputs), ("channels", self.channels)):
            lines += [f"{name}: {what} {', '.join(map(str, which))}" for name, which in dead.items()]
        return "\n".join(lines) or "nothing to tidy"


def tidy_masks(model: nn.Module, example_input: Any) -> Tidied:
    """In place: makes dead whatever the masks of model leave without effect. The outputs stay, in both modes.

    A filter dies if nobody reads it, or if none of its kernels is live and it has no bias; the channel of a masked
    norm behind it dies if nobody reads that; an input channel that is exactly zero dies in every layer that reads it.
    That is the fixed point: a second call finds nothing. Weights do not count, only masks: a filter that happens to be
    zero may train on. What is hard-dead stays so; a soft-dead weight that trains may get another gradient.
    """
    traced, report, found = trace("tidy_masks", model, example_input), Tidied(), -1
    modules = dict(model.named_modules())
    while found != report.found:  # what nobody reads is zero now, and dead for those who did not read it
        found = report.found
        analysis = ChannelAnalysis(traced, any_weights(model, traced))
        for name, uses in layer_uses(analysis, WeightRule).items():
            layer = modules.get(name)
            if isinstance(layer, MaskedConv2d):
                _tidy_conv(name, layer, uses, report)
        for name, uses in layer_uses(analysis, NormRule).items():
            layer = modules.get(name)
            if isinstance(layer, MaskedBatchNorm2d):
                _tidy_norm(name, layer, uses, report)
    return report


def _tidy_norm(name: str, layer: MaskedBatchNorm2d, uses: Uses, report: Tidied) -> None:
    live = layer.channel_mask & _any(out.read for _, out in uses).to(layer.channel_mask.device)
    _record(report.channels, name, layer.channel_mask, live)
    layer.set_mask(live)


def _tidy_conv(name: str, layer: MaskedConv2d, uses: Uses, report: Tidied) -> None:
    device = layer.filter_mask.device
    keeps = _any(out.read & (out.values != 0) if layer.bias is None else out.read for _, out in uses).to(device)
    filters = layer.filter_mask & keeps
    inputs = layer.input_mask & _any(x.values != 0 for x, _ in uses).to(device)
    _record(report.filters, name, layer.filter_mask, filters)
    _record(report.inputs, name, layer.input_mask, inputs)
    layer.set_masks(filter=filters, input=inputs)


def _any(masks: Iterable[Tensor]) -> Tensor:
    """Live in one of several uses of a layer."""
    return torch.stack(list(masks)).any(0)


def _record(dead: dict[str, list[int]], name: str, before: Tensor, after: Tensor) -> None:
    fresh = torch.nonzero(before & ~after).flatten().tolist()
    if fresh:
        dead[name] = sorted(dead.get(name, []) + fresh)
