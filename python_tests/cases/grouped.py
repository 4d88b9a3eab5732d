"""Networks with grouped convolutions of several channels a group, and masks inside their groups."""

import torch
from torch import nn

import prunekernels as pk
from cases.networks import Head, conv_norm


class Aggregated(nn.Module):
    """ResNeXt's block; gated: RegNet's, with squeeze and excitation behind the grouped layer."""

    def __init__(self, c, mid, groups, gated=False):
        super().__init__()
        self.narrow, self.grouped = conv_norm(c, mid, 1), conv_norm(mid, mid, groups=groups)
        self.reduce, self.expand = (nn.Conv2d(mid, 4, 1), nn.Conv2d(4, mid, 1)) if gated else (None, None)
        self.widen = conv_norm(mid, c, 1, act=False)

    def forward(self, x):
        y = self.grouped(self.narrow(x))
        if self.reduce is not None:
            y = y * torch.sigmoid(self.expand(torch.relu(self.reduce(y.mean((2, 3), keepdim=True)))))
        return torch.relu(x + self.widen(y))


class Added(nn.Module):
    """Grouped layers around which shortcuts go."""

    def __init__(self, c, groups):
        super().__init__()
        self.body = nn.Sequential(*(conv_norm(c, c, groups=g) for g in groups))

    def forward(self, x):
        for layer in self.body:
            x = x + layer(x)
        return x


class Shared(nn.Module):
    """One grouped layer in two places, and beside it one that reads a half of the channels."""

    def __init__(self, c):
        super().__init__()
        self.grouped, self.beside = conv_norm(c, c, groups=2), nn.Conv2d(c // 2, c // 2, 1, groups=2)

    def forward(self, x):
        a, b = self.grouped(self.grouped(x)).chunk(2, 1)
        return torch.cat([self.beside(a), b], 1)


def biased():
    first = [nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1, groups=4), nn.LeakyReLU(0.5)]
    last = [nn.Conv2d(8, 6, 1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 4)]
    return nn.Sequential(*first, *last)


def depthwise_beside():
    middle = [conv_norm(12, 12, groups=12), conv_norm(12, 24, groups=12), conv_norm(24, 12, groups=4)]
    return nn.Sequential(conv_norm(3, 12), conv_norm(12, 12, groups=3), *middle, Head(12))


GROUPED = {
    "biased": biased,
    "chain": lambda: nn.Sequential(conv_norm(3, 12), *(conv_norm(12, 12, groups=g) for g in (3, 2, 6)), Head(12)),
    "resnext": lambda: nn.Sequential(conv_norm(3, 8), Aggregated(8, 12, 3), Aggregated(8, 16, 4), Head(8)),
    "regnet": lambda: nn.Sequential(conv_norm(3, 8), *(Aggregated(8, 12, 3, gated=True) for _ in "ab"), Head(8)),
    "added": lambda: nn.Sequential(conv_norm(3, 12), Added(12, (2, 4)), Head(12)),
    "depthwise": depthwise_beside,
    "shared": lambda: nn.Sequential(conv_norm(3, 8), Shared(8), Head(8)),
}


def grouped_network(name, seed=0):
    """A masked network, float64, with statistics and affine parameters of its own."""
    torch.manual_seed(seed)
    net = GROUPED[name]().double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    pk.convert(net)
    return net.eval()


MASKS = ["equal", "unequal", "one group dead", "kernels", "inputs"]


def mask_groups(net, kind, seed=0):
    """Masks every layer, and the norms behind them.

    kind: "equal": every second filter is dead. "unequal": at random, and some norms are not masked. "one group dead":
    "equal", and the first group, or quarter, of a layer. "kernels", "inputs": "unequal", with such masks too.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, share=0.5):
        return torch.rand(shape, generator=generator) < share

    last = None
    for module in net.modules():
        if isinstance(module, pk.MaskedConv2d):
            K = module.out_channels
            last = torch.arange(K) % 2 == seed % 2 if kind in ("equal", "one group dead") else draw(K)
            if kind == "one group dead":
                last &= torch.arange(K) >= K // (module.groups if 1 < module.groups < K else 4)
            kernel = draw(*module.kernel_mask.shape, share=0.7) if kind == "kernels" else "all"
            inputs = draw(module.in_channels, share=0.7) if kind == "inputs" else "all"
            module.set_masks(filter=last, kernel=kernel, input=inputs)
        elif isinstance(module, pk.MaskedBatchNorm2d):
            masked = kind in ("equal", "one group dead") or bool(draw(1, share=0.8))
            module.set_mask(last if masked else "all")
    return net
