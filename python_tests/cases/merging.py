"""Networks whose filters can be merged in several ways, and methods over them."""

import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.methods import chain, residual, sgd
from prunekernels.methods import CSGD

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(3))


class Padded(nn.Module):
    """A shortcut that pads channels, then one with a projection, on sums of 4, 8 and 6 channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(C, K, 3, padding=1) for C, K in ((3, 4), (4, 8), (8, 8)))
        self.inner, self.outer, self.project = nn.Conv2d(8, 5, 1), nn.Conv2d(5, 6, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.norm, self.fc = nn.BatchNorm2d(6), nn.Linear(6 * 4, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.a(x)) + F.pad(x, (0, 0, 0, 0, 0, 4))
        x = torch.sigmoid(self.b(x)) + x
        x = F.relu(self.norm(self.outer(F.relu(self.inner(x))) + self.project(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1))


class Concatenated(nn.Module):
    """A norm and a convolution that see two layers' channels; a depthwise layer; a plain norm."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(10)
        self.depthwise, self.last = nn.Conv2d(10, 10, 3, groups=10), nn.Conv2d(10, 8, 1)
        self.group, self.fc = nn.GroupNorm(1, 8, affine=False), nn.Linear(8, 4)

    def forward(self, x):
        x = self.a(x)
        x = F.relu(self.norm(torch.cat((x, self.b(x)), 1)))
        return self.fc(F.relu(self.last(self.depthwise(x))).mean((2, 3)))


def randomized(net):
    """No two rows of anything are the same."""
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if tensor.is_floating_point() and tensor.dim() == 1 and not name.endswith("_mask"):
            tensor.data.uniform_(0.5, 1.5)
    return net


def made(cls, seed=0, **options):
    torch.manual_seed(seed)
    net = cls()
    pk.convert(net, **options)
    return net


NETS = {
    "chain": chain,
    "residual": residual,
    "padded": lambda: made(Padded),
    "concatenated": lambda: made(Concatenated),
    "plain norms": lambda: made(Padded, norms=False),
}


def csgd(net, optimizer=None, cls=CSGD, **options):
    optimizer = sgd(net) if optimizer is None else optimizer
    return cls(net, optimizer, **({"rate": 0.5, "epochs": 3, "example_input": X.to(net_type(net))} | options))


def net_type(net):
    return next(net.parameters()).dtype


def outputs(net):
    training = net.training
    with torch.no_grad():
        y = net.eval()(X.to(net_type(net)))
    net.train(training)
    return y
