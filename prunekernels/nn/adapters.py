"""register_adapter: what a subclass of nn.Conv2d or of a norm does around the plain layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from .library_adapters import KNOWN

PLAIN = (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm)
BASES = (*PLAIN, nn.Linear, nn.ConvTranspose2d)  # the last ones take no adapters
# A class that has these from another class computes what that class computes.
_BEHAVIOUR = ("forward", "_conv_forward", "__call__")


class Adapter(NamedTuple):
    """What a class does around the class of torch.nn that it is of; None: nothing.

    It computes output(layer, plain(input(layer, x), weight(layer))). channels_first: see register_adapter.
    """

    weight: Callable[[Any], Tensor] | None = None
    input: Callable[[Any, Any], Tensor] | None = None
    output: Callable[[Any, Tensor], Tensor] | None = None
    channels_first: bool | Callable[[Any], bool] = False


_registered: dict[type, Adapter] = {}


def register_adapter(
    cls: type[nn.Module],
    *,
    weight: Callable[[Any], Tensor] | None = None,
    input: Callable[[Any, Any], Tensor] | None = None,
    output: Callable[[Any, Tensor], Tensor] | None = None,
    channels_first: bool | Callable[[Any], bool] = False,
) -> None:
    """Tells `convert` what a subclass of a layer that it converts computes, if it has a forward of its own.

    That is output(layer, plain(input(layer, x))), where plain is the convolution with the weight that weight(layer)
    gives, or the norm. `convert` then makes layers of this class masked ones, which are still instances of cls
    and keep their parameters, attributes and state-dict keys. Masks apply to the weight that weight(layer) gives. In
    live mode input and output get live tensors, which go on by the rules of their operators. The classes of timm
    (BatchNormAct2d, SyncBatchNormAct, Conv2dSame, StdConv2d, ScaledStdConv2d and their Same forms, LayerNorm,
    LayerNorm2d, GroupNorm and their forms with activations), torchvision's LayerNorm2d and transformers'
    ConvNextLayerNorm are registered.

    Args:
        cls: The class, a subclass of `nn.Conv2d`, `nn.BatchNorm2d`, `nn.SyncBatchNorm`, `nn.GroupNorm` or
            `nn.LayerNorm`. A subclass of it that leaves forward as it is needs no adapter of its own.
        weight: weight(layer) gives the weight that the convolution computes with, [K, C / groups, R, S], made of the
            whole stored weight (for example a standardized one). Only for convolutions.
        input: input(layer, x) gives what goes into the plain layer (for example padded).
        output: output(layer, y) gives what follows (for example an activation). A dead filter or channel becomes
            output(0).
        channels_first: True for a subclass of `nn.LayerNorm` that normalizes dimension 1 of [N, C, H, W], not the last;
            a function that says so of a layer, where layers of the class differ.

    Examples:
        >>> class ConvReLU(torch.nn.Conv2d):
        ...     def forward(self, x):
        ...         return super().forward(x).relu()
        >>> pk.register_adapter(ConvReLU, output=lambda layer, y: y.relu())
        >>> model = torch.nn.Sequential(ConvReLU(3, 8, 3))
        >>> pk.convert(model).converted, isinstance(model[0], ConvReLU), isinstance(model[0], pk.MaskedConv2d)
        (['0'], True, True)
    """
    if not (isinstance(cls, type) and issubclass(cls, PLAIN) and cls not in PLAIN):
        names = ", ".join(f"nn.{plain.__name__}" for plain in PLAIN)
        raise ValueError(f"register_adapter: cls: expected a subclass of one of {names}, got {cls!r}")
    if weight is not None and not issubclass(cls, nn.Conv2d):
        raise ValueError(f"register_adapter: weight: expected None for a norm, got one for {cls.__name__}")
    for name, function in (("weight", weight), ("input", input), ("output", output)):
        if function is not None and not callable(function):
            raise ValueError(f"register_adapter: {name}: expected a function or None, got {function!r}")
    if channels_first and not issubclass(cls, nn.LayerNorm):
        raise ValueError(f"register_adapter: channels_first: expected a subclass of nn.LayerNorm, got {cls!r}")
    _registered[cls] = Adapter(weight, input, output, channels_first)


def adapter_of(cls: type) -> Adapter | None:
    """The adapter of a class, or of the base whose behaviour it leaves alone; None: it has a forward of its own.

    A subclass of nn.Conv2d, or of another of BASES, that changes nothing but __init__ has an empty adapter.
    """
    for base in cls.__mro__:
        known = Adapter() if base in BASES else _own_adapter(base)
        if known is not None:
            same = all(getattr(cls, name, None) is getattr(base, name, None) for name in _BEHAVIOUR)
            return known if same else None
    return None


def _own_adapter(cls: type) -> Adapter | None:
    if cls in _registered:
        return _registered[cls]
    shipped = KNOWN.get(f"{cls.__module__}.{cls.__qualname__}")
    return None if shipped is None else Adapter(**shipped)
