"""Compares the small network with the masked one and names the first layer that differs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .. import plan
from ..nn.reparametrized import deep_copy
from .build import Builder

ROUNDING = 64  # units in the last place of the largest output


def verify(model: nn.Module, network: nn.Module, builder: Builder) -> str:
    """Describes the largest differences in one line; raises RuntimeError if one is more than rounding.

    The networks run in float64 if they can: then a difference is either a mistake or the rounding of a folded bias.
    """
    inputs = builder.traced.inputs
    eps = torch.finfo(_dtype_of(model, inputs)).eps
    masked: nn.Module = deep_copy(model).eval()
    small = network.eval()
    doubled = _doubled(masked, small, inputs)
    if doubled is not None:
        masked, small = doubled
        rounded = builder.has_folded or builder.traced.computed  # biases, weights that are stored in the model's dtype
        inputs, eps = _as_double(inputs), eps if rounded else torch.finfo(torch.float64).eps
    worst = [0.0, 0.0]
    for i, given in enumerate((inputs, *_random_inputs(builder, inputs))):
        with torch.no_grad(), plan.measure(False):  # too few runs to be worth it
            want, got = _run(masked, given), _run(small, given)
        difference, magnitude = _compare(want, got)
        tolerance = ROUNDING * eps * magnitude
        if not difference <= tolerance:
            name, there = _first_difference(network, builder, given, ROUNDING * eps)
            raise RuntimeError(
                f"shrink: {name}: expected the masked network's outputs to {tolerance:.3g}, got a difference of "
                f"{difference:.3g} ({there:.3g} in this layer)"
            )
        worst[i > 0] = max(worst[i > 0], difference)
    before, after = (sum(p.numel() for p in net.parameters()) for net in (model, network))
    return (
        f"shrink: {before} -> {after} parameters; max abs difference {worst[0]:.3g} on the example, "
        f"{worst[1]:.3g} on random inputs"
    )


def _dtype_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> torch.dtype:
    dtypes = [t.dtype for t in (*model.parameters(), *inputs) if t.is_floating_point()]
    return dtypes[0] if dtypes else torch.get_default_dtype()


def _as_double(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


def _doubled(masked: nn.Module, small: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[nn.Module, nn.Module] | None:
    pair = deep_copy(masked).double(), copy.deepcopy(small).double()
    try:
        with torch.no_grad(), plan.measure(False):
            for network in pair:
                _run(network, _as_double(inputs))
    except Exception:  # a device or an operator without float64
        return None
    return pair


def _random_inputs(builder: Builder, inputs: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """Random inputs in batches of 3 and 1, or the example's if the trace fixed it; integers are the example's."""
    first = builder.traced.placeholders[0].meta["val"]
    free = first.dim() > 0 and isinstance(first.shape[0], torch.SymInt)
    generator = torch.Generator().manual_seed(0)
    result = []
    for batch in (3, 1) if free else (None,):
        given = []
        for x, node in zip(inputs, builder.traced.placeholders, strict=True):
            if batch is not None and isinstance(node.meta["val"].shape[0] if x.dim() else 0, torch.SymInt):
                x = x[torch.arange(batch) % x.shape[0]]
            if x.is_floating_point():
                noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
                x = noise * x.std(correction=0) + x.mean() if x.numel() else x
            given.append(x)
        result.append(tuple(given))
    return result


def _run(network: nn.Module, inputs: tuple[Tensor, ...]) -> list[Any]:
    """The output tensors. The network gets copies of the inputs, since it may write into them."""
    output = network(*(x.clone() for x in inputs))
    return [leaf for leaf in pytree.tree_leaves(output) if leaf is not None]


def _compare(want: list[Any], got: list[Any]) -> tuple[float, float]:
    """Largest difference and largest value. Another structure or shape, or a NaN on one side, counts as infinite."""
    difference = magnitude = 0.0
    if len(want) != len(got):
        return float("inf"), magnitude
    for a, b in zip(want, got, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            difference = max(difference, 0.0 if a == b else float("inf"))
        elif a.shape != b.shape:
            difference = float("inf")
        elif a.numel():
            a, b = a.double(), b.double()
            apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
            difference = max(difference, torch.nan_to_num(apart, nan=float("inf")).max().item())
            finite = a[a.isfinite()]
            magnitude = max(magnitude, finite.abs().max().item() if finite.numel() else 0.0)
    return difference, magnitude


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps every value."""

    def __init__(self, module: Any, graph: fx.Graph | None = None) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)


def _first_difference(
    network: nn.Module, builder: Builder, inputs: tuple[Tensor, ...], rounding: float
) -> tuple[str, float]:
    """The first node of the small network that differs from the kept channels of its original, and by how much."""
    traced = builder.traced
    tensors = iter([traced.tensors[traced.names[n]] if n in traced.names else None
                    for n in traced.graph.nodes if n.op == "placeholder"])  # fmt: skip
    given = iter(inputs)
    dtype = next((x.dtype for x in inputs if x.is_floating_point()), torch.float64)
    values = [next(given) if t is None else t.detach().to(dtype) if t.is_floating_point() else t for t in tensors]
    original = _Recorder(traced.graph.owning_module, traced.graph)
    small = _Recorder(copy.deepcopy(network).to(dtype))
    with torch.no_grad():
        original.run(*(x.clone() for x in values))
        small.run(*(x.clone() for x in inputs))
    sources = {new.name: old for new, old in builder.sources.items()}
    for node in small.module.graph.nodes:  # type: ignore[union-attr]
        source = sources.get(node.name)
        if source is None or not isinstance(small.env.get(node), Tensor):
            continue
        want, x = original.env[source], builder.net.tracked(source)
        if x is not None:
            want = want.index_select(x.axis, builder.kept.of(x).to(want.device))
        difference, magnitude = _compare([want], [small.env[node]])
        if not difference <= rounding * magnitude:
            return traced.describe(source), difference
    return "output", float("nan")
