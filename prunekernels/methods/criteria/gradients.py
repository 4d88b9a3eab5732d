"""Criteria that gather numbers from the gradients of each optimizer step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...filter_ops import mask_grad_
from ..view import MethodView
from .criterion import Criterion, Scores
from .weights import l1


class Gathered(Criterion):
    """Scores filters by sums over the epoch's optimizer steps, gathered in one pass over all layers a step.

    A subclass overrides `add` and, where they differ, `empty` and `finish`.

    Attributes:
        before_step: Whether to gather before the weights change rather than after it.
        reads_weights: Whether `add` reads weights: in compacted mode they are then written back before.

    Examples:
        >>> class GradientSquares(pk.methods.criteria.Gathered):
        ...     def add(self, weights, grads, sums):
        ...         for grad, total in zip(grads, sums):
        ...             total += grad.square().sum((1, 2, 3))
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 2, 3))
        >>> report = pk.convert(net)
        >>> optimizer = torch.optim.SGD(net.parameters(), 0.1)
        >>> method = pk.methods.SFP(net, optimizer, rate=0.5, epochs=2, criterion=GradientSquares())
        >>> loss = net(torch.randn(2, 1, 8, 8)).square().sum()
        >>> loss.backward(); optimizer.step(); method.step()
        >>> method.end_epoch()["0"]
        Counts(live=2, soft=2, hard=0, returned=0)
    """

    needs_steps = True
    before_step = False
    reads_weights = True

    def start(self, method: MethodView) -> None:
        super().start(method)
        self.sums: Scores = {}
        when = lambda: not method.finished  # noqa: E731
        if self.before_step:
            hook = method.before_step(self.gather, when=when, changes_gradients=False)
        else:
            hook = method.after_step(self.gather, when=when, reads_weights=self.reads_weights)
        self.hooks: list[Any] = [hook]

    def begin_epoch(self) -> None:
        self.sums = {}

    def stop(self) -> None:
        for hook in self.hooks:
            hook.remove()

    @torch.no_grad()
    def gather(self) -> None:
        """Adds the gradients that the weights have now."""
        batches: dict[tuple[torch.device, torch.dtype], list[str]] = {}
        layers = self.method.layers
        for name, layer in layers.items():
            weight = layer.weight
            if weight.grad is not None:
                if name not in self.sums:
                    self.sums[name] = self.empty(layer.filters_first(weight.detach()))
                batches.setdefault((weight.device, weight.dtype), []).append(name)
        for names in batches.values():
            weights = [layers[name].filters_first(layers[name].weight.detach()) for name in names]
            grads: list[Tensor] = [layers[name].filters_first(layers[name].weight.grad) for name in names]  # type: ignore
            self.add(weights, grads, [self.sums[name] for name in names])

    def empty(self, weight: Tensor) -> Tensor:
        """Returns the sum of nothing: zeros [K], in the type that sums are made in."""
        return torch.zeros(len(weight), dtype=_sum_type(weight), device=weight.device)

    def add(self, weights: list[Tensor], grads: list[Tensor], sums: list[Tensor]) -> None:
        """Adds one step's numbers to the sums, in place.

        Args:
            weights: By layer, [K, C / groups, R, S]; all lists have the same layers, of one device and dtype.
            grads: By layer, the weight's gradient.
            sums: By layer, what `empty` returned and earlier steps added to.
        """
        raise NotImplementedError

    def finish(self, total: Tensor) -> Tensor:
        """Returns the scores [K] from the sum over the epoch."""
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
    """Scores filters by ||sum over steps of the gradient||_1: by how much plain SGD would change them (PGP).

    Needs a buffer of the weights' size.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 2, 3))
        >>> report = pk.convert(net)
        >>> optimizer = torch.optim.SGD(net.parameters(), 0.1)
        >>> method = pk.methods.SFP(net, optimizer, rate=0.5, epochs=2, criterion="gradient_sum")
        >>> loss = net(torch.randn(2, 1, 8, 8)).square().sum()
        >>> loss.backward(); optimizer.step(); method.step()
        >>> method.end_epoch()["0"]
        Counts(live=2, soft=2, hard=0, returned=0)
    """

    reads_weights = False

    def empty(self, weight: Tensor) -> Tensor:
        return torch.zeros_like(weight, dtype=_sum_type(weight))

    def add(self, weights: list[Tensor], grads: list[Tensor], sums: list[Tensor]) -> None:
        mask_grad_(grads, accumulated=sums)

    def finish(self, total: Tensor) -> Tensor:
        return l1([total])[0]

    def measure(self, losses: Iterable[Tensor]) -> None:
        """Replaces what was gathered by the gradients of these losses; the parameters' own gradients stay.

        Args:
            losses: Scalars, computed lazily one after another: the model is in eval mode while they are made.
        """
        networks = self.method.net, self.method.model  # losses may be of either
        self.method.write_back()
        was_training = {module: module.training for network in networks for module in network.modules()}
        held = [(p, p.grad) for p in dict.fromkeys(p for network in networks for p in network.parameters())]
        self.sums = {}
        for network in networks:
            network.eval()
        try:
            for loss in losses:
                for p, _ in held:
                    p.grad = None
                loss.backward()
                with self.method.full_gradients(added=True):
                    self.gather()
        finally:
            for p, grad in held:
                p.grad = grad
            for module, training in was_training.items():
                module.training = training


class GradientNorms(Gathered):
    """Scores filters by the sum over steps of ||gradient||_1 (RPGP). Needs one number a filter.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 2, 3))
        >>> report = pk.convert(net)
        >>> optimizer = torch.optim.SGD(net.parameters(), 0.1)
        >>> method = pk.methods.SFP(net, optimizer, rate=0.5, epochs=2, criterion="gradient_norms")
        >>> loss = net(torch.randn(2, 1, 8, 8)).square().sum()
        >>> loss.backward(); optimizer.step(); method.step()
        >>> method.end_epoch()["0"]
        Counts(live=2, soft=2, hard=0, returned=0)
    """

    reads_weights = False

    def add(self, weights: list[Tensor], grads: list[Tensor], sums: list[Tensor]) -> None:
        mask_grad_(grads, abs_sums=sums, add_to_sums=True)


class Taylor(Gathered):
    """Scores filters by |sum over steps and weights of w g|: how the loss changes without them, to first order.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 2, 3))
        >>> report = pk.convert(net)
        >>> optimizer = torch.optim.SGD(net.parameters(), 0.1)
        >>> method = pk.methods.SFP(net, optimizer, rate=0.5, epochs=2, criterion="taylor")
        >>> loss = net(torch.randn(2, 1, 8, 8)).square().sum()
        >>> loss.backward(); optimizer.step(); method.step()
        >>> method.end_epoch()["0"]
        Counts(live=2, soft=2, hard=0, returned=0)
    """

    before_step = True

    def add(self, weights: list[Tensor], grads: list[Tensor], sums: list[Tensor]) -> None:
        mask_grad_(grads, weights=weights, product_sums=sums, add_to_sums=True)

    def finish(self, total: Tensor) -> Tensor:
        return total.abs()


class UpdateNorm(Gathered):
    """Scores filters by the sum over steps of ||change of the weights||_1, momentum and weight decay included.

    The masked optimizers compute it in the step itself; with any other optimizer, in compacted mode, and where a layer
    is a transposed convolution, a copy of the weights is kept.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 2, 3))
        >>> report = pk.convert(net)
        >>> optimizer = torch.optim.SGD(net.parameters(), 0.1)
        >>> method = pk.methods.SFP(net, optimizer, rate=0.5, epochs=2, criterion="update_norm")
        >>> loss = net(torch.randn(2, 1, 8, 8)).square().sum()
        >>> loss.backward(); optimizer.step(); method.step()
        >>> method.end_epoch()["0"]
        Counts(live=2, soft=2, hard=0, returned=0)
    """

    def start(self, method: MethodView) -> None:
        super().start(method)
        self.before: dict[Tensor, Tensor] = {}
        first = all(layer.filters_first(layer.weight) is layer.weight for layer in method.layers.values())
        self._measures = first and hasattr(method.optimizer, "track_updates")
        if self._measures:
            method.optimizer.track_updates([layer.weight for layer in method.layers.values()])  # type: ignore[attr-defined]
        self.hooks.append(method.before_step(self._copy, when=self._compares, changes_gradients=False))

    def _compares(self) -> bool:
        """Whether this step's changes follow from a copy of the weights: those of the small network always do."""
        return not self.method.finished and (self.method.is_compacted or not self._measures)

    @torch.no_grad()
    def _copy(self) -> None:
        for weight in (layer.weight for layer in self.method.layers.values()):
            if weight not in self.before:
                self.before[weight] = torch.empty_like(weight)
            self.before[weight].copy_(weight)

    @torch.no_grad()
    def gather(self) -> None:
        for name, layer in self.method.layers.items():
            weight = layer.weight
            if weight.grad is None:
                continue
            if self._compares():
                change = l1([layer.filters_first(weight - self.before[weight])])[0]
            else:
                change = self.method.optimizer.updates[weight][0]  # type: ignore[attr-defined]
            self.sums[name] = change.clone() if name not in self.sums else self.sums[name].add_(change)


def _sum_type(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
