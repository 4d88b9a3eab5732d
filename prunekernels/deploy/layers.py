"""Layers of torch.nn as plain values: the name of their class, and the arguments that build them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from .errors import Unsupported
from .values import decode, encode

# Layers that compute one tensor from one, by their attributes and parameters alone.
_CLASSES: tuple[type[nn.Module], ...] = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Linear, nn.Embedding,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d,
    nn.InstanceNorm3d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.GLU, nn.SiLU, nn.Mish,
    nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softplus, nn.Softshrink,
    nn.Softsign, nn.Tanhshrink, nn.Threshold, nn.LogSigmoid, nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.LPPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.PixelShuffle, nn.PixelUnshuffle,
    nn.ChannelShuffle, nn.Flatten, nn.Unflatten, nn.Fold, nn.Unfold, nn.Identity,
)  # fmt: skip
LAYERS = {cls.__name__: cls for cls in _CLASSES}
_NOT_ARGUMENTS = ("self", "device", "dtype", "process_group")


def is_layer(module: nn.Module) -> bool:
    """Whether a saved network may hold a module: a layer of torch.nn itself, since a subclass may compute anything."""
    return LAYERS.get(type(module).__name__) is type(module)


def _argument_names(cls: type[nn.Module]) -> list[str]:
    named = inspect.signature(cls.__init__).parameters.values()
    return [
        p.name
        for p in named
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and p.name not in _NOT_ARGUMENTS
        and not p.name.startswith("_")
    ]


def describe_layer(layer: nn.Module) -> dict[str, Any]:
    """A layer's class and arguments, as values for JSON; its tensors are described elsewhere."""
    if not is_layer(layer):
        raise Unsupported(f"a {type(layer).__name__}")
    arguments: dict[str, Any] = {}
    for name in _argument_names(type(layer)):
        if name == "bias":
            arguments[name] = getattr(layer, "bias", None) is not None
        elif hasattr(layer, name):
            arguments[name] = encode(getattr(layer, name))
    return {"type": type(layer).__name__, "arguments": arguments}


def build_layer(described: Any) -> nn.Module:
    """The layer that describe_layer described, on the meta device."""
    cls = LAYERS.get(described["type"])
    if cls is None:
        raise Unsupported(f"a layer of the class {str(described['type'])[:100]!r}")
    arguments = {name: decode(value) for name, value in described["arguments"].items()}
    unknown = sorted(set(arguments) - set(_argument_names(cls)))
    if unknown:
        raise Unsupported(f"arguments of {cls.__name__}: {', '.join(unknown)[:100]}")
    with torch.device("meta"):
        return cls(**arguments)
