"""The networks, the masks of their filters, and the small network's part of the parameters of full width."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekernels.train.models import PadShortcut, Residual, build, scaled

MASKS = ("joint", "independent")


@dataclass(frozen=True)
class Network:
    """A reference network at the size at which it is timed."""

    name: str
    model: str  # of prunekernels.train.models
    image: int
    batch: int
    classes: int
    mmacs: float  # millions of multiply-adds of one image; a run's time is divided in proportion

    def build(self, width: float = 1.0) -> nn.Module:
        return build(self.model, self.classes, width=width)

    def has_joins(self) -> bool:
        """Whether any filters meet in an add; if not, joint and independent masks are the same."""
        with torch.device("meta"):
            found = wires(self.build())
        return len({wire.group for wire in found}) < len(found)

    @property
    def work(self) -> float:
        return self.mmacs * self.batch


NETWORKS = {
    network.name: network
    for network in (
        Network("resnet56", "resnet56", 32, 128, 10, 126),
        Network("vgg16", "vgg16_bn", 32, 128, 10, 314),
        Network("resnet18", "resnet18", 112, 16, 1000, 486),
        Network("mobilenet_v2", "mobilenet_v2", 112, 16, 1000, 82),
        Network("resnet50", "resnet50", 224, 128, 1000, 4112),
        Network("tiny_resnet", "resnet20", 8, 4, 10, 2.54),
        Network("tiny_vgg", "vgg_small", 8, 4, 10, 2.42),
    )
}


@dataclass(frozen=True)
class Wire:
    """A convolution with its norm. Filters of one group meet in an add. A group has the name of its first convolution
    or of the block whose shortcut joins it."""

    conv: str
    norm: str
    filters: int
    group: str
    reads: str | None  # the group of its input channels; None: it reads the image
    after: str | None = None  # the group that a type-A shortcut adds to the first channels of this one's group
    depthwise: bool = False  # a filter for each channel that it reads, live where the channel is


def wires(model: nn.Module) -> list[Wire]:
    """All convolutions in the order in which they run; a shortcut's comes after the body that it goes around."""
    return list(_walk("", model, None))


def _walk(name: str, module: nn.Module, incoming: str | None) -> Iterator[Wire]:
    """incoming: the group of the channels that the module reads."""
    prefix = f"{name}." if name else ""
    if isinstance(module, Residual):
        plain = isinstance(module.shortcut, nn.Identity)
        into = incoming if plain else name
        padded = incoming if isinstance(module.shortcut, PadShortcut) else None
        yield from _chain(f"{prefix}body", module.body, incoming, into, padded)
        yield from _chain(f"{prefix}shortcut", module.shortcut, incoming, into)
    elif any(isinstance(child, nn.Conv2d) for child in module.children()):
        yield from _chain(name, module, incoming)
    else:
        for child_name, child in module.named_children():
            for wire in _walk(f"{prefix}{child_name}", child, incoming):
                yield wire
                incoming = wire.group


def _chain(
    name: str, module: nn.Module, reads: str | None, into: str | None = None, after: str | None = None
) -> Iterator[Wire]:
    """A module of convolution, norm, convolution, norm, ...: the last filters are of the group `into`."""
    convs = [(n, m) for n, m in module.named_children() if isinstance(m, nn.Conv2d)]
    norms = [n for n, m in module.named_children() if isinstance(m, nn.BatchNorm2d)]
    for i, ((conv, layer), norm) in enumerate(zip(convs, norms, strict=True)):
        last = i == len(convs) - 1
        group = into if last and into else f"{name}.{conv}"
        depthwise = 1 < layer.groups == layer.in_channels
        conv, norm = f"{name}.{conv}", f"{name}.{norm}"
        yield Wire(conv, norm, layer.out_channels, group, reads, after if last else None, depthwise)
        reads = group


@dataclass(frozen=True)
class LiveChannels:
    """Bool tensors by name of the convolution, True = live."""

    filters: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor | None]  # input channels that may differ from zero; None: the image
    features: Tensor  # channels that the classifier reads


def draw(found: Sequence[Wire], masks: str, keep_ratio: float, seed: int) -> LiveChannels:
    """Masks at random: "joint" gives each group a list of live filters, "independent" each convolution, but for
    depthwise ones.

    How many are live is not random: as many as the network that is built with width=keep_ratio has filters.
    """
    generator = torch.Generator().manual_seed(seed)
    lists: dict[str, Tensor] = {}
    for wire in found:
        key = wire.group if masks == "joint" else wire.conv
        if wire.depthwise:
            assert wire.reads is not None
            lists[key] = lists[wire.reads]
        elif key not in lists:
            first = lists[wire.after] if masks == "joint" and wire.after else torch.empty(0, dtype=torch.bool)
            lists[key] = _pick(wire.filters, keep_ratio, first, generator)
    return _follow(found, {w.conv: lists[w.group if masks == "joint" else w.conv] for w in found})


def _pick(filters: int, keep_ratio: float, first: Tensor, generator: torch.Generator) -> Tensor:
    """Live filters at random, but for the first len(first), to which the shortcut's channels are added: these are
    live where the shortcut's are."""
    mask = torch.zeros(filters, dtype=torch.bool)
    mask[: len(first)] = first
    order = len(first) + torch.randperm(filters - len(first), generator=generator)
    mask[order[: scaled(filters, keep_ratio) - int(first.sum())]] = True
    return mask


def _follow(found: Sequence[Wire], filters: dict[str, Tensor]) -> LiveChannels:
    """Adds the input masks: the readers of a group get the union of the live filters that meet there."""
    carried: dict[str, Tensor] = {}
    inputs: dict[str, Tensor | None] = {}
    for wire in found:
        inputs[wire.conv] = None if wire.reads is None else carried[wire.reads].clone()
        if wire.group not in carried:
            carried[wire.group] = torch.zeros(wire.filters, dtype=torch.bool)
            if wire.after:
                before = carried[wire.after]
                carried[wire.group][: len(before)] = before
        carried[wire.group] |= filters[wire.conv]
    return LiveChannels(filters, inputs, carried[found[-1].group])


def apply(model: nn.Module, found: Sequence[Wire], live: LiveChannels, device: str) -> None:
    """Sets the masks of a converted network."""
    modules: dict[str, Any] = dict(model.named_modules())
    for wire in found:
        conv, norm = modules[wire.conv], modules[wire.norm]
        filters, inputs = live.filters[wire.conv].to(device), live.inputs[wire.conv]
        conv.set_masks(filter=filters, input=None if inputs is None else inputs.to(device))
        norm.set_mask(filters)


class Cut:
    """Which entries of each parameter and statistic of full width, by name, the small network has."""

    def __init__(self, found: Sequence[Wire], live: LiveChannels, device: str) -> None:
        self.live: dict[str, tuple[Tensor, Tensor | None]] = {}  # rows and columns, bool; None: all
        for wire in found:
            rows, columns = live.filters[wire.conv].to(device), live.inputs[wire.conv]
            all_columns = columns is None or wire.depthwise
            self.live[f"{wire.conv}.weight"] = rows, None if all_columns else columns.to(device)
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.live[f"{wire.norm}.{name}"] = rows, None
        self.features = live.features.to(device)

    def small(self, name: str, full: Tensor) -> Tensor:
        if name == "classifier.weight":
            return full[:, self.features]
        if name not in self.live:
            return full
        rows, columns = self.live[name]
        return full[rows] if columns is None else full[rows][:, columns]

    def dead(self, name: str, full: Tensor) -> Tensor:
        """The entries that a gradient of a masked layer must leave at zero."""
        if name not in self.live:
            return full[:0]
        rows, columns = self.live[name]
        mask = rows if columns is None else rows[:, None] & columns[None, :]
        return full[~mask]
