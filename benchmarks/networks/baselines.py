"""Who runs the network: dense, the layer gear, the network gear, the small network; and the reference that decides.

A run is a training step or an inference step. Everybody starts from the same weights and sees the same batch.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunekernels as pk
from layers.baselines import FORMATS, Wrong
from networks.models import Cut, Live, Network, Wire, apply, wires

PASSES = ("train", "infer")
OPTIMIZERS = ("masked", "torch")
SGD: dict[str, Any] = dict(lr=1e-3, momentum=0.9, weight_decay=1e-4)
# Length of the error over that of the result. A ReLU whose input is within rounding of zero may pass in one network and
# not in the other: no result shows it, but each moves all gradients below it, by up to some percent.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
GRADIENT_TOLERANCE = {torch.float32: 0.1, torch.bfloat16: 0.3}


class Setting:
    """What all runs of a network share: images, labels, first weights, and who is dense."""

    def __init__(self, network: Network, device: str, dtype: torch.dtype, optimizer: str, seed: int) -> None:
        self.network, self.device, self.dtype, self.optimizer = network, device, dtype, optimizer
        self.problem = self  # as gpu.py asks for a rival's
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
        self.dense: dict[str, Rival] = {}  # by layout: the same under all masks
        self.dense_layout: dict[str, str] = {}  # by pass, once it is known: the faster one

    def format(self) -> str:
        return self.network.name

    def full(self) -> nn.Module:
        model = self.network.build().to(self.device)
        model.load_state_dict(self.state)
        return model

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        kind = torch.device(self.device).type
        return torch.autocast(kind, self.dtype, enabled=self.dtype != torch.float32)


@torch.no_grad()
def _vary_norms(model: nn.Module) -> None:
    """Ones and zeros would hide a norm's channels that are taken for one another."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.1)


@torch.no_grad()
def _calibrate(model: nn.Module, images: Tensor) -> None:
    """Running statistics of this batch, so that inference meets numbers of an ordinary size."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model(images)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum


@dataclass
class Masked:
    """A setting with masks, and what a run under them must give."""

    setting: Setting
    masks: str
    kept: float
    live: Live
    results: dict[str, Results] = field(default_factory=dict)

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
        with contextlib.redirect_stdout(io.StringIO()):  # what it says of its own check
            return pk.shrink(self.model().eval(), self.setting.images[:2])

    def expected(self, direction: str) -> Results:
        if direction not in self.results:
            reference = Reference(self, direction, "nchw")  # where torch's norms round the least
            self.results[direction] = Results(reference.run(), reference.gradients())
        return self.results[direction]


@dataclass(frozen=True)
class Results:
    out: Tensor  # the loss, or the logits
    gradients: Mapping[str, Tensor]  # by parameter; none in inference


class Rival:
    """A network, its optimizer and its copy of the batch."""

    family = "dense"
    ours = False

    def __init__(self, masked: Masked, direction: str, layout: str) -> None:
        self.masked, self.setting, self.layout = masked, masked.setting, layout
        self.problem = self.setting
        memory_format = FORMATS[layout]
        self.model = self.make().to(memory_format=memory_format)  # type: ignore[call-overload]
        self.images = self.setting.images.clone(memory_format=memory_format)
        self.optimizer = self.make_optimizer()
        self.first = {name: t.clone() for name, t in self.model.state_dict().items() if t.is_floating_point()}
        self.enter(direction)

    def make(self) -> nn.Module:
        return self.setting.full()

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), foreach=True, **SGD)

    def enter(self, direction: str) -> None:
        self.direction = direction
        self.model.train(direction == "train")
        self.run: Callable[[], Tensor] = self.step if direction == "train" else self.infer
        self.ms = float("inf")  # the fastest single run before the rounds
        self.rewind()

    def begin(self) -> None:
        """Nothing here is kept from one run to the next on a stream of its own."""

    @torch.no_grad()
    def rewind(self) -> None:
        """Back to the first weights, in place, with momentum and gradients gone."""
        state = self.model.state_dict()
        for name, value in self.first.items():
            state[name].copy_(value)
        for kept in self.optimizer.state.values():
            if (momentum := kept.get("momentum_buffer")) is not None:
                momentum.zero_()

    def step(self) -> Tensor:
        self.optimizer.zero_grad()
        with self.setting.autocast():
            loss = F.cross_entropy(self.model(self.images), self.setting.labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def infer(self) -> Tensor:
        with self.setting.autocast():
            return self.model(self.images)

    def gradients(self) -> dict[str, Tensor]:
        """Of the last step."""
        if self.direction != "train":
            return {}
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    def expected(self) -> Results | None:
        return None

    def check(self, out: Tensor | None = None) -> None:
        """That a first run, or the one that gave `out`, has the reference's results."""
        if (want := self.expected()) is None:
            return
        if out is None:
            self.rewind()
            out = self.run()
        got = self.gradients()
        if missing := sorted(set(want.gradients) - set(got)):
            raise Wrong(f"{self.what()}: no gradient of {missing[0]}")
        self.compare("loss" if self.direction == "train" else "logits", out, want.out, TOLERANCE)
        for name, gradient in want.gradients.items():
            self.compare(f"gradient of {name}", got[name], gradient, GRADIENT_TOLERANCE)

    def what(self) -> str:
        job = f"{self.setting.format()} {self.masked.masks} kept {self.masked.kept:g}"
        return f"{job}: {self.family} ({self.layout}), {self.direction}"

    def compare(self, name: str, got: Tensor, want: Tensor, tolerance: Mapping[torch.dtype, float]) -> None:
        if got.shape != want.shape:
            raise Wrong(f"{self.what()}: {name} has the shape {tuple(got.shape)}, expected {tuple(want.shape)}")
        error = ((got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-30)).item()
        if not error <= tolerance[self.setting.dtype]:  # written so that NaN is wrong too
            raise Wrong(f"{self.what()}: {name} is wrong, error {error:.1e} of its length")


class Dense(Rival):
    """The whole network with nothing masked: right by definition, and the same under all masks."""

    @classmethod
    def of(cls, masked: Masked, direction: str, layout: str) -> Rival:
        known = masked.setting.dense
        if layout not in known:
            known[layout] = cls(masked, direction, layout)
        known[layout].enter(direction)
        return known[layout]


class Reference(Rival):
    """Dense, with zeros put behind every norm where a filter is dead. Not timed."""

    family = "reference"

    def make(self) -> nn.Module:
        model = super().make()
        for wire in self.setting.wires:
            live = self.masked.live.filters[wire.conv].to(self.setting.device)[:, None, None]
            model.get_submodule(wire.norm).register_forward_hook(_zeros_where_dead(live))
        return model


def _zeros_where_dead(live: Tensor) -> Callable[..., Tensor]:
    return lambda module, args, y: torch.where(live, y, y.new_zeros(()))


class LayerGear(Rival):
    """Full-width tensors between the layers, work skipped inside them."""

    family = "layer"
    ours = True

    def make(self) -> nn.Module:
        return self.masked.model()

    def make_optimizer(self) -> torch.optim.Optimizer:
        if self.setting.optimizer == "torch":
            return super().make_optimizer()
        optimizer = pk.optim.MaskedSGD(self.model.parameters(), freeze="dead", **SGD)
        pk.optim.bind(optimizer, self.model)
        return optimizer

    def expected(self) -> Results | None:
        return self.masked.expected(self.direction)

    def check(self, out: Tensor | None = None) -> None:
        super().check(out)
        for name, gradient in self.gradients().items():
            if self.masked.cut.dead(name, gradient).any():
                raise Wrong(f"{self.what()}: gradient of {name} is not exactly zero where it is dead")


class NetworkGear(LayerGear):
    """Live channels alone from layer to layer."""

    family = "network"

    def make(self) -> nn.Module:
        return pk.flow(super().make())


class Small(Rival):
    """The limit: plain layers that never had the dead filters. Joint masks leave the network of that width; of
    independent ones pk.shrink makes what there is."""

    family = "small"

    def make(self) -> nn.Module:
        if self.masked.masks == "independent":
            return copy.deepcopy(self.masked.shrunk)
        setting, cut = self.setting, self.masked.cut
        model = setting.network.build(self.masked.kept).to(setting.device)
        model.load_state_dict({name: cut.small(name, value) for name, value in setting.state.items()})
        return model

    def expected(self) -> Results | None:
        want, cut = self.masked.expected(self.direction), self.masked.cut
        if self.masked.masks != "joint":  # widened to what meets in an add: other entries
            return Results(want.out, {})
        return Results(want.out, {name: cut.small(name, g) for name, g in want.gradients.items()})


RIVALS: tuple[type[Rival], ...] = (Dense, LayerGear, NetworkGear, Small)
FAMILIES = tuple(r.family for r in RIVALS)
