"""What all runs of a network share: the batch and the first weights (Setting), and masks over them (MaskedSetting)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import prunekernels as pk
from networks.models import Cut, LiveChannels, Network, Wire, apply, wires

OPTIMIZERS = ("masked", "torch")


class Setting:
    """A network with its batch and its first weights, and what is known of the dense contenders."""

    def __init__(self, network: Network, device: str, dtype: torch.dtype, optimizer: str, seed: int) -> None:
        self.network, self.device, self.dtype, self.optimizer = network, device, dtype, optimizer
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = network.build()
            images = torch.randn(network.batch, 3, network.image, network.image)
            labels = torch.randint(network.classes, (network.batch,))
            _vary_norms(model)
        self.wires: list[Wire] = wires(model)
        self.images, self.labels = images.to(device), labels.to(device)
        model = model.to(device)
        _calibrate(model, self.images)
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.dense: dict[str, Any] = {}  # the dense contenders by "family/layout": they serve all masks
        self.dense_layout: dict[tuple[str, str], str] = {}  # by family and pass: the faster layout, once it is known

    def format(self) -> str:
        return self.network.name + ("" if self.dtype == torch.float32 else f" {str(self.dtype).split('.')[1]}")

    def full(self) -> nn.Module:
        """The plain network with the first weights."""
        model = self.network.build().to(self.device)
        model.load_state_dict(self.state)
        return model

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        kind = torch.device(self.device).type
        return torch.autocast(kind, self.dtype, enabled=self.dtype != torch.float32)


@torch.no_grad()
def _vary_norms(model: nn.Module) -> None:
    """Random weights and biases: with the usual ones and zeros, exchanged channels would give right results."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.1)


@torch.no_grad()
def _calibrate(model: nn.Module, images: Tensor) -> None:
    """Sets the running statistics to those of this batch, so that inference meets numbers of an ordinary size."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model(images)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum


@dataclass(frozen=True)
class Results:
    """What a run must give."""

    out: Tensor  # the loss; in inference the logits
    gradients: Mapping[str, Tensor]  # by parameter; none in inference


@dataclass
class MaskedSetting:
    """A setting with masks."""

    setting: Setting
    masks: str
    keep_ratio: float
    live: LiveChannels
    results: dict[str, Results] = field(default_factory=dict)  # by pass: the reference's
    roundings: dict[str, float] = field(default_factory=dict)  # by parameter: how far a gradient may be off by rounding

    @cached_property
    def cut(self) -> Cut:
        return Cut(self.setting.wires, self.live, self.setting.device)

    def model(self) -> nn.Module:
        """The network of full width with its masks."""
        model = self.setting.full()
        pk.convert(model)
        apply(model, self.setting.wires, self.live, self.setting.device)
        return model

    @cached_property
    def shrunk(self) -> nn.Module:
        with contextlib.redirect_stdout(io.StringIO()):  # shrink prints the result of its own check
            return pk.shrink(self.model().eval(), self.setting.images[:2], form="module")
