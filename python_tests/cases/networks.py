"""Tiny networks of the known families, random masks for them, and integers that make their outputs exact."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk

IMAGE = (3, 8, 8)


def conv_norm(c, k, r=3, act=True, **args):
    layers = [nn.Conv2d(c, k, r, padding=r // 2, bias=False, **args), nn.BatchNorm2d(k)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if act else nn.Sequential(*layers)


class Head(nn.Module):
    def __init__(self, c, pool=1):
        super().__init__()
        self.pool, self.drop, self.fc = nn.AdaptiveAvgPool2d(pool), nn.Dropout(0.1), nn.Linear(c * pool * pool, 5)

    def forward(self, x):
        x = self.pool(x)
        return self.fc(self.drop(x.view(x.size(0), -1)))


class Basic(nn.Module):
    """Residual block; the shortcut is a projection where the width changes."""

    def __init__(self, c, k, stride=1):
        super().__init__()
        self.first = conv_norm(c, k, stride=stride)
        self.second = conv_norm(k, k, act=False)
        self.shortcut = None if c == k else conv_norm(c, k, 1, act=False, stride=stride)

    def forward(self, x):
        out = self.second(self.first(x))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu(out)


class Bottleneck(nn.Module):
    def __init__(self, c, mid, k):
        super().__init__()
        self.body = nn.Sequential(conv_norm(c, mid, 1), conv_norm(mid, mid), conv_norm(mid, k, 1, act=False))
        self.shortcut = nn.Identity() if c == k else conv_norm(c, k, 1, act=False)

    def forward(self, x):
        return torch.relu(self.body(x) + self.shortcut(x))


class TypeA(Basic):
    """The shortcut drops every second pixel and pads the channels."""

    def __init__(self, c, k):
        super().__init__(c, k, stride=2)
        self.shortcut, self.extra = None, (k - c) // 2

    def forward(self, x):
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra), "constant", 0)
        return F.relu(self.second(self.first(x)) + short)


class Inverted(nn.Module):
    """MobileNetV2's block: expand, depthwise, project."""

    def __init__(self, c, k, factor=2):
        super().__init__()
        mid = c * factor
        self.expand = nn.Sequential(nn.Conv2d(c, mid, 1, bias=False), nn.BatchNorm2d(mid), nn.ReLU6(inplace=True))
        self.depthwise = nn.Sequential(
            nn.Conv2d(mid, mid, 3, padding=1, groups=mid, bias=False), nn.BatchNorm2d(mid), nn.ReLU6()
        )
        self.project = conv_norm(mid, k, 1, act=False)
        self.skips = c == k

    def forward(self, x):
        out = self.project(self.depthwise(self.expand(x)))
        return x + out if self.skips else out


class Dense(nn.Module):
    """DenseNet's layer: norm first, new channels beside the old."""

    def __init__(self, c, growth):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(c), nn.Conv2d(c, growth, 3, padding=1, bias=False)

    def forward(self, x):
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


class SqueezeExcite(nn.Module):
    """Channels gated by a small network over their means; as convolutions or as linear layers."""

    def __init__(self, c, linear=False):
        super().__init__()
        self.conv, self.linear = conv_norm(c, c), linear
        self.reduce = nn.Linear(c, 4) if linear else nn.Conv2d(c, 4, 1)
        self.expand = nn.Linear(4, c) if linear else nn.Conv2d(4, c, 1)

    def forward(self, x):
        x = self.conv(x)
        if self.linear:
            n, c = x.shape[:2]
            gate = F.hardtanh(self.expand(F.relu(self.reduce(x.mean((2, 3))))), 0.0, 1.0)
            return x * gate.view(n, c, 1, 1).expand_as(x)
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))


class Halves(nn.Module):
    """Splits the channels, works on one half, swaps them."""

    def __init__(self, c):
        super().__init__()
        self.body = nn.Sequential(conv_norm(c // 2, c // 2), nn.Conv2d(c // 2, c // 2, 3, padding=1, groups=2))

    def forward(self, x):
        a, b = x.chunk(2, 1)
        return torch.cat([self.body(b), a], dim=1)


def plain_chain():
    return nn.Sequential(conv_norm(3, 8), conv_norm(8, 6), nn.MaxPool2d(2), conv_norm(6, 8), Head(8, 2))


def with_biases():
    first = [nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.5), nn.Conv2d(8, 6, 1), nn.ReLU()]
    last = [nn.Conv2d(6, 6, 3, padding=1, stride=2), nn.Flatten(), nn.Linear(6 * 9, 4), nn.ReLU(), nn.Linear(4, 3)]
    return nn.Sequential(*first, *last)


NETWORKS = {
    "plain": plain_chain,
    "biases": with_biases,
    "basic": lambda: nn.Sequential(conv_norm(3, 8), Basic(8, 8), Basic(8, 12, 2), Basic(12, 12), Head(12)),
    "bottleneck": lambda: nn.Sequential(conv_norm(3, 8), Bottleneck(8, 4, 12), Bottleneck(12, 4, 12), Head(12)),
    "type_a": lambda: nn.Sequential(conv_norm(3, 4), Basic(4, 4), TypeA(4, 8), Basic(8, 8), TypeA(8, 16), Head(16)),
    "inverted": lambda: nn.Sequential(conv_norm(3, 6), Inverted(6, 6), Inverted(6, 8), conv_norm(8, 10, 1), Head(10)),
    "dense": lambda: nn.Sequential(conv_norm(3, 6), Dense(6, 4), Dense(10, 4), conv_norm(14, 6, 1), Head(6)),
    "excite": lambda: nn.Sequential(conv_norm(3, 8), SqueezeExcite(8), Basic(8, 8), Head(8)),
    "excite_linear": lambda: nn.Sequential(conv_norm(3, 8), SqueezeExcite(8, linear=True), Basic(8, 8), Head(8)),
    "halves": lambda: nn.Sequential(conv_norm(3, 8), Halves(8), Halves(8), Head(8)),
}
EXACT = sorted(set(NETWORKS) - {"excite"})  # no sigmoid


def trained(name, seed=0, exact=False):
    """A masked network, float64, with statistics and affine parameters of its own; exact: all of them integers."""
    torch.manual_seed(seed)
    net = NETWORKS[name]().double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if exact and isinstance(module, nn.BatchNorm2d):
            module.eps, module.running_var[:] = 1e-300, 1.0  # adds nothing; torch 2.11 refuses 0
    if exact:
        with torch.no_grad():
            for p in (*net.parameters(), *(b for b in net.buffers() if b.is_floating_point())):
                p.copy_(torch.randint(-2, 3, p.shape) if p.dim() > 1 else p.round())
    pk.convert(net)
    return net.eval()


def images(batch=2, exact=False):
    x = torch.randn(batch, *IMAGE, dtype=torch.float64)
    return x.mul(2).round() if exact else x


def mask_at_random(net, seed, kept=0.6, norms=0.7, kernels=0.3):
    """Dead filters in every layer; most norms behind them masked as well; single kernels in some layers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(shape, generator=generator)

    last = None
    for module in net.modules():
        if isinstance(module, pk.MaskedConv2d):
            last = draw(module.out_channels) < kept
            kernel = draw(*module.kernel_mask.shape) < 0.5 if draw(1) < kernels else None
            inputs = draw(module.in_channels) < 0.8 if draw(1) < 0.2 else None
            module.set_masks(filter=last, kernel=kernel, input=inputs)
        elif isinstance(module, pk.MaskedBatchNorm2d) and last is not None and draw(1) < norms:
            same = last.numel() == module.num_features
            module.set_mask(last if same else draw(module.num_features) < kept)
    return net


def assert_same_function(net, small, x):
    """small gives net's eval outputs."""
    net = copy.deepcopy(net).eval()
    with torch.no_grad():
        torch.testing.assert_close(small.eval()(x), net(x), rtol=1e-9, atol=1e-9)
