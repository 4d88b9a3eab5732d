"""convert and restore: plain layers become masked ones and back, in place, as the same module and parameter objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import torch_prune
from .adapted import bake_conv, computes_weight, masked_class, restore_conv, restore_norm, zeros_suffice
from .adapters import BASES, PLAIN
from .fixed_norm import FixedChannels
from .flow import flow
from .lost_masks import lost_mask
from .masked_filters import MaskedFilters
from .masked_norm import MaskedNorm
from .norm_over_channels import NormOverChannels
from .reparametrized import has_reparametrization, layer_class, remove_reparametrization, set_layer_class
from .unserved import why_unserved

_FAST_PATHS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # read the weights of their layers by themselves

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm)


@dataclass
class Conversion:
    """The report of `convert` or `restore`: which modules changed and which were left alone.

    Attributes:
        converted: Names of the convolutions that changed, transposed ones among them.
        norms: Names of the norms that changed.
        linears: Names of the linear layers that changed.
        skipped: Name of each module left alone -> why.
        pruned: Name of each layer that `torch.nn.utils.prune` had pruned -> what became masks, and what could not.

    Examples:
        >>> print(pk.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))))
        1 convolutions, 1 norms
    """

    converted: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    linears: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    pruned: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        linears = f", {len(self.linears)} linear layers" if self.linears else ""
        lines = [f"{len(self.converted)} convolutions, {len(self.norms)} norms{linears}"]
        lines += [f"pruned by torch: {name}: {what}" for name, what in self.pruned.items()]
        return "\n".join(lines + [f"left alone: {name}: {why}" for name, why in self.skipped.items()])

    def __call__(self, *args: object, **kwargs: object) -> None:
        raise TypeError("convert and restore work in place and return a report: go on using the model you passed")


def convert(
    model: nn.Module,
    *,
    norms: bool = True,
    linears: bool = False,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
) -> Conversion:
    """Turns every `nn.Conv2d` into a `MaskedConv2d` and every `nn.BatchNorm2d` into a `MaskedBatchNorm2d`, in place.

    `nn.ConvTranspose2d` becomes `MaskedConvTranspose2d`. With linears=True every `nn.Linear` becomes a `MaskedLinear`
    too, so that its outputs can be pruned. Without it linear layers stay what they are: they still shrink by the inputs
    that are dead.
    `nn.SyncBatchNorm` becomes `MaskedSyncBatchNorm`, `nn.GroupNorm` and `nn.LayerNorm` over one dimension become
    `MaskedGroupNorm` and `MaskedLayerNorm`.

    Everything is live afterwards, but for what `torch.nn.utils.prune` had pruned: its masks become masks of the layer,
    as far as they drop whole filters, input channels or kernels, and zeros in the weight where they do not. A norm that
    torch's convert_sync_batchnorm has put in the place of a masked one gets its mask back. Modules and
    parameters stay the same objects, so optimizers, hooks and references go on working. A layer of a subclass stays an
    instance of it if the subclass has no forward of its own or an adapter (`register_adapter`). Other subclasses,
    modules whose forward was replaced, and 1-d and 3-d convolutions are left alone and named in the report.

    Args:
        model: The network.
        norms: False leaves the norms alone.
        linears: True converts linear layers too.
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
    taken = _read_elsewhere(model) if linears else {}
    for name, module in model.named_modules():
        is_conv = isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))
        is_norm = norms and isinstance(module, NORMS)
        is_linear = linears and isinstance(module, nn.Linear)
        if unserved := why_unserved(module):
            report.skipped[name] = unserved
        if not (is_conv or is_norm or is_linear):
            continue
        cls, masked = layer_class(module), isinstance(module, (MaskedFilters, MaskedNorm))
        reason = None if masked else _reason_against(module, cls) or taken.get(id(module))
        if not reason and filter_fn is not None and not masked and not filter_fn(name, module):
            reason = "filter_fn"
        if reason:
            report.skipped[name] = reason
            continue
        pruned, lost = torch_prune.take_off(module), lost_mask(module)
        if not masked:
            set_layer_class(module, masked_class(cls))  # type: ignore[arg-type]
            module._init_masks()  # type: ignore[operator]
            (report.converted if is_conv else report.norms if is_norm else report.linears).append(name)
        if lost is not None:
            module.set_mask(lost)  # type: ignore[operator]
        if pruned:
            report.pruned[name] = torch_prune.take_over(module, pruned)
    return report


def _read_elsewhere(model: nn.Module) -> dict[int, str]:
    """By id of a linear layer whose weight something else reads too, as if it had no masks: why it is left alone."""
    reasons: dict[int, str] = {}
    readers: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, _FAST_PATHS):
            why = f"{type(module).__name__} reads its weight without calling it"
            reasons |= {id(child): why for child in module.children()}
        for parameter in module.parameters(recurse=False):
            other, owner = readers.setdefault(id(parameter), (name, module))
            if owner is not module:
                reasons |= {id(owner): f"{name} has the same weight", id(module): f"{other} has the same weight"}
    return reasons


def _reason_against(module: nn.Module, cls: type[nn.Module]) -> str | None:
    """Why a layer is left alone; None: it can be converted."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "its parameters do not exist yet: run the network once, then convert"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
        return f"it normalizes {len(module.normalized_shape)} dimensions at once, a masked norm the channels alone"
    if isinstance(module, FixedChannels):
        return "it normalizes some of its channels for good"
    if masked_class(cls) is None:
        advice = ": tell convert what it computes by pk.register_adapter" if issubclass(cls, PLAIN) else ""
        return f"{cls.__name__} has a forward of its own{advice}"
    kinds = {type(p.data).__name__ for p in module.parameters(recurse=False)} - {"Tensor"}
    if kinds and cls not in BASES:
        return f"{cls.__name__} holds parameters of type {', '.join(sorted(kinds))}"
    return None


@torch.no_grad()
def restore(model: nn.Module, *, bake: bool = False) -> Conversion:
    """Turns masked layers back into those of torch.nn, or of the classes that `convert` found, in place.

    Dead weights, biases and affine parameters are written as zeros, so the network computes what it did. An error
    changes nothing. Where a layer computes its weight (a standardized one, `torch.nn.utils.parametrize`), zeros in what
    it stores may not do, and a group or layer norm with dead channels has statistics of the live ones alone, which no
    plain norm has: then restore raises, unless bake is True.

    Args:
        model: A network with masked layers. Live mode is switched off.
        bake: Whether such a layer becomes one that stores the weight as it was computed: it no longer standardizes, and
            what it computed the weight from is gone. A norm becomes a subclass of its plain one that goes on
            normalizing the channels that are live now.

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
    masked = [(n, m) for n, m in model.named_modules() if isinstance(m, (MaskedFilters, MaskedNorm))]
    for name, module in masked:  # checked first, so that an error changes nothing
        _check_restorable("restore", name, module, bake)
    for name, module in masked:
        if isinstance(module, MaskedFilters):
            (report.linears if isinstance(module, nn.Linear) else report.converted).append(name)
            restore_conv("restore", name, module, bake and not zeros_suffice(module))
        else:
            report.norms.append(name)
            restore_norm("restore", name, module, fixed=True)
    return report


@torch.no_grad()
def bake_all(model: nn.Module, op: str = "restore") -> None:
    """Makes every layer of a network a plain one that stores its weight, in place; op: the caller, for errors."""
    flow(model, False)
    for name, module in model.named_modules():
        if isinstance(module, (MaskedFilters, MaskedNorm)):
            _check_restorable(op, name, module, bake=True)
        if isinstance(module, MaskedFilters):
            restore_conv(op, name, module, bake=True)
        elif isinstance(module, MaskedNorm):
            restore_norm(op, name, module)
        elif isinstance(module, nn.Conv2d) and computes_weight(module):
            bake_conv(op, name, module)
        elif has_reparametrization(module):
            remove_reparametrization(op, name, module)


def _check_restorable(op: str, name: str, layer: MaskedFilters | MaskedNorm, bake: bool) -> None:
    layer._look()
    cls: Any = layer_class(layer)
    owner: Any = next(base for base in cls.__mro__ if "plain_class" in vars(base))
    if cls.forward is not owner.forward:
        raise ValueError(f"{op}: {name}: expected a layer whose plain class is known, got {cls.__name__}, a subclass "
                         f"of {owner.__name__} with a forward of its own: set its attribute plain_class")  # fmt: skip
    if isinstance(layer, NormOverChannels) and not layer._all_live and not bake:
        raise ValueError(f"{op}: {name}: expected all channels live, got dead ones, and a plain "
                         f"{cls.plain_class.__name__} has statistics of all channels: pk.shrink gives a small network, "
                         "restore(model, bake=True) a layer that normalizes these channels for good")  # fmt: skip
    if isinstance(layer, MaskedNorm) and layer._each_alone:
        if layer.weight is None and not layer._all_live:
            raise ValueError(f"{op}: {name}: expected affine=True, got dead channels that a plain norm cannot zero")
    suffice = (
        zeros_suffice(layer) if isinstance(layer, MaskedFilters) else layer._all_live or not computes_weight(layer)
    )
    if not bake and not suffice:
        raise ValueError(f"{op}: {name}: expected masks that zeros in the stored weight express, got dead parts of a "
                         f"weight that {cls.plain_class.__name__} computes: restore(model, bake=True) stores the "
                         "computed weight")  # fmt: skip
