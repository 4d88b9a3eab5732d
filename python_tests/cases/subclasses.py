"""Subclasses of convolutions and norms as people write them, and stand-ins of timm's with timm's adapters."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from prunekernels.nn.library_adapters import KNOWN


def same_padding(x, kernel, stride, dilation):
    missing = [
        max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        for n, k, s, d in zip(x.shape[-2:], kernel, stride, dilation, strict=True)
    ]
    (h, w) = missing
    return F.pad(x, [w // 2, w - w // 2, h // 2, h - h // 2])


class BatchNormAct2d(nn.BatchNorm2d):
    def __init__(self, C, act=None, drop=None):
        super().__init__(C)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.ReLU(inplace=True) if act is None else act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Conv2dSame(nn.Conv2d):
    def forward(self, x):
        x = same_padding(x, self.kernel_size, self.stride, self.dilation)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class StdConv2d(nn.Conv2d):
    def __init__(self, *args, eps=1e-6, **kwargs):
        super().__init__(*args, **kwargs)
        self.eps = eps

    def computed(self, gain=None):
        rows = self.weight.reshape(1, self.out_channels, -1)
        return F.batch_norm(rows, None, None, gain, training=True, momentum=0.0, eps=self.eps).reshape_as(self.weight)

    def forward(self, x):
        return F.conv2d(x, self.computed(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class StdConv2dSame(StdConv2d):
    same_pad = True

    def forward(self, x):
        return super().forward(same_padding(x, self.kernel_size, self.stride, self.dilation))


class ScaledStdConv2d(StdConv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)
        self.scale = self.weight[0].numel() ** -0.5

    def computed(self):
        return super().computed((self.gain * self.scale).view(-1))


for cls, module in (
    (BatchNormAct2d, "norm_act"),
    (Conv2dSame, "conv2d_same"),
    (StdConv2d, "std_conv"),
    (StdConv2dSame, "std_conv"),
    (ScaledStdConv2d, "std_conv"),
):
    pk.register_adapter(cls, **KNOWN[f"timm.layers.{module}.{cls.__name__}"])


class Unit(nn.Conv2d):
    """Filters of length g, as weight normalization makes them, between a scale of the input and an activation."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.g = nn.Parameter(torch.rand(self.out_channels) + 0.5)
        self.channel_scale = nn.Parameter(torch.rand(self.in_channels, 1, 1) + 0.5)

    def unit(self):
        norm = self.weight.flatten(1).norm(dim=1).clamp_min(1e-12)
        return self.weight * (self.g / norm).view(-1, 1, 1, 1)

    def forward(self, x):
        y = F.conv2d(x * self.channel_scale, self.unit(), self.bias, self.stride, self.padding)
        return F.leaky_relu(y, 0.1)


class NormSigmoid(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).sigmoid()


class Initialised(nn.Conv2d):
    """Changes nothing but the weights it starts with."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        nn.init.orthogonal_(self.weight)


class Unknown(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


pk.register_adapter(
    Unit, weight=Unit.unit, input=lambda m, x: x * m.channel_scale, output=lambda m, y: F.leaky_relu(y, 0.1)
)
pk.register_adapter(NormSigmoid, output=lambda m, y: y.sigmoid())

CONVS = (Conv2dSame, StdConv2d, StdConv2dSame, ScaledStdConv2d, Unit, Initialised)
COMPUTED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, Unit)


KEEP, LAST = torch.arange(8) % 3 != 1, torch.arange(6) > 1  # the masks of the two convolutions
X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))
all_convs = pytest.mark.parametrize("cls", CONVS, ids=lambda cls: cls.__name__)


def make(cls, act=None, seed=0, **args):
    """Two convolutions of a class between norms with activations."""
    torch.manual_seed(seed)
    padding = 0 if cls.__name__.endswith("Same") else 1
    net = nn.Sequential(
        cls(3, 8, 3, stride=2, padding=padding, **args),
        BatchNormAct2d(8, act),
        cls(8, 6, 3, padding=padding),
        NormSigmoid(6),
    )
    for norm in (net[1], net[3]):
        nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.uniform_(norm.bias, -0.5, 0.5)
        nn.init.uniform_(norm.running_mean, -0.5, 0.5), nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return net


def mask(net):
    net[0].set_masks(filter=KEEP)
    net[1].set_mask(KEEP)
    net[2].set_masks(filter=LAST, input=KEEP)
    net[3].set_mask(LAST)
    return net


def masked(cls, **args):
    net = make(cls, **args)
    pk.convert(net)
    return mask(net)


def expected(net, x):
    """What the classes compute by themselves, with masks as products of what they compute."""
    for layer, keep in ((net[0], KEEP), (net[1], KEEP), (net[2], LAST), (net[3], LAST)):
        weight = layer._computed_weight() if isinstance(layer, nn.Conv2d) else None
        channels = keep.view(1, -1, 1, 1)
        if weight is None:
            x = layer._after(channels * nn.functional.batch_norm(
                x, layer.running_mean, layer.running_var, layer.weight, layer.bias, False, 0.0, layer.eps))  # fmt: skip
        else:
            x = layer._prepared(x)
            x = layer._after(channels * nn.functional.conv2d(x, weight, layer.bias, layer.stride, layer.padding))
    return x
