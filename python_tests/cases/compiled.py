"""A small masked network, its masks drawn at random, and a check of a step against the same network run eagerly."""

import torch
from torch import nn

import prunekernels as pk

CHANGES = 20


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.norm(self.conv(x)) + x)


def network(training, depth=2, width=8):
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    head = [nn.Conv2d(width, width, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)]
    net = nn.Sequential(*stem, nn.Sequential(*(Block(width) for _ in range(depth))), *head)
    pk.convert(net)
    return net.train(training)


def random_masks(net, seed):
    """Masks with other counts for each seed; some layers have nothing dead under some seeds."""
    gen = torch.Generator().manual_seed(seed)
    for layer in net.modules():
        if isinstance(layer, pk.MaskedConv2d):
            live = torch.rand(layer.out_channels, generator=gen) < 0.3 + 0.7 * torch.rand(1, generator=gen)
            live[0] = True
            layer.set_masks(filter=live.to(layer.weight.device))
        elif isinstance(layer, pk.MaskedBatchNorm2d):
            layer.set_mask(live.to(layer.channel_mask.device))


def assert_same_step(a, b, x, **tolerance):
    """The two networks give the same output, gradients and running statistics."""
    results = []
    for net in (a, b):
        leaf = x.clone().requires_grad_()
        y = net(leaf)
        parameters = list(net.parameters())
        grads = torch.autograd.grad(y.sin().sum(), [leaf, *parameters])
        stats = [t for t in net.buffers() if t.is_floating_point()]
        results.append([y, *grads, *(t.clone() for t in stats)])
    tolerance = tolerance or ({"atol": 2e-5, "rtol": 1e-4} if x.dtype == torch.float32 else {})
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, **tolerance)
