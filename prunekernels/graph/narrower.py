"""Narrower: which channels a small network keeps, again and again, for whatever masks the layers have by then."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..nn.batch_norm import MaskedBatchNorm2d
from ..nn.conv import MaskedConv2d
from .analysis import ChannelAnalysis
from .layer_uses import any_weights
from .narrow import Narrowing, kept_in_forward, multiply_adds
from .rules.layers import LayerRule
from .trace import Traced

Bools = np.ndarray


@dataclass
class MaskArrays:
    """What is live in a masked layer, as bool arrays that share memory with its masks where they can."""

    rows: Bools  # [K]: filters that are live and not hard-dead, or the channels of a norm
    columns: Bools | None = None  # [C]: the input channels of a convolution
    kernels: Bools | None = None  # [K, C / groups]: single kernels; None: all of those that rows and columns leave


def read_masks(model: nn.Module) -> dict[str, MaskArrays]:
    """The masks of every masked layer, by layer name. Waits for the device."""
    masks = {}
    for name, layer in model.named_modules():
        if isinstance(layer, MaskedConv2d):
            rows = (layer.filter_mask & layer.hard_mask).cpu().numpy()
            kernels = layer.kernel_mask.cpu().numpy()
            masks[name] = MaskArrays(rows, layer.input_mask.cpu().numpy(), None if kernels.all() else kernels)
        elif isinstance(layer, MaskedBatchNorm2d):
            masks[name] = MaskArrays(layer.channel_mask.cpu().numpy())
    return masks


class Narrower:
    """Says for any masks what makes a network small enough for them: what Narrowing.of says after a new analysis."""

    def __init__(self, traced: Traced, weights: Mapping[str, Tensor], stays: Collection[str], literal: bool) -> None:
        self._traced, self._weights, self._stays, self._literal = traced, weights, stays, literal

    @classmethod
    def of(cls, traced: Traced, model: nn.Module, *, stays: Collection[str] = (), literal: bool = False) -> Narrower:
        """
        Args:
            traced: A trace of model.
            model: The masked network.
            stays: Names of layers that keep their full width.
            literal: As in Rule.hold.
        """
        plain = {name: torch.full_like(t, torch.nan) if t.is_floating_point() else t
                 for name, t in any_weights(model, traced).items()}  # fmt: skip
        return cls(traced, plain, stays, literal)

    def narrow(self, masks: Mapping[str, MaskArrays]) -> Narrowing:
        analysis = self._analysis(masks)
        return Narrowing.of(analysis, kept_in_forward(analysis, literal=self._literal))

    def excess(self, masks: Mapping[str, MaskArrays]) -> float:
        """How many times the multiply-adds of the graph form a network that is narrowed to these masks has."""
        analysis = self._analysis(masks)
        least = multiply_adds(analysis, analysis.kept())
        return multiply_adds(analysis, kept_in_forward(analysis, literal=self._literal)) / max(least, 1)

    def _analysis(self, masks: Mapping[str, MaskArrays]) -> ChannelAnalysis:
        weights = dict(self._weights)
        for name, mask in masks.items():
            rows = torch.from_numpy(mask.rows)
            if f"{name}.bias" in weights:
                weights[f"{name}.bias"] = weights[f"{name}.bias"].masked_fill(~rows, 0)
            if f"{name}.weight" in weights:
                weight, live = weights[f"{name}.weight"], rows
                if mask.columns is not None:
                    groups = mask.columns.size // weight.shape[1]
                    columns = torch.from_numpy(mask.columns).view(groups, -1)
                    live = rows[:, None] & columns.repeat_interleave(rows.numel() // groups, 0)
                    if mask.kernels is not None:
                        live = live & torch.from_numpy(mask.kernels)
                    live = live[:, :, None, None]
                weights[f"{name}.weight"] = weight.masked_fill(~live, 0)
        analysis = ChannelAnalysis(self._traced, weights, constants=False)
        for node, rule in analysis.rules.items():
            if isinstance(rule, LayerRule) and analysis.states[node] is not None:
                if rule.name(self._traced, node) in self._stays:
                    for channels in rule.ends(analysis, node):
                        analysis.classes.pin(channels.ids)
        return analysis
