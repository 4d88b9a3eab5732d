"""Criteria: what a filter is worth. The filters with the smallest scores are pruned.

Functions of weights score what they get. Classes gather over the steps of an epoch; a method starts them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..filter_ops import channel_mean, filter_norms, mask_grad_

if TYPE_CHECKING:
    from .base import Method

Scores = dict[str, Tensor]


def l1(weights: Sequence[Tensor]) -> list[Tensor]:
    """sum |w| of each filter."""
    return [filter_norms([w.detach()], p=1)[0] for w in weights]


def l2(weights: Sequence[Tensor]) -> list[Tensor]:
    """sqrt(sum w^2) of each filter."""
    return [filter_norms([w.detach()], p=2)[0] for w in weights]


def geometric_median(weights: Sequence[Tensor]) -> list[Tensor]:
    """FPGM: the sum of a filter's L2 distances to the others of its layer; near the middle it is replaceable."""
    flat = [w.detach().flatten(1) for w in weights]
    flat = [w if w.dtype == torch.float64 else w.float() for w in flat]
    return [torch.cdist(w, w, compute_mode="donot_use_mm_for_euclid_dist").sum(1) for w in flat]


class Criterion:
    """A method calls start once, begin_epoch before each epoch and scores at its end."""

    needs_steps = False  # has no scores before the first steps

    def start(self, method: Method) -> None:
        """method: tells layers, optimizer, structure and the generator."""
        self.method = method

    def begin_epoch(self) -> None:
        """What was gathered is over."""

    def scores(self) -> Scores:
        """[K] by layer."""
        raise NotImplementedError

    def stop(self) -> None:
        """Takes its hooks off."""

    def state_dict(self) -> dict[str, Any]:
        """What was gathered in this epoch so far."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse."""


class OfWeights(Criterion):
    """A function of weights, as l1."""

    def __init__(self, function: Callable[[list[Tensor]], list[Tensor]]) -> None:
        self.function = function

    def scores(self) -> Scores:
        layers = self.method.layers
        values = self.function([layer.weight.detach() for layer in layers.values()])
        return dict(zip(layers, values, strict=True))


class Random(Criterion):
    """Uniform numbers from the method's generator."""

    def scores(self) -> Scores:
        generator = self.method.generator
        return {n: torch.rand(layer.out_channels, generator=generator) for n, layer in self.method.layers.items()}


class Gathered(Criterion):
    """Numbers gathered from the gradients of each optimizer step, in one pass over all layers."""

    needs_steps = True
    before_step = False  # gathers before the weights change, not after

    def start(self, method: Method) -> None:
        super().start(method)
        self.sums: Scores = {}
        register = method.before_step if self.before_step else method.optimizer.register_step_post_hook
        self.hooks: list[Any] = [register(lambda *_: None if method.finished else self.gather())]

    def begin_epoch(self) -> None:
        self.sums = {}

    def stop(self) -> None:
        for hook in self.hooks:
            hook.remove()

    @torch.no_grad()
    def gather(self) -> None:
        """Adds what the weights' gradients are now."""
        batches: dict[tuple[torch.device, torch.dtype], list[str]] = {}
        layers = self.method.layers
        for name, layer in layers.items():
            weight = layer.weight
            if weight.grad is not None:
                if name not in self.sums:
                    self.sums[name] = self.empty(weight)
                batches.setdefault((weight.device, weight.dtype), []).append(name)
        for names in batches.values():
            weights = [layers[name].weight.detach() for name in names]
            grads: list[Tensor] = [layers[name].weight.grad for name in names]  # type: ignore[misc]
            self.add(weights, grads, [self.sums[name] for name in names])

    def empty(self, weight: Tensor) -> Tensor:
        """Zeros [K]."""
        return torch.zeros(len(weight), dtype=_sum_type(weight), device=weight.device)

    def add(self, weights: list[Tensor], grads: list[Tensor], sums: list[Tensor]) -> None:
        raise NotImplementedError

    def finish(self, total: Tensor) -> Tensor:
        """The score [K] of what was gathered."""
        return total

    def scores(self) -> Scores:
        op = type(self.method).__name__
        for name in self.method.layers:
            if name not in self.sums:
                raise ValueError(f"{op}: {name}: expected gradients in this epoch's steps, got none (see skip)")
        return {name: self.finish(self.sums[name]) for name in self.method.layers}

    def state_dict(self) -> dict[str, Any]:
        return {name: total.clone() for name, total in self.sums.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        layers = self.method.layers
        self.sums = {name: total.to(layers[name].weight.device).clone() for name, total in state.items()}


class GradientSum(Gathered):
    """PGP: ||sum of gradients||_1, by how much plain SGD would change the weights. Needs a buffer of their size."""

    def empty(self, weight: Tensor) -> Tensor:
        return torch.zeros_like(weight, dtype=_sum_type(weight))

    def add(self, weights: list[Tensor], grads: list[Tensor], sums: list[Tensor]) -> None:
        mask_grad_(grads, accumulated=sums)

    def finish(self, total: Tensor) -> Tensor:
        return l1([total])[0]

    def measure(self, losses: Iterable[Tensor]) -> None:
        """Replaces what was gathered by the gradients of these losses, made one after another with the model in eval
        mode; the parameters' own gradients stay."""
        model = self.method.model
        was_training = {module: module.training for module in model.modules()}
        held = [(p, p.grad) for p in model.parameters()]
        self.sums = {}
        model.eval()
        try:
            for loss in losses:
                for p, _ in held:
                    p.grad = None
                loss.backward()
                self.gather()
        finally:
            for p, grad in held:
                p.grad = grad
            for module, training in was_training.items():
                module.training = training


class GradientNorms(Gathered):
    """RPGP: the sum over steps of ||gradient||_1."""

    def add(self, weights: list[Tensor], grads: list[Tensor], sums: list[Tensor]) -> None:
        mask_grad_(grads, abs_sums=sums, add_to_sums=True)


class Taylor(Gathered):
    """|sum over steps and the filter of w g|: by how much the loss changes without it, to first order."""

    before_step = True

    def add(self, weights: list[Tensor], grads: list[Tensor], sums: list[Tensor]) -> None:
        mask_grad_(grads, weights=weights, product_sums=sums, add_to_sums=True)

    def finish(self, total: Tensor) -> Tensor:
        return total.abs()


class UpdateNorm(Gathered):
    """The sum over steps of ||change of weights||_1, momentum and weight decay included.

    A masked optimizer gives it for free; beside any other it keeps a copy of the weights.
    """

    def start(self, method: Method) -> None:
        super().start(method)
        self.before: dict[Tensor, Tensor] = {}
        weights: list[Tensor] = [layer.weight for layer in method.layers.values()]
        if hasattr(method.optimizer, "track_updates"):
            method.optimizer.track_updates(weights)
        else:
            self.hooks.append(method.optimizer.register_step_pre_hook(lambda *_: self._copy(weights)))

    @torch.no_grad()
    def _copy(self, weights: list[Tensor]) -> None:
        if not self.before:
            self.before = {weight: torch.empty_like(weight) for weight in weights}
        for weight, before in self.before.items():
            before.copy_(weight)

    @torch.no_grad()
    def gather(self) -> None:
        for name, layer in self.method.layers.items():
            weight = layer.weight
            if weight.grad is None:
                continue
            if self.before:
                change = l1([weight - self.before[weight]])[0]
            else:
                change = self.method.optimizer.updates[weight][0]  # type: ignore[attr-defined]
            self.sums[name] = change.clone() if name not in self.sums else self.sums[name].add_(change)


class MeanActivation(Criterion):
    """The mean of relu(activation) of each filter's channel, behind its norm if that is known.

    batches: of how many forward passes in training mode at the start of each epoch; hooks cost the network gear's
    speed while they are there. In data-parallel training each process sees its own images: let one decide.
    """

    needs_steps = True

    def __init__(self, batches: int = 8) -> None:
        self.batches = batches
        self.hooks: list[Any] = []

    def begin_epoch(self) -> None:
        self.stop()
        self.sums: Scores = {}
        self.images: dict[str, int] = {}
        self.passes: dict[str, int] = {}
        if self.method.finished:
            return
        model, norms = self.method.model, self.method.structure.norms or {}
        for name in self.method.layers:
            where = model.get_submodule(next(iter(norms.get(name, [])), name))
            self.hooks.append(where.register_forward_hook(lambda m, _, y, name=name: self._add(name, m, y)))

    def stop(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def _add(self, name: str, module: nn.Module, y: Tensor) -> None:
        if not module.training:
            return
        if self.passes.get(name, 0) == self.batches:
            self.stop()
            return
        total = channel_mean([y.detach()], relu=True)[0] * len(y)
        self.sums[name] = total if name not in self.sums else self.sums[name] + total
        self.images[name] = self.images.get(name, 0) + len(y)
        self.passes[name] = self.passes.get(name, 0) + 1

    def scores(self) -> Scores:
        op = type(self.method).__name__
        for name in self.method.layers:
            if name not in self.sums:
                raise ValueError(f"{op}: {name}: expected forward passes in training mode in this epoch, got none")
        return {name: total / max(1, self.images[name]) for name, total in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        sums = {name: total.clone() for name, total in self.sums.items()}
        return {"sums": sums, "images": dict(self.images), "passes": dict(self.passes)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        layers = self.method.layers
        self.sums = {name: total.to(layers[name].weight.device) for name, total in state["sums"].items()}
        self.images, self.passes = dict(state["images"]), dict(state["passes"])


CRITERIA: dict[str, Callable[[], Criterion]] = {
    "l1": lambda: OfWeights(l1),
    "l2": lambda: OfWeights(l2),
    "geometric_median": lambda: OfWeights(geometric_median),
    "random": Random,
    "gradient_sum": GradientSum,
    "gradient_norms": GradientNorms,
    "taylor": Taylor,
    "update_norm": UpdateNorm,
    "mean_activation": MeanActivation,
}


def make_criterion(op: str, criterion: object) -> Criterion:
    """A name, a Criterion or a function of weights."""
    if isinstance(criterion, Criterion):
        return criterion
    if isinstance(criterion, str) and criterion in CRITERIA:
        return CRITERIA[criterion]()
    if callable(criterion):
        return OfWeights(criterion)
    names = ", ".join(CRITERIA)
    raise ValueError(f"{op}: criterion: expected one of {names}, a function or a Criterion, got {criterion!r}")


def _sum_type(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
