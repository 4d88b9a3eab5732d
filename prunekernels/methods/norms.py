"""recalibrate_norms: the running statistics of batch norms, estimated anew for what a pruning left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import plan
from ..nn.example import Example
from ..nn.masked_norm import MaskedNorm
from . import ranks
from .arguments import expect, unwrapped

OP = "recalibrate_norms"


class _Before(NamedTuple):
    """What a norm had."""

    momentum: float | None
    batches: Tensor | None
    mean: Tensor
    var: Tensor


@torch.no_grad()
def recalibrate_norms(model: nn.Module, batches: Iterable[Any], *, process_group: Any = None) -> int:
    """Estimates the running statistics of batch norms anew, as means over some batches.

    A pruning takes inputs away from the layers behind it, while the statistics of their norms are those of the wider
    network. Where no training follows, accuracy in eval mode suffers. This runs the batches through the network with
    its norms in training mode and everything else in eval mode: no weight moves, and nothing is dropped out. Of masked
    norms dead channels keep their statistics. Norms in eval mode within a network in training mode are taken as frozen
    and left alone. Works in masked, live and compacted mode and on plain networks. An error changes nothing.

    Args:
        model: A network with batch norms.
        batches: What the network takes, a batch each: a tensor, a dict of arguments by name or an Example. Of a tuple
            or a list, such as (x, y) of a data loader, it takes the first. Ten to twenty batches are enough.
        process_group: The ranks that estimate together, each from its own batches. None: the default group.

    Returns:
        How many batches there were.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4)).eval()
        >>> pk.methods.recalibrate_norms(net, [torch.randn(8, 1, 6, 6) for _ in range(10)])
        10
    """
    model = unwrapped(model)
    norms: list[Any] = [m for m in model.modules() if _is_estimated(m) and (m.training or not model.training)]
    expect(OP, bool(norms), "model", "batch norms with running statistics", "none")
    device = norms[0].running_mean.device
    count = 0
    with _estimating(model, norms) as before, plan.measure(False):
        for batch in batches:
            first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
            Example.of(f"{OP}: batches", first).map(lambda x: x.to(device)).call(model)
            count += 1
        expect(OP, count > 0, "batches", "at least one", "none")
        _average(norms, before, process_group)
    return count


def _is_estimated(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None


@contextmanager
def _estimating(model: nn.Module, norms: list[Any]) -> Iterator[list[_Before]]:
    """Norms average over all batches inside the block; afterwards modes, momentum and counts are as before."""
    training = {module: module.training for module in model.modules()}
    before = [
        _Before(
            norm.momentum,
            None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone(),
            norm.running_mean.clone(),
            norm.running_var.clone(),
        )
        for norm in norms
    ]
    model.eval()
    try:
        for norm in norms:
            norm.train()
            norm.momentum = None  # a cumulative average
            if norm.num_batches_tracked is None:
                norm.num_batches_tracked = torch.zeros((), dtype=torch.long, device=norm.running_mean.device)
            norm.num_batches_tracked.zero_()
        yield before
    except BaseException:
        for norm, old in zip(norms, before, strict=True):
            norm.running_mean.copy_(old.mean)
            norm.running_var.copy_(old.var)
        raise
    finally:
        for norm, old in zip(norms, before, strict=True):
            norm.momentum = old.momentum
            if old.batches is None:
                norm.num_batches_tracked = None
            else:
                norm.num_batches_tracked.copy_(old.batches)
        for module, mode in training.items():
            module.training = mode


def _average(norms: list[Any], before: list[_Before], process_group: Any) -> None:
    """Makes the statistics of live channels their means over the ranks."""
    names = ("running_mean", "running_var")
    own = {f"{name} {i}": getattr(norm, name) for i, norm in enumerate(norms) for name in names}
    means = ranks.mean(own, process_group)
    if means is own:
        return
    for i, (norm, old) in enumerate(zip(norms, before, strict=True)):
        for name, dead in zip(names, (old.mean, old.var), strict=True):
            mean = means[f"{name} {i}"].to(dead)
            live = norm.channel_mask if isinstance(norm, MaskedNorm) else torch.ones_like(mean, dtype=torch.bool)
            getattr(norm, name).copy_(torch.where(live, mean, dead))
