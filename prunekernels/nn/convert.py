"""convert and restore: plain layers become masked ones and back, in place, as the same module and parameter objects."""

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
    """The report of `convert` or `restore`: which modules changed and which were left alone.

    Attributes:
        converted: Names of the convolutions that changed.
        norms: Names of the batch norms that changed.
        skipped: Name of each module left alone -> why.

    Examples:
        >>> print(pk.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))))
        1 convolutions, 1 norms
    """

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
    """Turns every `nn.Conv2d` into a `MaskedConv2d` and every `nn.BatchNorm2d` into a `MaskedBatchNorm2d`, in place.

    Everything is live afterwards. Modules and parameters stay the same objects, so optimizers, hooks and references
    go on working. Subclasses and modules whose forward was replaced are left alone and named in the report.

    Args:
        model: The network.
        norms: False leaves the batch norms alone.
        filter_fn: filter_fn(name, module) is called for each layer; where it gives False, the layer is left alone.

    Returns:
        A `Conversion` that names what changed and what did not.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> pk.convert(model).converted
        ['0']
        >>> model[0].set_masks(filter=torch.arange(8) > 3)
        >>> model[0].density
        0.5
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
    """Turns masked layers back into `nn.Conv2d` and `nn.BatchNorm2d`, in place.

    Dead weights, biases and affine parameters are written as zeros, so the network computes what it did. An error
    changes nothing.

    Args:
        model: A network with masked layers. Live mode is switched off.

    Returns:
        A `Conversion` that names the layers that changed.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
        >>> report = pk.convert(model)
        >>> model[0].set_masks(filter=torch.arange(8) > 3)
        >>> pk.restore(model).converted
        ['0']
        >>> type(model[0]).__name__, model[0].weight[:4].any().item()
        ('Conv2d', False)
    """
    flow(model, False)
    report = Conversion()
    masked = [(n, m) for n, m in model.named_modules() if isinstance(m, (MaskedConv2d, MaskedBatchNorm2d))]
    for name, module in masked:  # checked first, so that an error changes nothing
        if isinstance(module, MaskedBatchNorm2d) and not module.affine and not bool(module.channel_mask.all()):
            raise ValueError(f"restore: {name}: expected affine=True, got dead channels that a plain norm cannot zero")
    for name, module in masked:
        module.zero_dead()
        module._drop_masks()
        is_conv = isinstance(module, MaskedConv2d)
        module.__class__ = nn.Conv2d if is_conv else nn.BatchNorm2d  # type: ignore[assignment]
        (report.converted if is_conv else report.norms).append(name)
    return report
