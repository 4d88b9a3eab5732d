"""Whole networks: plain layers become masked ones and back, in place, with the same module and parameter objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from .batch_norm import MaskedBatchNorm2d
from .conv import MaskedConv2d
from .flow import flow


@dataclass
class Conversion:
    """What convert or restore did, by module name; skipped: name -> why."""

    converted: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} convolutions, {len(self.norms)} norms"]
        return "\n".join(lines + [f"left alone: {name}: {why}" for name, why in self.skipped.items()])

    def __call__(self, *args: object, **kwargs: object) -> None:
        raise TypeError("convert and restore work in place and return a report: go on using the model you passed")


def convert(
    model: nn.Module, *, norms: bool = True, filter_fn: Callable[[str, nn.Module], bool] | None = None
) -> Conversion:
    """In place: nn.Conv2d -> MaskedConv2d and, with norms, nn.BatchNorm2d -> MaskedBatchNorm2d, all live.

    Modules and parameters keep their identity: optimizers, hooks and references go on working. A subclass with a
    forward of its own is left alone and named in the report, as is a layer for which filter_fn(name, module) is false.
    """
    report = Conversion()
    for name, module in model.named_modules():
        if isinstance(module, (MaskedConv2d, MaskedBatchNorm2d)):
            continue
        is_conv, is_norm = isinstance(module, nn.Conv2d), norms and isinstance(module, nn.BatchNorm2d)
        if not (is_conv or is_norm):
            continue
        plain, masked = (nn.Conv2d, MaskedConv2d) if is_conv else (nn.BatchNorm2d, MaskedBatchNorm2d)
        if type(module) is not plain:
            report.skipped[name] = (
                f"{type(module).__name__} is not {plain.__name__} but a subclass with behaviour of its own"
            )
        elif "forward" in module.__dict__:
            report.skipped[name] = "its forward was replaced"
        elif filter_fn is not None and not filter_fn(name, module):
            report.skipped[name] = "filter_fn"
        else:
            module.__class__ = masked  # type: ignore[assignment]
            module._init_masks()  # type: ignore[operator]
            (report.converted if is_conv else report.norms).append(name)
    return report


@torch.no_grad()
def restore(model: nn.Module) -> Conversion:
    """In place: back to nn.Conv2d and nn.BatchNorm2d, dead weights, biases and affine parameters written as zeros."""
    flow(model, False)
    report = Conversion()
    masked = [(n, m) for n, m in model.named_modules() if isinstance(m, (MaskedConv2d, MaskedBatchNorm2d))]
    for name, module in masked:  # first, so that nothing has changed when it raises
        if isinstance(module, MaskedBatchNorm2d) and not module.affine and not bool(module.channel_mask.all()):
            raise ValueError(f"restore: {name}: expected affine=True, got dead channels that a plain norm cannot zero")
    for name, module in masked:
        module.zero_dead()
        module._drop_masks()
        is_conv = isinstance(module, MaskedConv2d)
        module.__class__ = nn.Conv2d if is_conv else nn.BatchNorm2d  # type: ignore[assignment]
        (report.converted if is_conv else report.norms).append(name)
    return report
