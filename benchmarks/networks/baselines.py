"""What runs the network: dense, masked, live and compacted mode, the small network; and the reference that decides.

A run is a training step or an inference step. All start from the same weights and read the same batch.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunekernels as pk
from harness.contender import Wrong
from harness.options import FORMATS
from networks.setting import MaskedSetting, Results
from prunekernels.compaction.compaction import Compaction

PASSES = ("train", "infer")
SGD: dict[str, Any] = dict(lr=1e-3, momentum=0.9, weight_decay=1e-4)
# Length of the error over that of the result. A ReLU whose input is within rounding of zero may pass in one network and
# not in the other: no result shows it, but each moves all gradients below it, by up to some percent.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
GRADIENT_TOLERANCE = {torch.float32: 0.1, torch.bfloat16: 0.3}
# A gradient may also be so many times as far from the reference's as that is from one of higher precision; where the
# latter is zero but for rounding, as behind the last norm of a branch without activation, whose bias has no effect on
# the loss, rounding meets rounding of another order of summation.
ROUNDINGS, ROUNDING_ALONE = 4.0, 20.0
EXACTER = {torch.float32: torch.float64, torch.bfloat16: torch.float32}


class NetworkContender:
    """A network, its optimizer and its copy of the batch; see harness.contender.Contender."""

    family = ""
    ours = False

    def __init__(self, masked: MaskedSetting, direction: str, layout: str) -> None:
        self.masked, self.setting, self.layout = masked, masked.setting, layout
        self.problem = self.setting
        memory_format = FORMATS[layout]
        self.model = self.make().to(memory_format=memory_format)  # type: ignore[call-overload]
        self.images = self.setting.images.clone(memory_format=memory_format)
        self.optimizer = self.make_optimizer()
        self.forward: Callable[[Tensor], Tensor] = self.make_forward()
        self.first = {name: t.detach().clone() for name, t in self._tensors().items() if t.is_floating_point()}
        self.enter(direction)

    def make(self) -> nn.Module:
        return self.setting.full()

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), foreach=True, **SGD)

    def make_forward(self) -> Callable[[Tensor], Tensor]:
        return self.model

    def enter(self, direction: str) -> None:
        """Sets the contender up for training or for inference steps."""
        self.direction = direction
        self.model.train(direction == "train")
        self.run: Callable[[], Tensor] = self.step if direction == "train" else self.infer
        self.ms = float("inf")  # of the fastest single run before the rounds
        self.rewind()

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers themselves, with what dead entries hold."""
        return self.model.state_dict(keep_vars=True)

    def begin(self) -> None:
        """Runs share nothing that belongs to a CUDA stream."""

    @torch.no_grad()
    def rewind(self) -> None:
        """Restores the first weights and zeroes the momentum, in place."""
        state = self._tensors()
        for name, value in self.first.items():
            state[name].copy_(value)
        for numbers in self.optimizer.state.values():
            if (momentum := numbers.get("momentum_buffer")) is not None:
                momentum.zero_()

    def step(self) -> Tensor:
        self.optimizer.zero_grad()
        with self.autocast():
            loss = F.cross_entropy(self.forward(self.images), self.setting.labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def infer(self) -> Tensor:
        with self.autocast():
            return self.forward(self.images)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return self.setting.autocast()

    def gradients(self) -> dict[str, Tensor]:
        """Of the last step."""
        if self.direction != "train":
            return {}
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    def expected(self) -> Results | None:
        return None

    def check(self, out: Tensor | None = None) -> None:
        """Raises Wrong unless a first run, or the one that returned `out`, gives the reference's results."""
        if (want := self.expected()) is None:
            return
        if out is None:
            self.rewind()
            out = self.run()
        got = self.gradients()
        if missing := sorted(set(want.gradients) - set(got)):
            raise Wrong(f"{self.what()}: no gradient of {missing[0]}")
        dtype = self.setting.dtype
        self.compare("loss" if self.direction == "train" else "logits", out, want.out, TOLERANCE[dtype])
        for name, gradient in want.gradients.items():
            self.compare(f"gradient of {name}", got[name], gradient, GRADIENT_TOLERANCE[dtype], name)

    def what(self) -> str:
        job = f"{self.setting.format()} {self.masked.masks} kept {self.masked.keep_ratio:g}"
        return f"{job}: {self.family} ({self.layout}), {self.direction}"

    def compare(self, what: str, got: Tensor, want: Tensor, tolerance: float, parameter: str | None = None) -> None:
        """parameter: whose gradient it is, if it is one."""
        if got.shape != want.shape:
            raise Wrong(f"{self.what()}: {what} has the shape {tuple(got.shape)}, expected {tuple(want.shape)}")
        error, length = (got.float() - want.float()).norm().item(), want.float().norm().item()
        if error <= tolerance * length:  # written so that NaN is wrong too
            return
        if parameter is None or not error <= roundings(self.masked)[parameter]:
            raise Wrong(f"{self.what()}: {what} is wrong, error {error / max(length, 1e-30):.1e} of its length")


class Dense(NetworkContender):
    """The plain network: nothing to check, and the same under all masks."""

    family = "dense"

    @classmethod
    def of(cls, masked: MaskedSetting, direction: str, layout: str) -> NetworkContender:
        """The setting's one contender of that layout, set up for the direction."""
        known, key = masked.setting.dense, f"{cls.family}/{layout}"
        if key not in known:
            known[key] = cls(masked, direction, layout)
        known[key].enter(direction)
        return known[key]


class FloatDense(Dense):
    """The plain network in float32, in rows of another dtype: who is free to choose takes the faster one."""

    family = "dense+fp32"

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()


class Reference(NetworkContender):
    """The plain network, with zeros written behind every norm where a filter is dead. Not timed."""

    family = "reference"

    def make(self) -> nn.Module:
        model = super().make()
        for wire in self.setting.wires:
            live = self.masked.live.filters[wire.conv].to(self.setting.device)[:, None, None]
            model.get_submodule(wire.norm).register_forward_hook(_zeros_where_dead(live))
        return model


class Exacter(Reference):
    """The reference in higher precision."""

    def make(self) -> nn.Module:
        return super().make().to(self.dtype)

    def enter(self, direction: str) -> None:
        self.images = self.images.to(self.dtype)
        super().enter(direction)

    @property
    def dtype(self) -> torch.dtype:
        return EXACTER[self.setting.dtype]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()


def roundings(masked: MaskedSetting) -> dict[str, float]:
    """By parameter, how far a gradient may be from the reference's by rounding; computed once."""
    if not masked.roundings:
        exacter = Exacter(masked, "train", "nchw")
        exacter.run()
        exact, rounded = exacter.gradients(), expected(masked, "train").gradients
        for name, gradient in rounded.items():
            distance = (exact[name] - gradient).norm()
            is_zero = exact[name].norm() < 0.5 * distance
            masked.roundings[name] = (ROUNDING_ALONE if is_zero else ROUNDINGS) * distance.item()
    return masked.roundings


def expected(masked: MaskedSetting, direction: str) -> Results:
    """The reference's results, computed once."""
    if direction not in masked.results:
        reference = Reference(masked, direction, "nchw")  # the layout in which torch's norms round the least
        masked.results[direction] = Results(reference.run(), reference.gradients())
    return masked.results[direction]


def _zeros_where_dead(live: Tensor) -> Callable[..., Tensor]:
    return lambda module, args, y: torch.where(live, y, y.new_zeros(()))


class MaskedMode(NetworkContender):
    """Full-width tensors between the layers, work skipped inside them."""

    family = "masked"
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
        return expected(self.masked, self.direction)

    def check(self, out: Tensor | None = None) -> None:
        super().check(out)
        for name, gradient in self.gradients().items():
            if self.masked.cut.dead(name, gradient).any():
                raise Wrong(f"{self.what()}: gradient of {name} is not exactly zero where it is dead")


class LiveMode(MaskedMode):
    """Only the live channels pass from layer to layer."""

    family = "live"

    def make(self) -> nn.Module:
        return pk.flow(super().make())


class CompactedMode(MaskedMode):
    """The small network that trains in the masked one's stead."""

    family = "compacted"

    def make_optimizer(self) -> torch.optim.Optimizer:
        self.full = self.model
        self.compaction = Compaction(self.full, self.images[:2], super().make_optimizer())
        self.model, optimizer = self.compaction.enter()
        assert optimizer is not None
        return optimizer

    def gradients(self) -> dict[str, Tensor]:
        """At full width, zeros where the small network has nothing."""
        return {name: self.compaction.widen(name, gradient) for name, gradient in super().gradients().items()}


class Small(NetworkContender):
    """The upper bound: plain layers that never had the dead filters. For joint masks this is the network built at that
    width, for independent ones the module form that pk.shrink makes of the masked network: the class and forward are
    the user's, as they are in compacted mode."""

    family = "small"

    def make(self) -> nn.Module:
        if self.masked.masks == "independent":
            return copy.deepcopy(self.masked.shrunk)
        setting, cut = self.setting, self.masked.cut
        model = setting.network.build(self.masked.keep_ratio).to(setting.device)
        model.load_state_dict({name: cut.small(name, value) for name, value in setting.state.items()})
        return model

    def expected(self) -> Results | None:
        want, cut = expected(self.masked, self.direction), self.masked.cut
        if self.masked.masks != "joint":  # shrink keeps all that meets in an add, so its parameters have other entries
            return Results(want.out, {})
        return Results(want.out, {name: cut.small(name, g) for name, g in want.gradients.items()})
