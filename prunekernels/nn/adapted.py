"""The masked classes that convert makes of subclasses, and how masked layers become plain ones again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import Adapter, adapter_of
from .batch_norm import MaskedBatchNorm2d
from .conv import MaskedConv2d
from .conv_transpose import MaskedConvTranspose2d
from .fixed_norm import FixedChannels, FixedGroupNorm, FixedLayerNorm, set_channels
from .group_norm import MaskedGroupNorm
from .layer_norm import MaskedLayerNorm
from .linear import MaskedLinear
from .mask_buffers import _same_as
from .masked_filters import MaskedFilters
from .masked_norm import MaskedNorm
from .norm_channels import NormChannels
from .norm_over_channels import NormOverChannels
from .reparametrized import (
    deep_copy,
    has_reparametrization,
    is_reparametrized,
    layer_class,
    remove_reparametrization,
    set_layer_class,
)
from .sync_batch_norm import MaskedSyncBatchNorm


class _Made(nn.Module):
    """Mixin of classes that are made at run time: pickle makes them anew from the class they came from."""

    _adapter: Adapter
    _recipe: tuple[Any, ...]  # a class that pickle finds by its name, and the functions that made this one of it

    def __reduce_ex__(self, protocol: Any) -> Any:
        made: Any = super().__reduce_ex__(protocol)
        return _new, self._recipe, *made[2:]

    def _before(self, x: Tensor) -> Tensor:
        change = self._adapter.input
        return x if change is None else change(self, x)

    def _after(self, y: Tensor) -> Tensor:
        change = self._adapter.output
        return y if change is None else change(self, y)


def _new(cls: type[nn.Module], *makers: Callable[[type[nn.Module]], type[nn.Module]]) -> Any:
    for make in makers:
        cls = make(cls)
    return cls.__new__(cls)


class _PlainConv2d(nn.Conv2d):
    """Stands above the class that a masked one came from, whose forward would do everything that the adapter does."""

    def forward(self, input: Tensor) -> Tensor:
        weight: Tensor = self._computed_weight()  # type: ignore[operator]
        return nn.Conv2d._conv_forward(self, input, weight, self.bias)


class _AdaptedConv2d(MaskedConv2d, _Made):
    """A masked convolution inside of what its class does around it."""

    def _computed_weight(self) -> Tensor:
        compute = self._adapter.weight
        return self.weight if compute is None else compute(self)

    def _prepared(self, x: Tensor) -> Tensor:
        return self._before(x)

    def forward(self, input: Tensor) -> Tensor:
        return self._after(super().forward(self._before(input)))

    def _dead_entries(self) -> dict[str, Tensor]:
        dead = super()._dead_entries()
        if dead and self._adapter.weight is not None:  # zeros for dead inputs would change what live kernels become
            dead["weight"] = dead["bias"].view(-1, 1, 1, 1)
        return dead

    def to_conv(self) -> nn.Conv2d:
        copy = deep_copy(self)
        restore_conv("MaskedConv2d.to_conv", "layer", copy, bake=not zeros_suffice(copy))
        return copy

    @torch.no_grad()
    def zero_dead(self, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        if weight is None and not zeros_suffice(self):
            raise ValueError(f"{type(self).__name__}.zero_dead: weight: expected masks that zeros in the stored weight "
                             "express, got dead inputs or kernels: see pk.restore(model, bake=True)")  # fmt: skip
        super().zero_dead(weight, bias)


class _PlainBatchNorm2d(nn.BatchNorm2d):
    forward = nn.BatchNorm2d.forward


class _AroundNorm(_Made):
    """A norm inside of what its class does around it."""

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = super().forward(self._before(input))  # type: ignore[misc]
        return self._after(y)


class _AdaptedNorm(_AroundNorm):
    """A masked norm inside of what its class does around it."""

    def to_norm(self) -> nn.Module:
        copy: Any = deep_copy(self)
        restore_norm(f"{copy._called}.to_norm", "layer", copy, fixed=True)
        return copy  # type: ignore[no-any-return]


class _BakedConv2d(nn.Conv2d, _Made):
    """A class whose weight was computed once; what it does to inputs and outputs it goes on doing."""

    def forward(self, input: Tensor) -> Tensor:
        return self._after(nn.Conv2d._conv_forward(self, self._before(input), self.weight, self.bias))


class _AdaptedLinear(MaskedLinear, _Made):
    """A masked linear layer of a class that has no forward of its own."""


class _AdaptedConvTranspose2d(MaskedConvTranspose2d, _Made):
    """A masked transposed convolution of a class that has no forward of its own."""


_MASKED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: MaskedConv2d,
    nn.BatchNorm2d: MaskedBatchNorm2d,
    nn.SyncBatchNorm: MaskedSyncBatchNorm,
    nn.Linear: MaskedLinear,
    nn.ConvTranspose2d: MaskedConvTranspose2d,
    nn.GroupNorm: MaskedGroupNorm,
    nn.LayerNorm: MaskedLayerNorm,
}
_ADAPTED: dict[type[nn.Module], tuple[type[nn.Module], ...]] = {  # of subclasses
    nn.Conv2d: (_AdaptedConv2d, _PlainConv2d),
    nn.BatchNorm2d: (_AdaptedNorm, MaskedBatchNorm2d, _PlainBatchNorm2d),
    nn.SyncBatchNorm: (_AdaptedNorm, MaskedSyncBatchNorm, _PlainBatchNorm2d),
    nn.Linear: (_AdaptedLinear,),
    nn.ConvTranspose2d: (_AdaptedConvTranspose2d,),
    nn.GroupNorm: (_AdaptedNorm, MaskedGroupNorm),
    nn.LayerNorm: (_AdaptedNorm, MaskedLayerNorm),
}


def masked_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The masked class of a class of plain layers; None: it has a forward of its own, and no adapter."""
    if cls in _MASKED:
        return _MASKED[cls]
    adapter = _adapter_of(cls)
    return None if adapter is None else _make_masked(cls, adapter)  # type: ignore[arg-type]


def _adapter_of(cls: type[nn.Module]) -> Adapter | None:
    return cls._adapter if issubclass(cls, _Made) else adapter_of(cls)


def plain_adapter(cls: type[nn.Module]) -> bool:
    """Whether a class computes what its class of torch.nn does."""
    return _adapter_of(cls) == Adapter()


@functools.cache
def _make_masked(cls: Any, adapter: Adapter) -> type[nn.Module]:
    bases = next(bases for plain, bases in _ADAPTED.items() if issubclass(cls, plain))
    return _make(f"Masked{cls.__name__}", (*bases, cls), adapter, _masked_again, plain_class=cls)


def _masked_again(cls: type[nn.Module]) -> type[nn.Module]:
    made = masked_class(cls)
    if made is None:
        raise ValueError(f"{cls.__qualname__}: expected the adapter that the saved layer had: call pk.register_adapter "
                         "before you load it")  # fmt: skip
    return made


def baked_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of convolutions that compute what cls does with a weight that is stored as it is used."""
    adapter = adapter_of(cls)
    if adapter is None or (adapter.input is None and adapter.output is None):
        return nn.Conv2d
    return _make_baked(cls, adapter._replace(weight=None))  # type: ignore[arg-type]


@functools.cache
def _make_baked(cls: Any, adapter: Adapter) -> type[nn.Module]:
    return _make(f"Baked{cls.__name__}", (_BakedConv2d, cls), adapter, baked_class)


def fixed_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of norms that do what cls does, over a fixed list of channels."""
    if cls is nn.GroupNorm or cls is nn.LayerNorm:
        return FixedGroupNorm if cls is nn.GroupNorm else FixedLayerNorm
    adapter = adapter_of(cls)
    if adapter is None:
        raise ValueError(f"{cls.__qualname__}: expected a norm that convert knows: see pk.register_adapter")
    return _make_fixed(cls, adapter)  # type: ignore[arg-type]


@functools.cache
def _make_fixed(cls: Any, adapter: Adapter) -> type[nn.Module]:
    base: Any = FixedGroupNorm if issubclass(cls, nn.GroupNorm) else FixedLayerNorm
    bases = (base, _Made) if adapter.input is None and adapter.output is None else (_AroundNorm, base)
    return _make(f"Fixed{cls.__name__}", (*bases, cls), adapter, fixed_class, plain_class=cls)


def keep_channels(norm: nn.Module, channels: NormChannels) -> None:
    """Makes a norm over several channels one of these, in place; its parameters have their sizes already.

    norm: without masks, plain or made by this function before.
    """
    plain: Any = layer_class(norm)
    plain = plain.plain_class if issubclass(plain, FixedChannels) else plain
    set_channels(norm, channels, plain, plain if channels.plain else fixed_class(plain))


def _make(name: str, bases: tuple[type, ...], adapter: Adapter, maker: Any, **attributes: Any) -> type[nn.Module]:
    cls = bases[-1]
    recipe = (*(cls._recipe if issubclass(cls, _Made) else (cls,)), maker)
    own = {"__module__": cls.__module__, "_adapter": adapter, "_recipe": recipe, **attributes}
    if adapter.channels_first:
        own["_channels_first"] = property(adapter.channels_first) if callable(adapter.channels_first) else True
    return type(cls)(name, bases, own)


def computes_weight(layer: nn.Module) -> bool:
    """Whether a convolution or norm reads another weight than it stores."""
    adapter = _adapter_of(layer_class(layer))
    return is_reparametrized(layer) or (adapter is not None and adapter.weight is not None)


def has_computed_weight(module: nn.Module | None) -> bool:
    """The same of any module."""
    known = isinstance(module, nn.Conv2d) and computes_weight(module)
    return known or (module is not None and has_reparametrization(module))


def computed_layers(model: nn.Module) -> list[str]:
    """Names of the layers of a network that read another weight than they store."""
    return [name for name, layer in model.named_modules() if has_computed_weight(layer)]


@torch.no_grad()
def zeros_suffice(layer: MaskedFilters) -> bool:
    """Whether zeros for all that is dead in the stored weight make the plain layer compute what the masked one does."""
    layer._look()
    if layer._all_live or not computes_weight(layer):
        return True
    if is_reparametrized(layer):
        return False
    trial = _same_as(layer, type(layer))
    trial._parameters["weight"] = nn.Parameter(layer.weight.detach().clone())
    MaskedFilters.zero_dead(trial, trial.weight)
    want = layer._computed_weight().clone()
    MaskedFilters.zero_dead(layer, want)
    return torch.allclose(trial._computed_weight(), want, rtol=1e-5, atol=0)


@torch.no_grad()
def restore_conv(op: str, name: str, layer: MaskedFilters, bake: bool) -> None:
    """Makes a plain layer of a masked one. bake: with its computed weight, if it computes one, stored for good."""
    cls = layer.plain_class
    if bake and computes_weight(layer):
        cls = _bake(op, name, layer, cls)
    if not is_reparametrized(layer):
        MaskedFilters.zero_dead(layer, layer.weight, layer.bias)
    layer._drop_masks()
    set_layer_class(layer, cls)


@torch.no_grad()
def restore_norm(op: str, name: str, layer: MaskedNorm, fixed: bool = False) -> None:
    """Makes a plain layer of a masked one. fixed: what computes the same, where a plain layer with zeros does not."""
    layer._look()
    if is_reparametrized(layer) and not layer._all_live:
        remove_reparametrization(op, name, layer)
    channels = layer.norm_channels() if fixed and isinstance(layer, NormOverChannels) else None
    if not is_reparametrized(layer) and (layer.weight is not None or channels is None):
        layer.zero_dead()
    layer._drop_masks()
    set_layer_class(layer, layer.plain_class)
    if channels is not None and not channels.plain:
        keep_channels(layer, channels)


@torch.no_grad()
def bake_conv(op: str, name: str, layer: nn.Conv2d) -> None:
    """Makes a convolution that computes its weight one that stores it."""
    set_layer_class(layer, _bake(op, name, layer, layer_class(layer)))


def _bake(op: str, name: str, layer: Any, cls: type[nn.Module]) -> type[nn.Module]:
    """Stores the weight of a layer as it is used; returns the class that reads it, given the one that computed it."""
    remove_reparametrization(op, name, layer)
    adapter = _adapter_of(cls)
    if adapter is None or adapter.weight is None:
        return cls
    layer.weight.copy_(adapter.weight(layer))
    cls = baked_class(cls)
    if cls is nn.Conv2d:
        for key in set(layer._parameters) - {"weight", "bias"}:
            del layer._parameters[key]
    return cls
