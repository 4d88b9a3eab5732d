"""explain: what each convolution of a network skips, how, how long it takes, and what breaks the flow."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from ..functional import pad_string
from ..live import LiveList, LiveTensor, recording
from ..live.conv import Lowered
from ..live.tensor import wrap
from ..nn.conv import MaskedConv2d
from ..ops import mask_table
from ..plan import DIRECTIONS, choose_for_table
from .flops import live_kernels, passage
from .observe import observe, text_table

WARMUPS, MIN_ROUNDS, MAX_ROUNDS, SECONDS = 2, 3, 15, 0.1


class _Call(NamedTuple):
    """All that a layer's time depends on: of the compact tensor where its input is live."""

    shape: torch.Size
    memory_format: torch.memory_format
    dtype: torch.dtype
    device: torch.device
    needs_grad: bool
    live: LiveList | None
    computes: torch.dtype  # under autocast not the input's


@dataclass
class Explanation:
    """rows: one for each convolution, in the order in which they first ran; breaks: what got a full-width tensor.

    A row: "layer"; "gear" ("layer", "network" or "plain": not masked); "filters", "inputs", "kernels" and, of those,
    "live_filters", "live_inputs", "live_kernels"; the plans "forward", "grad_input", "grad_weight" ("small": a plain
    convolution of the live sizes, None: not computed); "calls"; "ms" and "dense_ms", sums over the calls. A break:
    "op", "module", "count".
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    breaks: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        shares = ("filters", "inputs", "kernels")
        head = ["layer", "gear", *shares, *DIRECTIONS, "ms", "dense ms", "speed-up"]
        cells = [
            [row["layer"], row["gear"], *(f"{row['live_' + each]}/{row[each]}" for each in shares),
             *(row[direction] or "" for direction in DIRECTIONS), *_times(row["ms"], row["dense_ms"])]
            for row in self.rows
        ]  # fmt: skip
        ms, dense_ms = (sum(row[key] for row in self.rows) for key in ("ms", "dense_ms"))
        lines = [text_table(head, [*cells, ["all", *[""] * 7, *_times(ms, dense_ms)]])]
        lines += [f"full width: {b['op']} in {b['module'] or 'the model'}, {b['count']} x" for b in self.breaks]
        return "\n".join(lines)


def explain(model: nn.Module, example_input: Any, *, backward: bool = True) -> Explanation:
    """What each convolution of model skips on the example, by which plan, in what time, and what breaks the flow.

    example_input: a tensor, a tuple of arguments, or a dict of them by name, of the size that is to be explained (a
    whole batch). The model runs once, in eval mode, and is left as it was. Then each layer runs alone on noise of its
    input's size, side by side with the dense convolution: forward and, with backward, the gradients that a training
    step would need; times are medians.

        >>> print(pk.explain(model, torch.randn(128, 3, 32, 32)))
    """
    calls: dict[str, Counter[_Call]] = {}
    layers: dict[str, nn.Conv2d] = {}

    def visit(name: str, layer: nn.Module, x: Any, y: Any) -> None:
        if isinstance(layer, nn.Conv2d):
            layers[name] = layer
            calls.setdefault(name, Counter())[_call(x, y)] += 1

    with recording(model) as breaks:
        observe("explain", model, example_input, visit, grad=backward)
    return Explanation([_row(name, layers[name], calls[name], backward) for name in calls], breaks)


def _call(x: Tensor, y: Tensor) -> _Call:
    compact, live = (x.compact, x.live) if type(x) is LiveTensor else (x, None)
    about = (suggest_memory_format(compact), compact.dtype, compact.device, compact.requires_grad)
    return _Call(compact.shape, *about, live, y.dtype)


def _row(name: str, layer: nn.Conv2d, calls: Counter[_Call], backward: bool) -> dict[str, Any]:
    first = next(iter(calls))
    times = {call: _time(layer, call, backward) for call in calls}
    needed = (True, backward and first.needs_grad, backward and layer.weight.requires_grad)
    plans = _plans(layer, first)
    return {
        "layer": name,
        **_gear_and_counts(layer, first),
        **{direction: plan if need else None for direction, plan, need in zip(DIRECTIONS, plans, needed, strict=True)},
        "calls": sum(calls.values()),
        "ms": sum(times[call]["ms"] * count for call, count in calls.items()),
        "dense_ms": sum(times[call]["dense_ms"] * count for call, count in calls.items()),
    }


def _gear_and_counts(layer: nn.Conv2d, call: _Call) -> dict[str, Any]:
    K, C, live = layer.out_channels, layer.in_channels, call.live
    gear, filters, inputs, kernels = "plain", K, C, K * C // layer.groups
    row: dict[str, Any] = {"gear": gear, "filters": filters, "inputs": inputs, "kernels": kernels}
    if isinstance(layer, MaskedConv2d):
        small = passage(layer, live, len(call.shape))
        read = layer.input_mask.cpu()
        if small and live:
            read = read & torch.from_numpy(live.mask())
        gear, inputs = "network" if small else "layer", int(read.sum())
        filters = small.out.count if small else int(mask_table.live_filters(layer._mask_table, K).sum())
        kernels = int(live_kernels(layer, live if small else None).sum())
    elif live and layer.groups == 1:
        inputs, kernels = live.count, K * live.count
    return row | {"gear": gear, "live_filters": filters, "live_inputs": inputs, "live_kernels": kernels}


def _plans(layer: nn.Conv2d, call: _Call) -> tuple[str, str, str]:
    """By direction; "small" is the network gear's plain convolution of the live sizes."""
    if not isinstance(layer, MaskedConv2d):
        return ("dense",) * 3
    small = passage(layer, call.live, len(call.shape))
    if small is None:
        return layer.plan or ("dense",) * 3
    if small.table is None:
        return ("small",) * 3
    return _small_plans(layer, call, small)


def _small_plans(layer: MaskedConv2d, call: _Call, small: Lowered) -> tuple[str, str, str]:
    """Of the network gear's small convolution where some of its kernels are dead."""
    N, C, *space = call.shape
    C = C if layer.groups == 1 else small.out.count  # brought to the live filters, which are the channels
    x, padding = layer._pad(torch.empty((N, C, *space), device="meta"))
    if isinstance(padding, str):
        x, padding = pad_string("explain", x, padding, layer.kernel_size, layer.stride, layer.dilation)
    weight_shape = (small.out.count, C // small.groups, *layer.kernel_size)
    about = ((*layer.stride, *padding, *layer.dilation), small.groups, call.computes, call.memory_format)

    def choose(direction: str, table: Tensor | None) -> str:
        return "small" if table is None else choose_for_table(direction, x.shape, weight_shape, table, *about)

    tables = (small.table, small.table, small.grad_table)
    forward, grad_input, grad_weight = (choose(*each) for each in zip(DIRECTIONS, tables, strict=True))
    return forward, grad_input, grad_weight


def _time(layer: nn.Conv2d, call: _Call, backward: bool) -> dict[str, float]:
    """Milliseconds of one call, as the layer is and dense."""
    noise = torch.Generator(call.device).manual_seed(0)  # the global one's state belongs to the training at hand

    def leaf(shape: Sequence[int]) -> Tensor:
        x = torch.randn(shape, dtype=call.dtype, device=call.device, generator=noise)
        return x.contiguous(memory_format=call.memory_format).requires_grad_(backward and call.needs_grad)

    compact = leaf(call.shape)
    runs: dict[str, Callable[[], object]] = {}
    if live := call.live:
        wide = leaf((call.shape[0], live.channels, *call.shape[2:]))
        runs["ms"] = _step(lambda: layer.forward(wrap(compact, live)), layer, compact)
    else:
        wide = compact
        if isinstance(layer, MaskedConv2d):
            runs["ms"] = _step(lambda: layer.forward(compact), layer, compact)
    runs["dense_ms"] = _step(lambda: nn.Conv2d.forward(layer, wide), layer, wide)
    with torch.set_grad_enabled(backward):
        times = _medians(runs, call.device)
    return {"ms": times.get("ms", times["dense_ms"]), "dense_ms": times["dense_ms"]}


def _step(forward: Callable[[], Tensor], layer: nn.Conv2d, x: Tensor) -> Callable[[], object]:
    """forward and, where autograd is on, the gradients of whatever wants one."""
    wanted = [t for t in (x, layer.weight, layer.bias) if t is not None and t.requires_grad]

    def run() -> object:
        y = forward()
        y = y.compact if type(y) is LiveTensor else y
        return torch.autograd.grad(y, wanted, torch.ones_like(y)) if y.requires_grad else y

    return run


def _medians(runs: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median milliseconds, the runs in turns."""

    def clock(run: Callable[[], object]) -> float:
        before = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - before)

    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(WARMUPS):  # the first of them measures plans
        for run in runs.values():
            clock(run)
    end = time.perf_counter() + SECONDS
    while len(samples["dense_ms"]) < MIN_ROUNDS or (
        time.perf_counter() < end and len(samples["dense_ms"]) < MAX_ROUNDS
    ):
        for name, run in runs.items():
            samples[name].append(clock(run))
    return {name: statistics.median(values) for name, values in samples.items()}


def _times(ms: float, dense_ms: float) -> list[str]:
    return [f"{ms:.3f}", f"{dense_ms:.3f}", f"{dense_ms / ms:.2f}" if ms else ""]
