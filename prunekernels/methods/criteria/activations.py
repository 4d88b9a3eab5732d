"""MeanActivation: a criterion that looks at the outputs of forward passes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...filter_ops import channel_mean
from .criterion import Criterion, Scores


class MeanActivation(Criterion):
    """Scores filters by the mean of relu(activation) of their channels, behind the norm where that is known.

    Hooks are on the layers while it gathers, and cost live mode its speed. Of several ranks each sees its own images;
    the method takes the mean of their scores.

    Args:
        batches: How many forward passes in training mode to average, at the start of each epoch.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 2, 3))
        >>> report = pk.convert(net)
        >>> optimizer = torch.optim.SGD(net.parameters(), 0.1)
        >>> criterion = pk.methods.criteria.MeanActivation(batches=2)  # or criterion="mean_activation"
        >>> method = pk.methods.SFP(net, optimizer, rate=0.5, epochs=2, criterion=criterion)
        >>> loss = net(torch.randn(2, 1, 8, 8)).square().sum()
        >>> loss.backward(); optimizer.step(); method.step()
        >>> method.end_epoch()["0"]
        Counts(live=2, soft=2, hard=0, returned=0)
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
        norms = self.method.channel_masks.norms or {}
        for name in self.method.layers:
            where = next(iter(norms.get(name, [])), name)
            hook = partial(self._add, name, where)
            self.hooks.append(self.method.forward_hook(where, lambda m, _, y, hook=hook: hook(m, y)))

    def stop(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def _add(self, name: str, where: str, module: nn.Module, y: Tensor) -> None:
        """Adds what a forward pass of module gave. where: its name, which is the layer's or that of its norm."""
        if not module.training or not torch.is_grad_enabled():  # say, a pass of recalibrate_norms
            return
        if self.passes.get(name, 0) == self.batches:
            self.stop()
            return
        y = y.detach()
        if isinstance(self.method.layers[name], nn.Linear):  # its channels are the last dimension
            y = y.movedim(-1, 1)
        total = channel_mean([y], relu=True)[0] * len(y)
        rows = None if module is self.method.model.get_submodule(where) else self.method.rows(where)
        if rows is not None:  # a module of the small network
            small, total = total, total.new_zeros(self.method.layers[name].out_channels)
            total[rows[rows >= 0].to(total.device)] = small[(rows >= 0).to(total.device)]
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
