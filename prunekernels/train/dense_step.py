"""How a step of the plain network is the fastest: its memory layout, and with amp whether bfloat16 pays."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from ..plan import own_layout
from .compiling import ROUNDS, seconds
from .config import Config

TIMED = ("auto", "compacted", "dense")  # modes in which plain layers run
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class DenseStep:
    """The form of a dense step.

    Attributes:
        layout: The memory layout of the network, one of FORMATS.
        bf16: Whether the step autocasts to bfloat16.
    """

    layout: str
    bf16: bool

    @property
    def told(self) -> str:
        return f"{self.layout} {'bf16' if self.bf16 else 'fp32'}"

    def of(self, network: nn.Module) -> nn.Module:
        """The network in this layout, in place. On the CPU plain layers take it from their weights."""
        return network.to(memory_format=FORMATS[self.layout])  # type: ignore[call-overload]

    def laid_out(self, x: Tensor) -> Tensor:
        """Images for such a network; on the CPU contiguous, as plain layers take the layout from their weights."""
        return in_layout(x, self.layout if x.device.type == "cuda" else "contiguous")

    def state_dict(self) -> dict[str, Any]:
        """Returns the choice as plain values."""
        return asdict(self)


def in_layout(x: Tensor, layout: str) -> Tensor:
    """Images in a layout, one of FORMATS; those of one channel, which are in all of them, have its strides."""
    wanted = FORMATS[layout]
    return x if suggest_memory_format(x) == wanted else x.clone(memory_format=wanted)


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    """Autocasts to bfloat16, or not."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def chosen_before(config: Config, device: torch.device, state: Mapping[str, Any]) -> DenseStep:
    """The choice of a run that resumes. state: of Modes; before there was a choice, the device decided."""
    saved = state.get("dense")
    return DenseStep(**saved) if saved else DenseStep(_usual(config, device), config.amp)


def choose(
    config: Config, network: nn.Module, batch: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[DenseStep, str | None]:
    """The form in which a dense step takes the least time, and a line with the times, None where nothing is open.

    Args:
        config: The run's settings.
        network: The plain network, which stays as it is.
        batch: Returns images and labels of one rank, as the network takes them.
    """
    device = next(network.parameters()).device
    is_timed = config.layout == "auto" and config.mode in TIMED and device.type == "cpu" and not config.deterministic
    layouts = list(FORMATS) if is_timed else [_usual(config, device)]
    numbers = [True, False] if config.amp and config.mode == "auto" and not config.deterministic else [config.amp]
    forms = [DenseStep(layout, bf16) for layout in layouts for bf16 in numbers]
    if len(forms) == 1:
        return forms[0], None
    times = _milliseconds(forms, network, *batch())
    best = min(times, key=lambda form: times[form])
    timed = ", ".join(f"{form.told} {ms:.1f} ms" for form, ms in times.items())
    return best, f"dense: {timed} a step: {best.told}"


def _usual(config: Config, device: torch.device) -> str:
    """The layout where nothing is timed."""
    if config.layout != "auto":
        return config.layout
    if device.type == "cuda":
        return "channels_last"
    return masked_layout(config.amp) if config.mode in ("masked", "live") else "contiguous"


def masked_layout(bf16: bool) -> str:
    """The layout of images on the CPU in masked and live mode, whose layers take it from their inputs, where nothing is
    timed: that in which these layers have plans of their own.
    """
    return next(
        name for name, layout in FORMATS.items() if layout == own_layout(torch.bfloat16 if bf16 else torch.float32)
    )


def _milliseconds(forms: list[DenseStep], network: nn.Module, x: Tensor, y: Tensor) -> dict[DenseStep, float]:
    """By form, what a forward and a backward pass takes. They are timed in turns; the fastest of each counts."""
    networks = {form.layout: form.of(copy.deepcopy(network)).train() for form in forms}
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        steps = {form: functools.partial(_step, form, networks[form.layout], form.laid_out(x), y) for form in forms}
        for step in steps.values():
            for _ in range(2):  # allocates, chooses algorithms
                seconds(step, x.device)
        times = [{form: seconds(step, x.device) for form, step in steps.items()} for _ in range(ROUNDS)]
    return {form: 1e3 * min(row[form] for row in times) for form in forms}


def _step(form: DenseStep, network: nn.Module, x: Tensor, y: Tensor) -> None:
    network.zero_grad(set_to_none=True)
    with autocast(x.device, form.bf16):
        loss = F.cross_entropy(network(x).float(), y)
    loss.backward()
