"""Reference networks in plain torch.nn.

    model = build("resnet20", num_classes=10)

A builder's arguments are (num_classes, *, width=1.0, in_channels=3). In a network of some width, a layer of K filters
has scaled(K, width) of them: resnet56(width=0.5) has half of the filters. Images may have any size from 8x8.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def scaled(channels: int, share: float) -> int:
    """The number of channels at this share: rounded, at least 1."""
    return max(1, round(channels * share))


class PadShortcut(nn.Module):
    """A shortcut without parameters (type A): skips pixels and appends zero channels."""

    def __init__(self, extra_channels: int, stride: int) -> None:
        super().__init__()
        self.extra_channels, self.stride = extra_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra_channels))

    def extra_repr(self) -> str:
        return f"extra_channels={self.extra_channels}, stride={self.stride}"


class Residual(nn.Module):
    """Computes activation(body(x) + shortcut(x))."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.activation = body, shortcut, activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.body(x) + self.shortcut(x))


class DenseLayer(nn.Module):
    """A layer of a dense block: computes cat(x, body(x))."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.body(x)), 1)


def _conv(C: int, K: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(C, K, kernel, stride, kernel // 2, groups=groups, bias=False)


def _conv_norm_relu(C: int, K: int, kernel: int = 3, stride: int = 1, relu: type = nn.ReLU) -> nn.Sequential:
    return _named(conv=_conv(C, K, kernel, stride), norm=nn.BatchNorm2d(K), relu=relu(inplace=True))


def _named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def _head(C: int, num_classes: int) -> dict[str, nn.Module]:
    return {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "classifier": nn.Linear(C, num_classes)}


def _check(name: str, num_classes: int, width: float, in_channels: int) -> None:
    if width <= 0:
        raise ValueError(f"{name}: width: expected a positive share, got {width}")
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise ValueError(f"{name}: {argument}: expected at least 1, got {value}")


def with_new_weights(model: nn.Module) -> nn.Module:
    """Draws a network's weights anew, in place, as the builders here do; statistics of norms are as at first.

    Kernels of convolutions that are zero, which shrink leaves of single dead ones, are zero afterwards and get no
    gradients.
    """
    dead = {module: zero_kernels(module.weight) for module in model.modules() if isinstance(module, nn.Conv2d)}
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
    _initialised(model)
    for layer, zeros in dead.items():
        if bool(zeros.any()):
            with torch.no_grad():
                layer.weight.masked_fill_(zeros, 0)
            layer.weight.register_hook(lambda grad, zeros=zeros: grad.masked_fill(zeros.to(grad.device), 0))
    return model


def zero_kernels(weight: Tensor) -> Tensor:
    """Bool [K, C / groups, 1, 1]: the kernels of a convolution that are zero."""
    return (weight == 0).all(3, keepdim=True).all(2, keepdim=True)


def _initialised(model: nn.Module) -> nn.Module:
    """He's normal initialisation by a convolution's outputs; norms and biases keep torch's ones and zeros."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)
    return model


def _vgg(name: str, stages: list[list[int]], num_classes: int, width: float, in_channels: int) -> nn.Module:
    """Stages of 3x3 convolutions with a pooling between each two, then one linear layer."""
    _check(name, num_classes, width, in_channels)
    layers: dict[str, nn.Module] = {}
    C = in_channels
    for s, stage in enumerate(stages, 1):
        if s > 1:  # rounds up, so that an image of one pixel passes
            layers[f"pool{s - 1}"] = nn.MaxPool2d(2, ceil_mode=True)
        for i, filters in enumerate(stage, 1):
            K = scaled(filters, width)
            layers[f"stage{s}_{i}"] = _conv_norm_relu(C, K)
            C = K
    return _initialised(_named(**layers, **_head(C, num_classes)))


def vgg16_bn(num_classes: int = 10, *, width: float = 1.0, in_channels: int = 3) -> nn.Module:
    """VGG-16 with batch norm in its form for CIFAR: 13 convolutions, global pooling, one linear layer."""
    stages = [[64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3]
    return _vgg("vgg16_bn", stages, num_classes, width, in_channels)


def vgg_small(num_classes: int = 10, *, width: float = 1.0, in_channels: int = 3) -> nn.Module:
    """Six convolutions for images as small as 8x8."""
    return _vgg("vgg_small", [[32] * 2, [64] * 2, [128] * 2], num_classes, width, in_channels)


def _basic(C: int, K: int, filters: int, width: float, stride: int, shortcut: nn.Module) -> Residual:
    M = scaled(filters, width)
    body = _named(
        conv1=_conv(C, M, 3, stride), norm1=nn.BatchNorm2d(M), relu1=nn.ReLU(inplace=True),
        conv2=_conv(M, K), norm2=nn.BatchNorm2d(K),
    )  # fmt: skip
    return Residual(body, shortcut, nn.ReLU(inplace=True))


def _bottleneck(C: int, K: int, filters: int, width: float, stride: int, shortcut: nn.Module) -> Residual:
    M = scaled(filters, width)
    body = _named(
        conv1=_conv(C, M, 1), norm1=nn.BatchNorm2d(M), relu1=nn.ReLU(inplace=True),
        conv2=_conv(M, M, 3, stride), norm2=nn.BatchNorm2d(M), relu2=nn.ReLU(inplace=True),
        conv3=_conv(M, K, 1), norm3=nn.BatchNorm2d(K),
    )  # fmt: skip
    return Residual(body, shortcut, nn.ReLU(inplace=True))


def _cifar_resnet(depth: int, num_classes: int, width: float, in_channels: int) -> nn.Module:
    _check(f"resnet{depth}", num_classes, width, in_channels)
    C = scaled(16, width)
    layers: dict[str, nn.Module] = {"stem": _conv_norm_relu(in_channels, C)}
    for s, filters in enumerate((16, 32, 64), 1):
        K, blocks = scaled(filters, width), []
        for b in range((depth - 2) // 6):
            stride = 2 if s > 1 and b == 0 else 1
            shortcut = nn.Identity() if stride == 1 else PadShortcut(K - C, stride)
            blocks.append(_basic(C, K, filters, width, stride, shortcut))
            C = K
        layers[f"stage{s}"] = nn.Sequential(*blocks)
    return _initialised(_named(**layers, **_head(C, num_classes)))


def resnet20(num_classes: int = 10, *, width: float = 1.0, in_channels: int = 3) -> nn.Module:
    """ResNet-20 for CIFAR, shortcuts of type A."""
    return _cifar_resnet(20, num_classes, width, in_channels)


def resnet32(num_classes: int = 10, *, width: float = 1.0, in_channels: int = 3) -> nn.Module:
    """ResNet-32 for CIFAR, shortcuts of type A."""
    return _cifar_resnet(32, num_classes, width, in_channels)


def resnet56(num_classes: int = 10, *, width: float = 1.0, in_channels: int = 3) -> nn.Module:
    """ResNet-56 for CIFAR, shortcuts of type A."""
    return _cifar_resnet(56, num_classes, width, in_channels)


def resnet110(num_classes: int = 10, *, width: float = 1.0, in_channels: int = 3) -> nn.Module:
    """ResNet-110 for CIFAR, shortcuts of type A."""
    return _cifar_resnet(110, num_classes, width, in_channels)


def _imagenet_resnet(
    name: str, counts: tuple[int, ...], expansion: int, num_classes: int, width: float, in_channels: int
) -> nn.Module:
    _check(name, num_classes, width, in_channels)
    C = scaled(64, width)
    layers: dict[str, nn.Module] = {"stem": _conv_norm_relu(in_channels, C, 7, 2), "pool1": nn.MaxPool2d(3, 2, 1)}
    block = _basic if expansion == 1 else _bottleneck
    for s, (filters, count) in enumerate(zip((64, 128, 256, 512), counts, strict=True), 1):
        K, blocks = scaled(filters * expansion, width), []
        for b in range(count):
            stride = 2 if s > 1 and b == 0 else 1
            shortcut: nn.Module = nn.Identity()
            if b == 0 and (s > 1 or expansion > 1):
                shortcut = _named(conv=_conv(C, K, 1, stride), norm=nn.BatchNorm2d(K))
            blocks.append(block(C, K, filters, width, stride, shortcut))
            C = K
        layers[f"stage{s}"] = nn.Sequential(*blocks)
    return _initialised(_named(**layers, **_head(C, num_classes)))


def resnet18(num_classes: int = 1000, *, width: float = 1.0, in_channels: int = 3) -> nn.Module:
    """ResNet-18 for ImageNet."""
    return _imagenet_resnet("resnet18", (2, 2, 2, 2), 1, num_classes, width, in_channels)


def resnet34(num_classes: int = 1000, *, width: float = 1.0, in_channels: int = 3) -> nn.Module:
    """ResNet-34 for ImageNet."""
    return _imagenet_resnet("resnet34", (3, 4, 6, 3), 1, num_classes, width, in_channels)


def resnet50(num_classes: int = 1000, *, width: float = 1.0, in_channels: int = 3) -> nn.Module:
    """ResNet-50 for ImageNet, the stride in a block's 3x3 convolution."""
    return _imagenet_resnet("resnet50", (3, 4, 6, 3), 4, num_classes, width, in_channels)


def _inverted(C: int, K: int, M: int, stride: int, expand: bool) -> nn.Sequential:
    layers: dict[str, nn.Module] = {}
    if expand:
        layers |= {"expand": _conv(C, M, 1), "norm1": nn.BatchNorm2d(M), "relu1": nn.ReLU6(inplace=True)}
    layers |= {"depthwise": _conv(M, M, 3, stride, M), "norm2": nn.BatchNorm2d(M), "relu2": nn.ReLU6(inplace=True)}
    return _named(**layers, project=_conv(M, K, 1), norm3=nn.BatchNorm2d(K))


def mobilenet_v2(num_classes: int = 1000, *, width: float = 1.0, in_channels: int = 3) -> nn.Module:
    """MobileNetV2 for ImageNet. A depthwise convolution has as many filters as the one before it."""
    _check("mobilenet_v2", num_classes, width, in_channels)
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    full, C = 32, scaled(32, width)
    layers: dict[str, nn.Module] = {"stem": _conv_norm_relu(in_channels, C, 3, 2, nn.ReLU6)}
    for s, (expansion, filters, count, first_stride) in enumerate(stages, 1):
        K, blocks = scaled(filters, width), []
        for b in range(count):
            stride = first_stride if b == 0 else 1
            body = _inverted(C, K, scaled(full * expansion, width), stride, expansion > 1)
            joined = stride == 1 and full == filters
            blocks.append(Residual(body, nn.Identity(), nn.Identity()) if joined else body)
            full, C = filters, K
        layers[f"stage{s}"] = nn.Sequential(*blocks)
    layers["last"] = _conv_norm_relu(C, K := scaled(1280, width), 1, 1, nn.ReLU6)
    return _initialised(_named(**layers, **_head(K, num_classes)))


def densenet40(num_classes: int = 10, *, width: float = 1.0, in_channels: int = 3) -> nn.Module:
    """DenseNet-40 for CIFAR: growth 12, no bottlenecks, no compression."""
    _check("densenet40", num_classes, width, in_channels)
    full, C, growth = 16, scaled(16, width), scaled(12, width)
    layers: dict[str, nn.Module] = {"stem": _conv(in_channels, C)}
    for s in (1, 2, 3):
        if s > 1:
            K = scaled(full, width)
            norm_relu = {"norm": nn.BatchNorm2d(C), "relu": nn.ReLU(inplace=True)}
            layers[f"transition{s - 1}"] = _named(**norm_relu, conv=_conv(C, K, 1), pool=nn.AvgPool2d(2))
            C = K
        for i in range(1, 13):
            body = _named(norm=nn.BatchNorm2d(C), relu=nn.ReLU(inplace=True), conv=_conv(C, growth))
            layers[f"stage{s}_{i}"] = DenseLayer(body)
            full, C = full + 12, C + growth
    return _initialised(_named(**layers, norm=nn.BatchNorm2d(C), relu=nn.ReLU(inplace=True), **_head(C, num_classes)))


_BUILDERS = (
    vgg16_bn, vgg_small, resnet20, resnet32, resnet56, resnet110,
    resnet18, resnet34, resnet50, mobilenet_v2, densenet40,
)  # fmt: skip
MODELS: dict[str, Callable[..., nn.Module]] = {builder.__name__: builder for builder in _BUILDERS}


def build(name: str, *args: Any, **kwargs: Any) -> nn.Module:
    """Builds a network of MODELS by its name; the other arguments are its builder's."""
    if name not in MODELS:
        raise ValueError(f"build: name: expected one of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name](*args, **kwargs)
