"""time_modes: what a pass of a network takes in masked, live and compacted mode."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import plan
from ..compaction.compaction import Compaction
from ..live.tensor import full_width
from ..nn.example import Example
from ..nn.flow import compiled_parts
from ..nn.mask_buffers import MaskBuffers
from .observe import masked_where_compiled

MODES = ("masked", "live", "compacted")
SETTLES = 24  # passes at most in which plans are tried
Run = Callable[[], object]


@dataclass
class ModeTimes:
    """What time_modes() measured; print it to see one line.

    Attributes:
        ms: By mode, milliseconds of one pass; None where the network cannot run in that mode.
        reasons: By mode that the network cannot run in, why.
        backward: Whether the times hold the backward pass too.

    Examples:
        >>> times = pk.ModeTimes({"masked": 4.0, "live": 2.0}, {}, backward=True)
        >>> times.best
        'live'
        >>> print(times)
        forward and backward: masked 4.0 ms, live 2.0 ms; live is the fastest
    """

    ms: dict[str, float | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    backward: bool = True

    @property
    def best(self) -> str | None:
        """The mode that took the least time; None if the network runs in none."""
        timed = {mode: ms for mode, ms in self.ms.items() if ms is not None}
        return min(timed, key=lambda mode: timed[mode]) if timed else None

    def __str__(self) -> str:
        told = [
            f"{mode} cannot run ({self.reasons.get(mode)})" if ms is None else f"{mode} {ms:.1f} ms"
            for mode, ms in self.ms.items()
        ]
        best = f"; {self.best} is the fastest" if len(self.ms) - len(self.reasons) > 1 else ""
        return f"{'forward and backward' if self.backward else 'forward'}: {', '.join(told)}{best}"


def time_modes(
    model: nn.Module,
    example_input: Any,
    *,
    modes: Sequence[str] = MODES,
    repeats: int = 3,
    backward: bool | None = None,
    compaction: Compaction | None = None,
) -> ModeTimes:
    """Measures what one pass of a masked network takes in each mode.

    The network is traced for compacted mode, runs in each mode until no plan is tried any more, and then repeats times
    in turns; the fastest pass of each counts. A pass is forward and backward, from the mean of all outputs. The
    caller's autocast and deterministic settings hold; what torch.compile made runs without it. The model is left as it
    was: parameters, gradients, buffers, masks, modes, and the state of torch's and Python's random generators. Its
    forward hooks run; hooks on gradients of parameters do not.

    Args:
        model: A network with masked layers, in train or eval mode, wrapped by DistributedDataParallel or not.
        example_input: What model takes: a tensor such as [N, C, H, W], a tuple or a dict of arguments (see Example); a
            whole batch, since times depend on its size.
        modes: Which modes to measure, of "masked", "live" and "compacted".
        repeats: How many passes in each mode are measured.
        backward: Whether a pass has a backward part. None: in train mode it has.
        compaction: The compacted form that is kept of model, entered or not, as a method has it. None: a new one.

    Returns:
        A ModeTimes.

    Examples:
        >>> model = torch.nn.Sequential(pk.MaskedConv2d(3, 8, 3), torch.nn.ReLU(), pk.MaskedConv2d(8, 4, 1))
        >>> model[0].set_masks(filter=torch.arange(8) < 6)
        >>> times = pk.time_modes(model, torch.randn(2, 3, 16, 16))
        >>> times.best in times.ms
        True
    """
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise ValueError(f"time_modes: modes: expected some of {', '.join(MODES)}, got {unknown[0]!r}")
    if not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"time_modes: repeats: expected a number of passes from 1 on, got {repeats!r}")
    model, compiled = unwrapped(model)
    backward = model.training if backward is None else backward
    tensors = (*model.parameters(), *model.buffers())
    inference = any(t.is_inference() for t in tensors)
    backward = backward and not inference and any(t.requires_grad for t in tensors)
    device = next((t.device for t in tensors), torch.device("cpu"))
    with torch.inference_mode(inference), torch.set_grad_enabled(backward), ExitStack() as stack:
        example = Example.of("time_modes", example_input).map(torch.detach)
        stack.enter_context(_random_state(device))
        stack.enter_context(_without_gradient_hooks(model))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        times = ModeTimes(dict.fromkeys(modes), backward=backward)
        runs: dict[str, Run] = {}
        for mode in modes:
            with _reason_in(times.reasons, mode):
                runs[mode] = _passes(model, example, mode, compiled, compaction, stack)
        stack.enter_context(_left_alone(model))
        for mode, run in runs.items():
            with _reason_in(times.reasons, mode):
                plan.settle(run, SETTLES)
        for _ in range(repeats):
            for mode, run in runs.items():
                if mode not in times.reasons:
                    with _reason_in(times.reasons, mode):
                        ms, before = _clock(run, device), times.ms[mode]
                        times.ms[mode] = ms if before is None else min(ms, before)
        times.ms |= dict.fromkeys(times.reasons)
    return times


def unwrapped(model: nn.Module) -> tuple[nn.Module, bool]:
    """The network inside DistributedDataParallel and what torch.compile made, and whether that runs all of it."""
    compiled = False
    while True:
        compiled |= "" in compiled_parts(model)
        inner = getattr(model, "_orig_mod", model)
        inner = inner.module if isinstance(inner, nn.parallel.DistributedDataParallel) else inner
        if inner is model:
            return model, compiled
        model = inner


def _passes(
    model: nn.Module,
    example: Example,
    mode: str,
    compiled: bool,
    compaction: Compaction | None,
    stack: ExitStack,
) -> Run:
    """A pass in the mode. compiled: whether torch.compile runs the whole network; stack: holds the small network."""
    layers = [module for module in model.modules() if isinstance(module, MaskBuffers)]
    if mode != "masked" and not layers:
        raise ValueError("it has no masked layers: see pk.convert")
    if mode == "live" and compiled:
        raise ValueError("torch.compile runs the whole network, in masked mode")
    if mode == "compacted":
        net = stack.enter_context(_small(compaction or Compaction(model, example)))
        return lambda: _pass(lambda: example.call(net))

    def run() -> None:
        with _live(layers, mode == "live"), masked_where_compiled(model):
            _pass(lambda: full_width(example.call(model)))

    return run


@contextmanager
def _small(compaction: Compaction) -> Iterator[nn.Module]:
    """The small network of a model; what it holds goes back unchanged."""
    entered = compaction.entered
    net = compaction.net if entered else compaction.enter()[0]
    try:
        with _left_alone(net):
            yield net
    finally:
        if not entered:
            compaction.leave()


def _pass(forward: Run) -> None:
    """Forward and, where gradients are enabled, backward."""
    torch.clear_autocast_cache()  # a training step enters autocast anew, and casts the weights
    outputs = forward()
    if not torch.is_grad_enabled():
        return
    loss: Any = sum(
        y.float().mean() for y in tree_leaves(outputs)
        if isinstance(y, Tensor) and y.is_floating_point() and y.requires_grad
    )  # fmt: skip
    if isinstance(loss, Tensor):
        with torch.autocast(loss.device.type, enabled=False):
            loss.backward()


def _clock(run: Run, device: torch.device) -> float:
    before = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - before)


@contextmanager
def _reason_in(reasons: dict[str, str], mode: str) -> Iterator[None]:
    """Keeps the reason if the network cannot run in a mode."""
    try:
        yield
    except Exception as error:  # whatever a user's network raises
        reasons[mode] = (str(error) or type(error).__name__).splitlines()[0]


@contextmanager
def _live(layers: Sequence[MaskBuffers], enabled: bool) -> Iterator[None]:
    """Live mode on or off for the layers, and nothing else of what flow() does: hooks stay what they are."""
    before = [layer._flow for layer in layers]
    try:
        for layer in layers:
            layer._flow = enabled
        yield
    finally:
        for layer, flow in zip(layers, before, strict=True):
            layer._flow = flow


@contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """When the block ends, gradients and buffers are what they were; masks and what follows from them are let be."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in getattr(module, "_own_state", ())
    ]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            if not torch.equal(buffer, value):  # norms write their statistics without a new version
                with torch.no_grad():
                    buffer.copy_(value)


@contextmanager
def _without_gradient_hooks(model: nn.Module) -> Iterator[None]:
    """No hooks on the parameters' gradients inside the block: some of them run an optimizer's step."""
    held: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for parameter in model.parameters():
        for hooks in (parameter._backward_hooks, parameter._post_accumulate_grad_hooks):
            if hooks:
                held.append((hooks, dict(hooks)))
                hooks.clear()
    try:
        yield
    finally:
        for hooks, kept in held:
            hooks.update(kept)


@contextmanager
def _random_state(device: torch.device) -> Iterator[None]:
    """The random generators of torch and Python go on from where they are when the block ends."""
    state = random.getstate()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(state)
