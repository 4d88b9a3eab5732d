"""A network with masks of every kind in DistributedDataParallel, with the hook that sends live gradients alone."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import prunekernels as pk

SIZES = {"0": (16, 4, 9), "3": (12, 8, 9), "4": (8, 12, 1), "6": (6, 8, 4), "8": (5, 6 * 49, 1)}  # K, C / groups, R S


def network(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Tanh(), nn.Conv2d(16, 12, 3, groups=2),
        nn.Conv2d(12, 8, 1, bias=False), nn.GroupNorm(2, 8), nn.ConvTranspose2d(8, 6, 2), nn.Flatten(),
        nn.Linear(6 * 49, 5),
    )  # fmt: skip
    pk.convert(net, linears=True)
    return net


def random(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) > 0.4


def set_masks(net, seed=0):
    """Filters, what reads them, single kernels of one layer and single weights of another."""
    first, grouped, pointwise = (random(10 * seed + i, count) for i, count in enumerate((16, 12, 8)))
    net[0].set_masks(filter=first)
    net[1].set_mask(first)
    net[3].set_masks(filter=grouped, input=first)
    net[4].set_masks(filter=pointwise, input=grouped)
    net[5].set_mask(pointwise)
    net[6].set_masks(kernel=random(10 * seed + 3, 6, 8), input=pointwise)
    net[8].set_masks(kernel=random(10 * seed + 4, 5, 6 * 49))


def live_count(net):
    """Entries that a gradient has by the masks; of single weights those in rows and columns with a live one."""
    count = 0
    for name, (K, C, taps) in SIZES.items():
        layer = net[int(name)]
        inputs = layer.input_mask.view(layer.groups, 1, C).expand(-1, K // layer.groups, -1).reshape(K, C)
        kernels = layer.kernel_mask & layer.filter_mask[:, None] & inputs
        if taps == 1:
            kernels = kernels.any(1)[:, None] & kernels.any(0)
        count += taps * int(kernels.sum()) + (0 if layer.bias is None else int(layer.filter_mask.sum()))
    return count + sum(2 * int(net[i].channel_mask.sum()) for i in (1, 5))


def images(seed, count=4):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def hooked(net, hook=pk.live_gradients_hook, **options):
    """The network in DDP with the hook, and the hook's state."""
    model = DistributedDataParallel(net, **options)
    state = pk.LiveGradients(net)
    model.register_comm_hook(state, hook)
    return model, state


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert a is b is None or (a.dtype == b.dtype and torch.equal(a, b))
