"""explain: what each convolution of a network skips, by which plan, in what time, and what falls back to full width."""

from __future__ import annotations

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from ..compaction.compaction import Compaction
from ..functional import pad_string
from ..live import LiveList, LiveTensor, recording
from ..live.conv import Lowered
from ..live.tensor import wrap
from ..nn.conv import MaskedConv2d
from ..nn.conv_transpose import MaskedConvTranspose2d
from ..nn.linear import MaskedLinear
from ..nn.mask_buffers import MaskBuffers
from ..nn.masked_filters import MaskedFilters
from ..nn.reparametrized import is_reparametrized
from ..ops import mask_table
from ..plan import DIRECTIONS, LayerPlan, has_other_plans, settle
from . import kept
from .flops import live_kernels, lowered
from .modes import MODES, ModeTimes, time_modes, unwrapped
from .observe import masked_where_compiled, observe, text_table

WARMUPS, MIN_ROUNDS, MAX_ROUNDS, SECONDS = 2, 3, 15, 0.1
EXCESS = 1.1  # times the multiply-adds without dead filters, from which on they are worth a word
Layer = nn.Conv2d | MaskedFilters
DENSE, SMALL = (LayerPlan(plan, plan, plan) for plan in ("dense", "small"))


class _Call(NamedTuple):
    """What a layer's time depends on. Where its input is a live tensor, the fields describe the compact values."""

    shape: torch.Size  # [N, C, H, W] or [C, H, W]
    memory_format: torch.memory_format
    dtype: torch.dtype
    device: torch.device
    needs_grad: bool
    live: LiveList | None
    computes: torch.dtype  # the result's: under autocast not that of the input


@dataclass
class Explanation:
    """What explain() found; print it to see a table.

    Attributes:
        rows: A dict for each convolution and other layer with masks of filters, in the order in which they first ran:

            - "layer": its name in the model.
            - "mode": "masked" or "live", the mode in which it ran; "plain": not a masked layer.
            - "filters", "inputs", "kernels": how many it has; "live_filters", "live_inputs", "live_kernels": how many
              of them it computes.
            - "forward", "grad_input", "grad_weight": the plan of each direction (see `prunekernels.plan`), None where
              the direction is not computed. "small": the vendor's convolution of the live sizes, in live mode.
            - "calls": how often it ran.
            - "ms", "dense_ms": milliseconds of all calls, as the layer is and dense; None where it cannot be timed.
            - "untimed": why it cannot be timed alone, otherwise None.
            - "compacted_filters": how many filters it has in compacted mode; None where that is not known.
        fallbacks: A dict for each operation that took a live tensor at full width: its name "op", the "module" that
            called it, and "count".
        compiled: The names of the parts of a network in live mode that torch.compile runs ("" is the whole network).
            Their layers run in masked mode.
        modes: What a pass of the whole network takes in each mode, a ModeTimes; None if that was not measured.
        wide: By name of a layer that keeps its masks and its width in compacted mode, why.
        kept: By name of a layer that has dead filters as zeros in compacted mode, why.
        excess: How many times the multiply-adds of compacted mode are those without such zeros; None if that is not
            known. Live mode computes without them.

    Examples:
        >>> model = torch.nn.Sequential(pk.MaskedConv2d(3, 8, 3), torch.nn.Softmax(1))
        >>> model[0].set_masks(filter=torch.arange(8) < 6)
        >>> explanation = pk.explain(pk.flow(model), torch.randn(2, 3, 16, 16))
        >>> explanation.rows[0]["mode"], explanation.rows[0]["live_filters"]
        ('live', 6)
        >>> explanation.fallbacks
        [{'op': 'softmax', 'module': '1', 'count': 1}]
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    fallbacks: list[dict[str, Any]] = field(default_factory=list)
    compiled: list[str] = field(default_factory=list)
    modes: ModeTimes | None = None
    wide: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    excess: float | None = None

    @property
    def breaks(self) -> list[dict[str, Any]]:
        """Deprecated name of fallbacks."""
        warnings.warn("Explanation.breaks is now called Explanation.fallbacks", DeprecationWarning, stacklevel=2)
        return self.fallbacks

    def __str__(self) -> str:
        shares = ("filters", "inputs", "kernels")
        small = {i: f"{n}/{row['filters']}" for i, row in enumerate(self.rows) if (n := row["compacted_filters"])}
        head = ["layer", "mode", *shares, *(["compacted"] if small else []), *DIRECTIONS, "ms", "dense ms", "speed-up"]
        cells = [
            [row["layer"], row["mode"], *(f"{row['live_' + each]}/{row[each]}" for each in shares),
             *([small.get(i, "")] if small else []),
             *(row[direction] or "" for direction in DIRECTIONS), *_times(row["ms"], row["dense_ms"])]
            for i, row in enumerate(self.rows)
        ]  # fmt: skip
        ms, dense_ms = (sum(row[key] or 0 for row in self.rows) for key in ("ms", "dense_ms"))
        lines = [text_table(head, [*cells, ["all", *[""] * (len(head) - 4), *_times(ms, dense_ms)]])]
        lines += [f"not timed: {row['layer']}: {row['untimed']}" for row in self.rows if row["untimed"]]
        lines += [f"full width: {f['op']} in {f['module'] or 'the model'}, {f['count']} x" for f in self.fallbacks]
        lines += [f"masked mode: {name or 'the model'}, which torch.compile runs" for name in self.compiled]
        if self.modes is not None:
            lines.append(f"whole network, {self.modes}")
        lines += [f"compacted mode: {name or 'the layer'} keeps its width: {why}" for name, why in self.wide.items()]
        lines += [f"compacted mode: {name or 'the layer'} has {why}" for name, why in self.kept.items()]
        if self.excess is not None and self.excess > EXCESS:
            lines.append(
                f"compacted mode: those zeros take it to {self.excess:.2f} times the multiply-adds of live mode"
            )
        return "\n".join(lines)


def explain(
    model: nn.Module, example_input: Any, *, backward: bool = True, modes: Sequence[str] = MODES
) -> Explanation:
    """Tells what each convolution of model skips, by which plan, in what time, and what falls back to full width.

    Masked linear layers and transposed convolutions are among the convolutions.

    The model runs once on the example, in eval mode, and is left as it was. Then each layer runs alone on noise of its
    input's size, in turns with the dense convolution: forward and, with backward, the gradients that a training step
    would need. Times are medians. A layer that cannot run alone (its forward takes more than one argument, say) has no
    times but the reason. Gradients are left out where the model's parameters were made in torch.inference_mode.

    A network with masked layers then runs as a whole in each mode, in train or eval mode as it is (see time_modes):
    four passes a mode, and a trace for compacted mode, which takes seconds where networks are deep. For compacted mode
    explain also tells which layers keep dead filters, and why.

    Args:
        model: A network, masked or not.
        example_input: What model takes: a tensor such as [N, C, H, W], a tuple or a dict of arguments (see Example); a
            whole batch, since plans and times depend on its size.
        backward: Whether the gradients are explained and timed too.
        modes: The modes in which the whole network is timed, of "masked", "live" and "compacted"; () for none.

    Returns:
        An Explanation.

    Examples:
        >>> model = torch.nn.Sequential(pk.MaskedConv2d(3, 8, 3), torch.nn.ReLU(), pk.MaskedConv2d(8, 4, 1))
        >>> model[0].set_masks(filter=torch.arange(8) < 6)
        >>> print(pk.explain(model, torch.randn(2, 3, 16, 16)))  # doctest: +ELLIPSIS
        layer  mode    filters  inputs  kernels  compacted  forward  ...
        0      masked      6/8     3/3    18/24        6/8  ...
    """
    calls: dict[str, Counter[_Call]] = {}
    layers: dict[str, Layer] = {}

    def visit(name: str, layer: nn.Module, x: Any, y: Any) -> None:
        if isinstance(layer, (nn.Conv2d, MaskedFilters)) and isinstance(x, Tensor) and isinstance(y, Tensor):
            layers[name] = layer
            x = layer._prepared(x) if isinstance(layer, MaskedFilters) else x
            calls.setdefault(name, Counter())[_call(x, y)] += 1

    held = (*model.parameters(), *model.buffers())
    backward = backward and not any(t.is_inference() for t in held)
    with torch.inference_mode(False), masked_where_compiled(model) as compiled:
        with recording(model) as fallbacks:
            observe("explain", model, example_input, visit, grad=backward)
        rows = [_row(name, layers[name], calls[name], backward) for name in calls]
    explanation = Explanation(rows, fallbacks, compiled)
    if modes and any(isinstance(module, MaskBuffers) for module in model.modules()):
        _explain_modes(explanation, model, example_input, modes, layers, None if backward else False)
    return explanation


def _explain_modes(
    explanation: Explanation,
    model: nn.Module,
    example_input: Any,
    modes: Sequence[str],
    layers: Mapping[str, nn.Module],
    backward: bool | None,
) -> None:
    """Adds what the whole network takes in each mode, and what of it stays wide in compacted mode."""
    network, _ = unwrapped(model)
    compaction = Compaction(network, example_input)
    explanation.modes = time_modes(model, example_input, modes=modes, backward=backward, compaction=compaction)
    if explanation.modes.ms.get("compacted") is None:
        return
    explanation.wide = dict(compaction.wide)
    explanation.excess = kept.excess(network, compaction, example_input)
    filters, explanation.kept = kept.filters(network, compaction)
    names = {id(module): name for name, module in network.named_modules()}
    for row in explanation.rows:
        row["compacted_filters"] = filters.get(names[id(layers[row["layer"]])])


def _call(x: Tensor, y: Tensor) -> _Call:
    compact, live = (x.compact, x.live) if type(x) is LiveTensor else (x, None)
    about = (suggest_memory_format(compact), compact.dtype, compact.device, compact.requires_grad)
    return _Call(compact.shape, *about, live, y.dtype)


def _row(name: str, layer: Layer, calls: Counter[_Call], backward: bool) -> dict[str, Any]:
    first = next(iter(calls))
    times, untimed = _times_of(layer, calls, backward)
    needed = (True, backward and first.needs_grad, backward and layer.weight.requires_grad)
    plans = _plans(layer, first)
    return {
        "layer": name,
        **_mode_and_counts(layer, first),
        **{direction: plan if need else None for direction, plan, need in zip(DIRECTIONS, plans, needed, strict=True)},
        "calls": sum(calls.values()),
        "ms": times["ms"],
        "dense_ms": times["dense_ms"],
        "untimed": untimed,
        "compacted_filters": None,
    }


def _times_of(
    layer: Layer, calls: Counter[_Call], backward: bool
) -> tuple[dict[str, float] | dict[str, None], str | None]:
    """Milliseconds of all calls, as the layer is and dense, and why there are none."""
    try:
        times = [(_time(layer, call, backward), count) for call, count in calls.items()]
    except Exception as error:  # whatever a user's layer raises
        return {"ms": None, "dense_ms": None}, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return {key: sum(each[key] * count for each, count in times) for key in ("ms", "dense_ms")}, None


def _mode_and_counts(layer: Layer, call: _Call) -> dict[str, Any]:
    K, C, live = layer.out_channels, layer.in_channels, call.live
    mode, filters, inputs, kernels = "plain", K, C, K * C // layer.groups
    row: dict[str, Any] = {"filters": filters, "inputs": inputs, "kernels": kernels}
    if isinstance(layer, MaskedFilters):
        small = lowered(layer, live, len(call.shape))
        read = layer.input_mask.cpu()
        if small and live:
            read = read & torch.from_numpy(live.unpadded.mask())
        mode, inputs = "live" if small else "masked", int(read.sum())
        filters = int(mask_table.live_filters(layer._mask_table, K).sum())
        if small and not small.out.full:  # it may be full although some are dead, see LiveList.widened
            filters = small.out.unpadded.count
        kernels = int(live_kernels(layer, live if small else None).sum())
    elif live and layer.groups == 1:
        inputs, kernels = live.unpadded.count, K * live.unpadded.count
    return {"mode": mode} | row | {"live_filters": filters, "live_inputs": inputs, "live_kernels": kernels}


def _plans(layer: Layer, call: _Call) -> LayerPlan:
    if not isinstance(layer, MaskedFilters):
        return DENSE
    small, of_whole = lowered(layer, call.live, len(call.shape)), getattr(layer, "plan", None)
    if small and isinstance(layer, MaskedConv2d):
        return _small_plans(layer, call, small)
    if small and small.table is None and layer.grad_scale is None:
        return SMALL
    return of_whole or DENSE


def _small_plans(layer: MaskedConv2d, call: _Call, small: Lowered) -> LayerPlan:
    """Of the convolution of live sizes that the layer runs in live mode."""
    N, _, *space = call.shape
    x = torch.empty((N, small.channels, *space), dtype=call.dtype, device=call.device, memory_format=call.memory_format)
    x, padding = layer._pad(x)
    if small.table is None and layer.grad_scale is None and not has_other_plans(x, small.groups, call.computes):
        return SMALL
    if isinstance(padding, str):
        x, padding = pad_string("explain", x, padding, layer.kernel_size, layer.stride, layer.dilation)
    weight_shape = (small.filters, small.channels // small.groups, *layer.kernel_size)
    table = small.all_live if small.table is None else small.table
    grad_table = small.all_live if small.grad_table is None else small.grad_table
    problem = ((*layer.stride, *padding, *layer.dilation), small.groups, call.computes, call.memory_format)
    plans = LayerPlan.choose(x.shape, weight_shape, table, grad_table, *problem, small=True)
    nothing_dead = [of_small is None for of_small in (small.table, small.table, small.grad_table)]
    return LayerPlan(*("small" if plan == "dense" and all_live else plan
                       for plan, all_live in zip(plans, nothing_dead, strict=True)))  # fmt: skip


def _time(layer: Layer, call: _Call, backward: bool) -> dict[str, float]:
    """Milliseconds of one call, as the layer is and dense."""
    noise = torch.Generator(call.device).manual_seed(
        0
    )  # leaves the state of the global generator to the caller's training

    def leaf(shape: Sequence[int]) -> Tensor:
        x = torch.randn(shape, dtype=call.dtype, device=call.device, generator=noise)
        return x.contiguous(memory_format=call.memory_format).requires_grad_(backward and call.needs_grad)

    compact = leaf(call.shape)
    runs: dict[str, Callable[[], object]] = {}
    if live := call.live:
        wide = leaf((call.shape[0], live.channels, *call.shape[2:]))
        runs["ms"] = _step(lambda: _convolve(layer, wrap(compact, live)), layer, compact)
    else:
        wide = compact
        if isinstance(layer, MaskedFilters):
            runs["ms"] = _step(lambda: _convolve(layer, compact), layer, compact)
    runs["dense_ms"] = _step(lambda: _convolve(layer, wide, dense=True), layer, wide)
    with torch.set_grad_enabled(backward):
        times = _medians(runs, call.device)
    return {"ms": times.get("ms", times["dense_ms"]), "dense_ms": times["dense_ms"]}


def _convolve(layer: Layer, x: Tensor, dense: bool = False) -> Tensor:
    """The layer; of a masked one the convolution alone, without what its class does to inputs and outputs."""
    kinds: tuple[Any, ...] = (MaskedConv2d, MaskedConvTranspose2d, MaskedLinear)
    cls = next((kind for kind in kinds if isinstance(layer, kind)), None)
    plain: Any = layer if cls is None else super(cls, layer)
    y: Tensor = plain.forward(x) if cls is None or dense else cls.forward(layer, x)
    return y


def _step(forward: Callable[[], Tensor], layer: Layer, x: Tensor) -> Callable[[], object]:
    """forward and, where autograd is on, the gradients of input, weight and bias, as far as they require one."""
    wanted = [t for t in (x, *layer.parameters()) if t.requires_grad]
    keeps_graph = is_reparametrized(layer)  # by a hook, maybe, which runs before these calls

    def run() -> object:
        y = forward()
        y = y.compact if type(y) is LiveTensor else y
        return (
            torch.autograd.grad(y, wanted, torch.ones_like(y), keeps_graph, allow_unused=True) if y.requires_grad else y
        )

    return run


def _medians(runs: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median milliseconds of each run; they take turns, so that a change of clock speed meets all of them."""

    def clock(run: Callable[[], object]) -> float:
        before = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - before)

    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        settle(run)
    for _ in range(WARMUPS):
        for run in runs.values():
            clock(run)
    end = time.perf_counter() + SECONDS
    while len(samples["dense_ms"]) < MIN_ROUNDS or (
        time.perf_counter() < end and len(samples["dense_ms"]) < MAX_ROUNDS
    ):
        for name, run in runs.items():
            samples[name].append(clock(run))
    return {name: statistics.median(values) for name, values in samples.items()}


def _times(ms: float | None, dense_ms: float | None) -> list[str]:
    if ms is None or dense_ms is None:
        return [""] * 3
    return [f"{ms:.3f}", f"{dense_ms:.3f}", f"{dense_ms / ms:.2f}" if ms else ""]
