"""The module form of a small network: a copy of the user's own modules whose parameters have the kept channels only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..nn.adapted import keep_channels
from ..nn.norm_channels import NormChannels
from .analysis import ChannelAnalysis
from .channels import Index, Kept, take
from .rules.layers import WeightRule
from .rules.norms import NormOverChannelsRule

LITERALS = (0, 1, 2)  # what Rule.hold may be told, from the smallest network to the surest

NORMS_OVER_CHANNELS = (nn.GroupNorm, nn.LayerNorm)


def kept_in_forward(analysis: ChannelAnalysis, *, literal: int) -> Kept:
    """The channels that are kept if the forward stays as it is: every operator runs on the kept channels alone.

    Beyond what has to be computed, these are the channels of operators without a rule, those that make the shares of a
    split equal, and one of every value, since layers without channels do not run. All hold zeros, or are not read.
    literal: as in Rule.hold.
    """
    hold_forward(analysis, literal)
    tracked = [x.ids for node in analysis.traced.graph.nodes if (x := analysis.tracked(node)) is not None and len(x)]
    while True:
        kept = analysis.kept()
        more = [ids[:1] for ids in tracked if kept.of_ids(ids).numel() == 0]
        more += [ids for parts in analysis.alike for ids in _missing(parts, kept)]
        if not more:
            return kept
        for ids in more:
            analysis.classes.pin(ids)


def hold_forward(analysis: ChannelAnalysis, literal: int) -> None:
    """Pins what the operators of the forward need whatever the masks are, and notes which counts have to agree."""
    own = {name for get in ("named_parameters", "named_buffers")
           for name, _ in getattr(analysis.traced.model, get)(remove_duplicate=False)}  # fmt: skip
    analysis.pin_constants(own)
    for node, rule in analysis.rules.items():
        rule.hold(analysis, node, literal)


def _missing(parts: Sequence[Tensor], kept: Kept) -> list[Tensor]:
    """Of each part, ids that are not kept, as many as it has fewer than the part with the most."""
    counts = [kept.of_ids(ids).numel() for ids in parts]
    missing = []
    for ids, count in zip(parts, counts, strict=True):
        if count < max(counts):
            gone = torch.ones_like(ids, dtype=torch.bool)
            gone[kept.of_ids(ids)] = False
            missing.append(ids[gone][: max(counts) - count])
    return missing


def multiply_adds(analysis: ChannelAnalysis, kept: Kept) -> int:
    """What the convolutions and linear layers of a small network with these channels cost for the example."""
    total = 0
    for node, rule in analysis.rules.items():
        if isinstance(rule, WeightRule) and analysis.states[node] is not None:
            total += rule.multiply_adds(analysis, node, kept)
    return total


@dataclass
class Narrowing:
    """What makes a network small: the channels that are kept, for any network with the modules of the traced one."""

    indices: dict[str, dict[int, Tensor]]  # by name of a parameter or buffer, what is kept (see Kept.of_ids)
    numbers: dict[tuple[str, str], int]  # by module and attribute, a number of channels that the forward asks for
    norms: dict[str, NormChannels] = field(default_factory=dict)  # by name of a norm over channels, what it normalizes

    @classmethod
    def of(cls, analysis: ChannelAnalysis, kept: Kept) -> Narrowing:
        numbers = {where: len(kept.of_ids(ids)) for where, ids in analysis.numbers.items()}
        norms = {}
        for node, rule in analysis.rules.items():
            if isinstance(rule, NormOverChannelsRule) and analysis.states[node] is not None:
                norms[rule.name(analysis.traced, node)] = rule.kept_channels(analysis, node, kept)
        return cls(analysis.parameter_channels(kept), numbers, norms)

    @property
    def counts(self) -> tuple[dict[str, list[torch.Size]], dict[tuple[str, str], int]]:
        """How many channels are kept of each dimension, by parameter or buffer, and the numbers."""
        return {name: [rows.shape for rows in index.values()] for name, index in self.indices.items()}, self.numbers

    def apply(self, plain: nn.Module) -> dict[int, tuple[str, Index | None]]:
        """Makes a network of plain layers small, in place.

        Returns:
            Of each parameter, by id: its name, and what was kept of it.
        """
        named = [*plain.named_parameters(remove_duplicate=False), *plain.named_buffers(remove_duplicate=False)]
        changed, modules = {}, dict(plain.named_modules(remove_duplicate=False))
        for name, tensor in named:
            index = {
                dim: rows for dim, rows in self.indices.get(name, {}).items() if rows.shape[-1] < tensor.shape[dim]
            }
            if index:
                changed[id(tensor)] = name, index
        made: dict[int, Tensor] = {}  # a tensor in several places stays one
        origins: dict[int, tuple[str, Index | None]] = {id(tensor): (name, {}) for name, tensor in reversed(named)}
        for module in plain.modules():
            held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in held:
                for last, tensor in tensors.items():
                    if id(tensor) in changed:
                        name, index = changed[id(tensor)]
                        if id(tensor) not in made:
                            made[id(tensor)] = _gather(tensor, index)
                            origins[id(made[id(tensor)])] = name, index
                        tensors[last] = made[id(tensor)]
        for name, channels in self.norms.items():
            if isinstance(norm := modules.get(name), NORMS_OVER_CHANNELS):
                keep_channels(norm, channels)
        for (path, attribute), number in self.numbers.items():
            setattr(plain.get_submodule(path), attribute, number)
        for module in plain.modules():
            adjust_sizes(module)
        return origins


def _gather(full: Tensor, index: Index) -> Tensor:
    """The part of a parameter or buffer that index keeps; a parameter gives a parameter of the same memory format."""
    part = take(full.detach(), index)
    if full.dim() == 4 and full.is_contiguous(memory_format=torch.channels_last) and not full.is_contiguous():
        part = part.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(part, full.requires_grad) if isinstance(full, nn.Parameter) else part


def keep_live_alone(plain: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Gives norms over several channels, which see dead channels too, those of their masks alone, in place."""
    modules = dict(plain.named_modules(remove_duplicate=False))
    for name, live in masks.items():
        norm: Any = modules[name]
        rows = torch.where(live, torch.arange(live.numel()), -1).numpy()
        keep_channels(norm, NormChannels.of_rows(rows, getattr(norm, "num_groups", 1), live.numel()))


def adjust_sizes(module: nn.Module) -> None:
    """Makes the sizes that a layer of torch.nn remembers those of its parameters, and of its number of groups.

    Those of norms over several channels follow from which channels they normalize.
    """
    weight = getattr(module, "weight", None)
    if isinstance(module, _NormBase):
        known = [t for t in (weight, module.running_mean) if t is not None]
        module.num_features = known[0].numel() if known else module.num_features
    elif not isinstance(weight, Tensor):
        return
    elif isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, nn.ConvTranspose2d):
        module.in_channels, module.out_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.numel()
