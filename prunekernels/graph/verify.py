"""Compares the small network with the masked one and names the first layer that differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .. import plan
from ..nn.example import Example
from ..nn.fixed_norm import FixedChannels
from ..nn.flow import flow
from ..nn.mask_buffers import MaskBuffers
from ..nn.reparametrized import deep_copy
from ..nn.sync_batch_norm import without_sync
from .build import Builder
from .narrow import keep_live_alone
from .replay import recorded, replayed
from .trace import Traced, fixed_size, has_free_batch, plain_copy, value_of

ROUNDING = 64  # units in the last place of the largest output
NAMED = 3  # norms in the line that shrink prints


class Misfit(Exception):
    """Says why the module form does not serve a network: "its forward fails ..." """


def verify(model: nn.Module, network: nn.Module, builder: Builder, why: str = "") -> str:
    """Describes the largest differences in one line; raises RuntimeError if one is more than rounding.

    The networks run in float64 if they can: then a difference is either a mistake or the rounding of a folded bias.
    why: why it is the graph form, for the line.
    """
    inputs = builder.traced.inputs
    eps = torch.finfo(dtype_of(model, inputs)).eps
    masked: nn.Module = deep_copy(model).eval()
    small = network.eval()
    doubled = _doubled(masked, small, inputs)
    if doubled is not None:
        masked, small = doubled
        rounded = builder.has_folded or builder.traced.computed  # biases, weights that are stored in the model's dtype
        inputs, eps = inputs.double(), eps if rounded else torch.finfo(torch.float64).eps
    worst = [0.0, 0.0]
    for i, given in enumerate((inputs, *_random_inputs(builder, inputs))):
        with torch.no_grad(), plan.measure(False):  # too few runs to be worth it
            want = _run(masked, given) if i == 0 else outcome(masked, given)
            if isinstance(want, Exception):  # model itself does not take this size
                continue
            got = _run(small, given) if i == 0 else _checked(small, given)
        if got is None:
            continue
        difference, magnitude = compare(want, got)
        tolerance = ROUNDING * eps * magnitude
        if not difference <= tolerance:
            name, there = _first_difference(network, builder, given, ROUNDING * eps)
            raise RuntimeError(
                f"shrink: {name}: expected the masked network's outputs to {tolerance:.3g}, got a difference of "
                f"{difference:.3g} ({there:.3g} in this layer)"
            )
        worst[i > 0] = max(worst[i > 0], difference)
    return _line(f"graph form{why}", model, network, worst)


def _line(form: str, model: nn.Module, network: nn.Module, worst: list[float]) -> str:
    before, after = (sum(p.numel() for p in net.parameters()) for net in (model, network))
    fixed = [name or "forward" for name, module in network.named_modules() if isinstance(module, FixedChannels)]
    more = f" and {len(fixed) - NAMED} more" if len(fixed) > NAMED else ""
    norms = f"; no plain norm serves in {', '.join(fixed[:NAMED])}{more}" if fixed else ""
    return (
        f"shrink: {form}, {before} -> {after} parameters; max abs difference {worst[0]:.3g} on the example, "
        f"{worst[1]:.3g} on random inputs{norms}"
    )


def verify_module(
    model: nn.Module,
    network: nn.Module,
    traced: Traced,
    narrow: Callable[[nn.Module], object],
    weights: Mapping[str, Tensor],
) -> str:
    """Like verify, for the module form: on the example, another batch and another size; raises Misfit.

    Zeros that are no masks' might hide a mistake, so the networks are compared with other values in their place too.
    narrow: makes a plain copy of model small. weights: see any_weights.
    """
    inputs = traced.inputs
    pairs = [(deep_copy(model).eval(), network)]
    full = plain_copy(model)
    if _fill_zeros(full, weights):
        small = deep_copy(full)
        narrow(small)
        keep_live_alone(full, traced.norm_masks)
        pairs.append((full, small))
    worst = [0.0, 0.0]
    for masked, small in pairs:
        eps, given = torch.finfo(dtype_of(model, inputs)).eps, inputs
        doubled = _doubled(masked, small, inputs)
        if doubled is not None:
            (masked, small), given = doubled, inputs.double()
            eps = eps if traced.computed else torch.finfo(torch.float64).eps  # weights stored in the model's dtype
        for i, trial in enumerate((given, *resized_inputs(given))):
            want = outcome(masked, trial)
            if isinstance(want, Exception):  # model itself does not take this size
                continue
            got = outcome(small, trial)
            if isinstance(got, Exception):
                raise Misfit(f"its forward fails on small layers: {str(got).splitlines()[0]}") from got
            difference = _difference(masked, small, trial, want, got, ROUNDING * eps)
            worst[i > 0] = max(worst[i > 0], difference)
    if only_trains(traced):
        check_training(model, network, traced)
    return _line("module form", model, network, worst)


def check_alike(model: nn.Module, network: nn.Module, inputs: Example) -> None:
    """Raises Misfit unless a small network gives the outputs of model in eval mode, on an example."""
    copies: list[nn.Module] = [deep_copy(model).eval(), deep_copy(network).eval()]
    for copied in copies:
        flow(copied, False) if any(isinstance(m, MaskBuffers) for m in copied.modules()) else None
    eps, given = torch.finfo(dtype_of(model, inputs)).eps, inputs
    doubled = _doubled(copies[0], copies[1], inputs)
    if doubled is not None:
        copies, given = list(doubled), inputs.double()
        eps = torch.finfo(torch.float64).eps
    want, got = outcome(copies[0], given), outcome(copies[1], given)
    if isinstance(want, Exception):
        raise want
    if isinstance(got, Exception):
        raise Misfit(f"its forward fails on small layers: {str(got).splitlines()[0]}") from got
    _difference(copies[0], copies[1], given, want, got, ROUNDING * eps)


def _difference(
    masked: nn.Module, small: nn.Module, inputs: Example, want: list[Any], got: list[Any], relative: float
) -> float:
    """The largest difference; raises Misfit if it is more than rounding, or than what rounding decides."""
    difference, magnitude = compare(want, got)
    if difference <= relative * magnitude:
        return difference

    def close(a: Tensor, b: Tensor) -> bool:
        apart, most = compare([a], [b])
        return apart <= relative * most

    with recorded(small) as calls:
        got = outcome(small, inputs)  # type: ignore[assignment]
    with replayed(masked, calls, close) as apart:
        want = outcome(masked, inputs)  # type: ignore[assignment]
    if not apart and isinstance(want, list) and isinstance(got, list):
        again, magnitude = compare(want, got)
        if again <= relative * magnitude:
            return again
    raise Misfit(f"its forward gives other outputs on small layers, by {difference:.3g}")


def only_trains(traced: Traced) -> bool:
    """Whether the training forward may differ from that in eval mode: by layers that the latter did not use."""
    used = {id(traced.tensors[name]) for node, name in traced.names.items() if node.users}
    return not all(id(p) in used for p in traced.model.parameters())


def check_training(model: nn.Module, network: nn.Module, traced: Traced) -> None:
    """Raises Misfit if the training forward of a small network fails where that of model does not."""
    want, got = (outcome(without_sync(deep_copy(net).train()), traced.inputs) for net in (model, network))
    if isinstance(got, Exception) and not isinstance(want, Exception):
        raise Misfit(f"its forward fails on small layers when it trains: {str(got).splitlines()[0]}") from got


def _checked(small: nn.Module, inputs: Example) -> list[Any] | None:
    """The outputs; None if the small network says that it does not take the sizes."""
    try:
        return _run(small, inputs)
    except AssertionError:
        return None


def outcome(network: nn.Module, inputs: Example) -> list[Any] | Exception:
    """The outputs, or the error."""
    try:
        with torch.no_grad(), plan.measure(False):
            return _run(network, inputs)
    except Exception as error:
        return error


@torch.no_grad()
def _fill_zeros(plain: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Writes random numbers in place of weights that are zero although the masks allow any value; whether there are."""
    generator, found = torch.Generator().manual_seed(0), False
    for name, parameter in plain.named_parameters():
        zero = (parameter == 0) & weights.get(name, parameter).isnan()
        if bool(zero.any()):
            values = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.5
            parameter.copy_(torch.where(zero, values.to(parameter), parameter))
            found = True
    return found


def resized_inputs(inputs: Example) -> list[Example]:
    """Random inputs: a batch of 3, a single one of other height, one of other height and width."""
    generator = torch.Generator().manual_seed(0)

    def noise(x: Tensor, batch: int, grows: int) -> Tensor:
        x = x[torch.arange(batch, device=x.device) % x.shape[0]] if x.dim() and x.shape[0] else x
        if not x.is_floating_point() or not x.numel():
            return x
        shape = list(x.shape)
        if x.dim() == 4:
            shape[2 : 2 + grows] = [_another(size) for size in shape[2 : 2 + grows]]
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64).to(x)
        return drawn * x.std(correction=0) + x.mean()

    sizes = ((3, 0), (1, 1), (1, 2))
    return [inputs.map(partial(noise, batch=batch, grows=grows)) for batch, grows in sizes]


def _another(size: int) -> int:
    """Another size of images, which a network that halves them five times takes as well."""
    return size - 32 if size > 96 else size + 32


def dtype_of(model: nn.Module, inputs: Example) -> torch.dtype:
    dtypes = [t.dtype for t in (*model.parameters(), *inputs.tensors) if t.is_floating_point()]
    return dtypes[0] if dtypes else torch.get_default_dtype()


def _doubled(masked: nn.Module, small: nn.Module, inputs: Example) -> tuple[nn.Module, nn.Module] | None:
    pair = deep_copy(masked).double(), deep_copy(small).double()
    try:
        with torch.no_grad(), plan.measure(False):
            for network in pair:
                _run(network, inputs.double())
    except Exception:  # a device or an operator without float64
        return None
    return pair


def _random_inputs(builder: Builder, inputs: Example) -> list[Example]:
    """Random inputs in batches of 3 and 1, or the example's if the trace fixed it; integers are the example's.

    Where image sizes are free, a single one of another size as well.
    """
    is_free = [has_free_batch(node) for node in builder.traced.placeholders]
    generator = torch.Generator().manual_seed(0)
    result = []
    for batch in (3, 1) if any(is_free) else (None,):
        given = []
        for x, free in zip(inputs.leaves, is_free, strict=True):
            if batch is not None and free:
                x = x[torch.arange(batch) % x.shape[0]]
            if isinstance(x, Tensor) and x.is_floating_point():
                noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
                x = noise * x.std(correction=0) + x.mean() if x.numel() else x
            given.append(x)
        result.append(inputs.with_leaves(given))
    values = [value_of(node) for node in builder.traced.placeholders]
    if any(fixed_size(size) is None for value in values if value is not None for size in value.shape[1:]):
        result += resized_inputs(inputs)[1:]
    return result


def _run(network: nn.Module, inputs: Example) -> list[Any]:
    """The output tensors."""
    return [leaf for leaf in pytree.tree_leaves(inputs.call(network)) if leaf is not None]


def compare(want: list[Any], got: list[Any]) -> tuple[float, float]:
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


def _first_difference(network: nn.Module, builder: Builder, inputs: Example, rounding: float) -> tuple[str, float]:
    """The first node of the small network that differs from the kept channels of its original, and by how much."""
    traced = builder.traced
    tensors = iter([traced.tensors[traced.names[n]] if n in traced.names else None
                    for n in traced.graph.nodes if n.op == "placeholder"])  # fmt: skip
    given = iter(inputs.leaves)
    dtype = next((x.dtype for x in inputs.tensors if x.is_floating_point()), torch.float64)
    values = [next(given) if t is None else t.detach().to(dtype) if t.is_floating_point() else t for t in tensors]
    original = _Recorder(traced.graph.owning_module, traced.graph)
    small = _Recorder(deep_copy(network).to(dtype))
    with torch.no_grad():
        original.run(*(x.clone() if isinstance(x, Tensor) else x for x in values))
        small.run(*inputs.map(torch.clone).leaves, enable_io_processing=False)
    sources = {new.name: old for new, old in builder.sources.items()}
    for node in small.module.graph.nodes:  # type: ignore[union-attr]
        source = sources.get(node.name)
        if source is None or not isinstance(small.env.get(node), Tensor):
            continue
        want, x = original.env[source], builder.net.tracked(source)
        if x is not None:
            want = want.index_select(x.axis, builder.kept.of(x).to(want.device))
        difference, magnitude = compare([want], [small.env[node]])
        if not difference <= rounding * magnitude:
            return traced.describe(source), difference
    return "output", float("nan")
