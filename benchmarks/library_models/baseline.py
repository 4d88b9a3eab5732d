"""The same network by Torch-Pruning: half of each of its groups, the filters of least norm, outputs left alone."""

from __future__ import annotations

import contextlib
import io
import signal
import warnings
from collections.abc import Iterator

import torch
from torch import nn

import prunekernels as pk
from library_models.catalog import CLASSES, Built
from library_models.checks import RATE, Found, floats, prepare
from prunekernels.graph.analysis import ChannelAnalysis
from prunekernels.graph.layer_uses import any_weights, layer_uses
from prunekernels.graph.outputs import output_ids
from prunekernels.graph.rules.layers import WeightRule
from prunekernels.graph.trace import trace
from prunekernels.nn.example import Example


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in what takes more processor time."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done in {seconds} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def check(built: Built, outputs: set[str], seconds: float) -> Found:
    """outputs: names of the layers that are left alone; seconds: of processor time."""
    found = Found()
    whole, example = prepare(built.model).float().eval(), Example.of("models", built.example)
    model, given = built.core or (whole, built.example)
    given = Example.of("models", given)
    with found.asking("torch_pruning"), limited(seconds):
        import torch_pruning as tp

        found.numbers["dense"] = pk.count_flops(whole, example).dense
        with torch.no_grad():
            shapes = [y.shape for y in floats(given.call(model))]
        ignored = [module for name, module in model.named_modules() if name in outputs]
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            pruner = tp.pruner.BasePruner(
                model,
                given.kwargs or given.args[0],
                importance=tp.importance.MagnitudeImportance(p=2),
                pruning_ratio=RATE,
                ignored_layers=ignored,
            )
            pruner.step()
        with torch.no_grad():
            got = [y.shape for y in floats(given.call(model))]
        if got != shapes:
            raise RuntimeError(
                f"outputs of other shapes: {[list(y) for y in got]} instead of {[list(y) for y in shapes]}"
            )
        found.numbers["small"] = pk.count_flops(whole, example).dense
    return found


def outputs_of(built: Built) -> set[str]:
    """The convolutions and linear layers whose channels reach the output without another layer in between.

    Where the network cannot be traced, those with as many channels as there are classes.
    """
    model, example = built.core or (built.model, built.example)
    try:
        traced = trace("models", model.eval(), example)
    except ValueError:
        return {name for name, module in model.named_modules() if CLASSES in sizes_of(module)}
    analysis = ChannelAnalysis(traced, any_weights(model, traced))
    roots = analysis.classes.roots()
    outputs = torch.zeros(roots.numel(), dtype=torch.bool)
    outputs[roots[output_ids(analysis)]] = True
    uses = layer_uses(analysis, WeightRule)
    return {name for name, ends in uses.items() if any(bool(outputs[roots[out.ids]].any()) for _, out in ends)}


def sizes_of(module: nn.Module) -> tuple[int, ...]:
    return (getattr(module, "out_channels", -1), getattr(module, "out_features", -1))
