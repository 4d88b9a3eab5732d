"""Plans: which algorithm computes a masked convolution, chosen for each direction of each layer.

"dense" zeroes the masked weights and inputs and calls the vendor's convolution. "compact" gathers what is live, calls
the vendor's convolution on it and scatters the result. "direct" is a kernel of this project that skips dead filters and
channels, "sparse" one that skips single dead kernels. A convolution in which nothing is dead runs as the vendor's.

"auto", the default, finds the fastest plan of a problem on the calls that meet it: each call runs one of the plans that
a cost model and similar problems do not rule out, and is timed, until one of them has won; that one runs until the
process ends. It is "dense", unless another plan is at least 3 percent faster. A problem is a direction with sizes,
layout, dtype, number of threads or device, and live counts to a sixteenth. Where a similar problem (other live counts,
widths or batch) has a winner whose lead is larger than what the difference may change, that plan is taken over without
trials. PRUNEKERNELS_CACHE names a file that keeps what was found out on the CPU for later processes: it is read on
import and written when the process ends, by any number of processes, for any number of machines.

"model" asks the cost model alone; "auto" does the same in float64, and while measuring is off or
torch.use_deterministic_algorithms(True) holds, and times nothing while a CUDA graph is captured. The name of a plan
forces that plan; a problem that it cannot compute goes as under "auto".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from . import plan_file
from .masks import ConvMask
from .ops import extension
from .ops.fallback import PLANS as PLANS

DIRECTIONS = ("forward", "grad_input", "grad_weight")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


class LayerPlan(NamedTuple):
    """The plan of each direction of a layer: a name such as "dense" for forward, grad_input and grad_weight.

    Examples:
        >>> layer = pk.MaskedConv2d(16, 16, 3)
        >>> y = layer(torch.randn(2, 16, 8, 8))
        >>> layer.plan
        LayerPlan(forward='dense', grad_input='dense', grad_weight='dense')
    """

    forward: str
    grad_input: str
    grad_weight: str

    @classmethod
    def choose(
        cls,
        x_shape: Sequence[int],
        weight_shape: Sequence[int],
        table: torch.Tensor,
        grad_table: torch.Tensor,
        geometry: Sequence[int],
        groups: int,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        small: bool = False,
    ) -> LayerPlan:
        """The plans of a convolution with mask tables: choose_for_table() in each direction.

        grad_table: the mask table of the weight's gradient, table that of the rest.
        """
        problem = (geometry, groups, dtype, memory_format)
        return cls(
            *(
                choose_for_table(direction, x_shape, weight_shape, mask, *problem, small=small)
                for direction, mask in zip(DIRECTIONS, (table, table, grad_table), strict=True)
            )
        )


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
    """The plan in force: "auto" unless PRUNEKERNELS_PLAN or force() says otherwise; "model" if measuring is off.

    Args:
        small: Whether the caller is the convolution of live sizes that a layer runs in live mode. For it "auto" becomes
            "small", which lets kernels of this project compete even where nothing is dead.

    Returns:
        What the operators take as their argument `plan`.

    Examples:
        >>> with pk.plan.force("compact"):
        ...     pk.plan.current()
        'compact'
    """
    if _asked == "auto":
        return "model" if not _measuring else "small" if small else "auto"
    return _asked


@contextmanager
def force(plan: str) -> Iterator[None]:
    """Makes every layer follow one plan inside the with block; a backward pass follows the plan of its forward pass.

    Args:
        plan: "auto", "model", "dense", "compact", "direct" or "sparse".

    Examples:
        >>> layer = pk.MaskedConv2d(16, 16, 3)
        >>> layer.set_masks(filter=torch.arange(16) < 8)
        >>> with pk.plan.force("dense"):
        ...     y = layer(torch.randn(2, 16, 8, 8))
        ...     layer.plan.forward
        'dense'
    """
    global _asked
    before, _asked = _asked, _check(plan, "plan.force")
    try:
        yield
    finally:
        _asked = before


@contextmanager
def measure(enabled: bool) -> Iterator[None]:
    """Lets "auto" measure inside the with block, or makes it ask the cost model.

    PRUNEKERNELS_MEASURE=0 in the environment switches measuring off for the whole process.

    Args:
        enabled: True to measure, False to ask the cost model.

    Examples:
        >>> with pk.plan.measure(False):
        ...     pk.plan.current()
        'model'
    """
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
    """The plan of one direction of a layer: the fastest so far where it was timed, or else the cost model's choice.

    Times nothing itself.

    Args:
        direction: "forward", "grad_input" or "grad_weight".
        x_shape: [N, C, H, W] of the layer's input.
        weight_shape: [K, C / groups, R, S].
        mask: The layer's masks as a ConvMask; None: nothing is dead.
        stride: Two integers, as padding and dilation.
        padding: Rows and columns of zeros on each side.
        dilation: Distance between the taps of a kernel.
        groups: As in `torch.nn.functional.conv2d`.
        dtype: Of the input.
        memory_format: Of the input.
        device: Where the layer runs; by default where the mask is. A device that torch does not find raises.

    Returns:
        "dense", "compact", "direct" or "sparse".

    Examples:
        >>> mask = pk.ConvMask(torch.arange(64) < 63, in_channels=64)
        >>> pk.plan.choose("forward", (2, 64, 8, 8), (64, 64, 1, 1), mask)  # nearly everything is live
        'dense'
    """
    for name, value, known in (
        ("direction", direction, DIRECTIONS),
        ("dtype", dtype, DTYPES),
        ("memory_format", memory_format, LAYOUTS),
    ):
        if value not in known:
            raise ValueError(f"plan.choose: {name}: expected one of {', '.join(map(str, known))}, got {value!r}")
    where = None if device is None else torch.device(device)
    if where is not None and where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ValueError(
            f"plan.choose: device: expected one that torch finds, got {where}; it finds {found} CUDA devices"
        )
    if mask is None:
        return "dense"
    table = mask.table(weight_shape[0], x_shape[1], groups)
    geometry = [*stride, *padding, *dilation]
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
    small: bool = False,
) -> str:
    """choose() for a mask table, read from its device.

    geometry: stride, padding, dilation, two integers each. small: as in current().
    """
    device = device or table.device
    if extension._C is None or device.type not in ("cpu", "cuda"):
        return "dense"
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return extension._C.choose_plan(
        current(small),
        direction,
        x_shape,
        weight_shape,
        table.cpu().numpy(),
        stride=geometry[:2],
        padding=geometry[2:4],
        dilation=geometry[4:],
        groups=groups,
        dtype=str(dtype).removeprefix("torch."),
        channels_last=memory_format == torch.channels_last,
        device=str(device),
    )


def own_layout(dtype: torch.dtype) -> torch.memory_format:
    """The layout in which convolutions on the CPU have plans of this package's own in a dtype, if in any."""
    has_pixels = extension._C is not None and extension._C.has_pixel_kernels()
    return torch.channels_last if dtype == torch.bfloat16 and has_pixels else torch.contiguous_format


def has_other_plans(x: torch.Tensor, groups: int, dtype: torch.dtype | None = None) -> bool:
    """Whether a convolution of x [N, C, H, W] in which nothing is dead has plans besides the vendor's convolution.

    dtype: what it computes in; None: autocast's, or that of x.
    """
    if extension._C is None or x.device.type != "cpu":
        return False
    if dtype is None:
        dtype = x.dtype
        if dtype != torch.float64 and torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
    if dtype == torch.bfloat16:
        return groups == 1 and extension._C.has_pixel_kernels() and x.is_contiguous(memory_format=torch.channels_last)
    is_depthwise = 1 < groups == x.size(1)
    in_pixels = is_depthwise and x.is_contiguous(memory_format=torch.channels_last)
    return dtype == torch.float32 and (x.is_contiguous() or in_pixels)


def table() -> list[dict[str, Any]]:
    """What was found out so far in this process.

    Returns:
        A dict for each problem: "direction", "x_shape", "weight_shape", "stride", "padding", "dilation", "groups",
        "dtype", "channels_last", "live" (filters, input channels, and kernels among those, in sixteenths), "device",
        "threads", "plan" (the fastest so far), "ms" of each plan that was tried, the best of its runs, and whether the
        plan is "settled". "ms" is empty where the plan is that of a similar problem. Layers in live mode appear with
        their live sizes. Empty without the extension.

    Examples:
        >>> pk.plan.clear()
        >>> pk.plan.table()
        []
    """
    return extension._C.plan_table() if extension._C else []


def trials() -> int:
    """How many runs of plans were timed so far in this process. Passes that add none run by plans that are settled.

    Examples:
        >>> before = pk.plan.trials()
        >>> y = pk.MaskedConv2d(16, 16, 3)(torch.randn(2, 16, 8, 8))  # nothing is dead: there is nothing to try
        >>> pk.plan.trials() - before
        0
    """
    return extension._C.plan_trials() if extension._C else 0


def settle(run: Callable[[], object], most: int = 64) -> int:
    """Calls run until it tries no plan any more, as a benchmark should before it takes times.

    Args:
        run: For example a training step. It is called once at least.
        most: How often it is called at most.

    Returns:
        How often it was called.

    Examples:
        >>> layer, x = pk.MaskedConv2d(16, 16, 3), torch.randn(2, 16, 8, 8)
        >>> layer.set_masks(filter=torch.arange(16) < 8)
        >>> calls = pk.plan.settle(lambda: layer(x))
        >>> pk.plan.settle(lambda: layer(x))
        1
    """
    for call in range(1, most + 1):
        before = trials()
        run()
        if trials() == before:
            return call
    return most


def clear() -> None:
    """Forgets what was found out: each layer tries plans anew.

    Examples:
        >>> pk.plan.clear()
    """
    if extension._C:
        extension._C.clear_plans()


plan_file.start()
