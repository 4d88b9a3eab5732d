"""Adapters of layers of timm, torchvision and transformers, by qualified name, so that none need be there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def _pad_same(layer: Any, x: Tensor) -> Tensor:
    """x with zeros around it, so that the result has ceil(size / stride) rows; an odd one goes below or right."""
    pad = []
    for size, kernel, stride, dilation in reversed(
        list(zip(x.shape[-2:], layer.kernel_size, layer.stride, layer.dilation, strict=True))
    ):
        missing = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
        pad += [missing // 2, missing - missing // 2]
    return F.pad(x, pad) if any(pad) else x


def _pad_same_if_dynamic(layer: Any, x: Tensor) -> Tensor:
    return _pad_same(layer, x) if layer.same_pad else x


def _standardized(layer: Any) -> Tensor:
    """Each filter with mean 0 and variance 1."""
    rows = layer.weight.reshape(1, layer.out_channels, -1)
    return F.batch_norm(rows, None, None, training=True, momentum=0.0, eps=layer.eps).reshape_as(layer.weight)


def _scaled(layer: Any) -> Tensor:
    """Each filter with mean 0 and a deviation that is learned."""
    rows, gain = layer.weight.reshape(1, layer.out_channels, -1), (layer.gain * layer.scale).view(-1)
    return F.batch_norm(rows, None, None, gain, training=True, momentum=0.0, eps=layer.eps).reshape_as(layer.weight)


def _drop_and_activate(layer: Any, y: Tensor) -> Tensor:
    return layer.act(layer.drop(y))


def _drop_and_activate_if_any(layer: Any, y: Tensor) -> Tensor:
    for name in ("drop", "act"):
        y = getattr(layer, name)(y) if hasattr(layer, name) else y
    return y


def _by_data_format(layer: Any) -> bool:
    return layer.data_format == "channels_first"


_FIRST: dict[str, Any] = {"channels_first": True}
_ACT: dict[str, Callable[..., Tensor]] = {"output": _drop_and_activate}
KNOWN: dict[str, dict[str, Any]] = {
    "timm.layers.norm_act.BatchNormAct2d": _ACT,
    "timm.layers.norm_act.SyncBatchNormAct": {"output": _drop_and_activate_if_any},
    "timm.layers.norm_act.GroupNormAct": _ACT,
    "timm.layers.norm_act.GroupNorm1Act": _ACT,
    "timm.layers.norm_act.LayerNormAct": _ACT,
    "timm.layers.norm_act.LayerNormAct2d": _FIRST | _ACT,
    "timm.layers.norm.GroupNorm": {},
    "timm.layers.norm.GroupNorm1": {},
    "timm.layers.norm.LayerNorm": {},
    "timm.layers.norm.LayerNorm2d": _FIRST,
    "torchvision.models.convnext.LayerNorm2d": _FIRST,
    "transformers.models.convnext.modeling_convnext.ConvNextLayerNorm": {"channels_first": _by_data_format},
    "transformers.models.convnextv2.modeling_convnextv2.ConvNextV2LayerNorm": {"channels_first": _by_data_format},
    "timm.layers.conv2d_same.Conv2dSame": {"input": _pad_same},
    "timm.layers.std_conv.StdConv2d": {"weight": _standardized},
    "timm.layers.std_conv.StdConv2dSame": {"weight": _standardized, "input": _pad_same_if_dynamic},
    "timm.layers.std_conv.ScaledStdConv2d": {"weight": _scaled},
    "timm.layers.std_conv.ScaledStdConv2dSame": {"weight": _scaled, "input": _pad_same_if_dynamic},
}
