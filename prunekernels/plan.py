"""Plans: which algorithm serves a layer.

"dense": where-mask, then the vendor's convolution; "compact": gather, convolve the live sizes, scatter; "direct" and
"sparse": kernels of our own, over live filters and channels and over single live kernels.

"auto" measures, the first time it meets a problem (direction, sizes, layout, dtype, threads or device, live counts to a
sixteenth), the plans that a cost model does not rule out, and keeps the fastest for the life of the process; dense
where nothing beats it by 3 percent. "model" only asks the cost model, and so does "auto" under
torch.use_deterministic_algorithms(True) or with measuring off. A plan's name forces it; what it does not serve goes as
under "auto". On a GPU times are those of the device, and while a CUDA graph is captured nothing new is measured.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from .masks import ConvMask
from .ops import extension
from .ops.fallback import PLANS as PLANS

DIRECTIONS = ("forward", "grad_input", "grad_weight")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


class LayerPlan(NamedTuple):
    """The plan of each direction of a layer."""

    forward: str
    grad_input: str
    grad_weight: str


def _check(plan: str, where: str) -> str:
    if plan not in PLANS:
        raise ValueError(f"{where}: expected one of {', '.join(PLANS)}, got {plan!r}")
    return plan


def _check_switch(value: str, where: str) -> bool:
    if value not in ("", "0", "1"):
        raise ValueError(f"{where}: expected 0 or 1, got {value!r}")
    return value != "0"


_asked = _check(os.environ.get("PRUNEKERNELS_PLAN") or "auto", "PRUNEKERNELS_PLAN")
_measuring = _check_switch(os.environ.get("PRUNEKERNELS_MEASURE", ""), "PRUNEKERNELS_MEASURE")


def current(small: bool = False) -> str:
    """The plan in force: "auto" unless PRUNEKERNELS_PLAN or force() says otherwise; not measuring makes it "model".

    small: "auto" for a convolution of live channels alone, which may have plans though nothing is dead in it.
    """
    if _asked == "auto":
        return "model" if not _measuring else "small" if small else "auto"
    return _asked


@contextmanager
def force(plan: str) -> Iterator[None]:
    """Every layer follows this plan inside the with block; a backward pass follows the plan of its forward pass."""
    global _asked
    before, _asked = _asked, _check(plan, "plan.force")
    try:
        yield
    finally:
        _asked = before


@contextmanager
def measure(enabled: bool) -> Iterator[None]:
    """Inside the with block "auto" measures or asks the cost model; PRUNEKERNELS_MEASURE=0 switches it off for good."""
    global _measuring
    if not isinstance(enabled, bool):
        raise ValueError(f"plan.measure: enabled: expected True or False, got {enabled!r}")
    before, _measuring = _measuring, enabled
    try:
        yield
    finally:
        _measuring = before


def choose(
    direction: str,
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    mask: ConvMask | None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    device: torch.device | str | None = None,
) -> str:
    """The plan a layer of this shape gets: the measured one if there is one, or else the model's. Measures nothing.

    device: where the layer would run; by default where the mask is.

    >>> pk.plan.choose("forward", x.shape, weight.shape, mask, padding=(1, 1))
    'compact'
    """
    for name, value, known in (
        ("direction", direction, DIRECTIONS),
        ("dtype", dtype, DTYPES),
        ("memory_format", memory_format, LAYOUTS),
    ):
        if value not in known:
            raise ValueError(f"plan.choose: {name}: expected one of {', '.join(map(str, known))}, got {value!r}")
    if mask is None:
        return "dense"
    table = mask.table(weight_shape[0], x_shape[1], groups)
    geometry = [*stride, *padding, *dilation]
    where = None if device is None else torch.device(device)
    return choose_for_table(direction, x_shape, weight_shape, table, geometry, groups, dtype, memory_format, where)


def choose_for_table(
    direction: str,
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    table: torch.Tensor,
    geometry: Sequence[int],
    groups: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    device: torch.device | None = None,
) -> str:
    """choose() for a mask table, read from its device; geometry: stride, padding, dilation, two integers each."""
    device = device or table.device
    if extension._C is None or device.type not in ("cpu", "cuda"):
        return "dense"
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    K, _, R, S = weight_shape
    sizes = [*x_shape, K, R, S, groups, *geometry]
    name, channels_last = str(dtype).removeprefix("torch."), memory_format == torch.channels_last
    return extension._C.choose_plan(current(), direction, sizes, table.cpu().numpy(), name, channels_last, str(device))


def table() -> list[dict[str, Any]]:
    """What was measured, a row for each kind of problem: its sizes, "live" (filters, input channels, and kernels among
    those, in sixteenths), "device", "threads", the "plan" kept, "ms" of each plan tried. [] without the extension."""
    return extension._C.plan_table() if extension._C else []


def clear() -> None:
    """Forgets what was measured."""
    if extension._C:
        extension._C.clear_plans()
