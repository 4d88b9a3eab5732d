"""Small networks, data and training loops for the methods."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from prunekernels import methods
from prunekernels.methods import schedules
from prunekernels.methods.ranking import Ranking

STEPS = 4
TOGETHER = {
    "wake": "together", "warm_up": 0, "fine_tune": 0, "criterion": "l2", "clip": True,
    "alpha": 0.0, "alpha_schedule": schedules.decay,
}  # fmt: skip


def chain(seed=0, bias=False, dtype=torch.float32):
    """Three convolutions with norms; means of channels are random, so that every filter has outputs that pass relu."""
    torch.manual_seed(seed)
    layers, C = [], 3
    for K in (8, 12, 10):
        layers += [nn.Conv2d(C, K, 3, padding=1, bias=bias), nn.BatchNorm2d(K), nn.ReLU()]
        nn.init.normal_(layers[-2].bias, std=0.3)
        C = K
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 4)).to(dtype)
    pk.convert(net)
    return net


class Residual(nn.Module):
    """Two convolutions meet in an add, a third one is inside."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.first, self.first_norm = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.second, self.second_norm = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.last, self.fc = nn.Conv2d(8, 5, 1), nn.Linear(5, 4)

    def forward(self, x):
        x = F.relu(self.stem_norm(self.stem(x)))
        y = F.relu(self.first_norm(self.first(x)))
        x = F.relu(self.second_norm(self.second(y)) + x)
        return self.fc(self.last(x).mean((2, 3)))


def residual(seed=0):
    torch.manual_seed(seed)
    net = Residual()
    pk.convert(net)
    return net


def ranking(scores, dead=(), hard=(), members=None, evenly=False):
    """A unit's filters in order; members: by layer, which of them it has."""
    scores = torch.tensor(scores, dtype=torch.float64)
    masks = [torch.zeros(len(scores), dtype=torch.bool) for _ in range(2)]
    for mask, which in zip(masks, (dead, hard), strict=True):
        mask[list(which)] = True
    members = [torch.arange(len(scores))] if members is None else [torch.tensor(m) for m in members]
    return Ranking.of(scores, masks[0] | masks[1], masks[1], members, evenly=evenly)


def sgd(net, lr=0.05, momentum=0.9, weight_decay=1e-2, **options):
    return torch.optim.SGD(net.parameters(), lr, momentum, weight_decay=weight_decay, **options)


def batches(epoch, dtype=torch.float32, steps=STEPS):
    """The same for the same epoch."""
    generator = torch.Generator().manual_seed(1000 + epoch)
    for _ in range(steps):
        x = torch.randn(4, 3, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
        yield x, torch.randint(4, (4,), generator=generator)


def share(epoch, rank, world, whole=False):
    """A rank's images of each batch, or all of them; batches of 8."""
    for x, y in zip(*(list(batches(e, steps=4)) for e in (epoch, epoch + 100)), strict=True):
        x, y = torch.cat([x[0], y[0]]), torch.cat([x[1], y[1]])
        yield (x, y) if whole else (x[rank::world], y[rank::world])


def train_epoch(net, optimizer, epoch, method=None, seen=None, dtype=torch.float32):
    """One epoch of plain training; seen, if given, is called after each step."""
    net.train()
    for x, y in batches(epoch, dtype):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        if method is not None:
            method.step()
        if seen is not None:
            seen()


def train(net, optimizer, method, epochs, start=0, dtype=torch.float32):
    for epoch in range(start, start + epochs):
        train_epoch(net, optimizer, epoch, method, dtype=dtype)
        method.end_epoch()


def train_modes(trained, epoch, dtype=torch.float64):
    """One epoch of several methods, step by step, each in its own mode; how many steps small networks made."""
    small = 0
    for x, y in batches(epoch, dtype):
        for method in trained:
            net, opt = method.net, method.opt
            net.train()
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.step()
            small += method.is_compacted
            method.step()
    return small


def run(cls, epochs=3, net=None, total=10, optimizer=None, **options):
    """A network, its optimizer and a method after some epochs."""
    net = chain() if net is None else net
    optimizer = sgd(net) if optimizer is None else optimizer(net)
    method = cls(net, optimizer, **({"rate": 0.5, "epochs": total} | options))
    train(net, optimizer, method, epochs)
    return net, optimizer, method


def together(cls):
    """Below duty 1, the papers' values for a soft method, whose dead sleep and wake together; {} for another method."""
    if not issubclass(cls, methods.SFP):
        return {}
    return TOGETHER | {"alpha": cls.default_alpha}


def convs(net):
    return {name: m for name, m in net.named_modules() if isinstance(m, pk.MaskedConv2d)}


def norms(net):
    return {name: m for name, m in net.named_modules() if isinstance(m, pk.MaskedBatchNorm2d)}


def momentum(optimizer, parameter):
    return optimizer.state[parameter]["momentum_buffer"]


def snapshot(net, optimizer):
    """Parameters, dead entries included, statistics and momenta."""
    state = {
        name: t.detach().clone() for name, t in net.state_dict(keep_vars=True).items() if not name.endswith("_mask")
    }
    named = dict(net.named_parameters())
    momenta = {f"{name}'": momentum(optimizer, p).clone() for name, p in named.items() if optimizer.state.get(p)}
    return state | momenta


def assert_same(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def copied(net):
    return copy.deepcopy(net)


EVERY = {
    "sfp": methods.SFP,
    "asfp": methods.ASFP,
    "srfp": methods.SRFP,
    "asrfp": methods.ASRFP,
    "ghfp": methods.GHFP,
    "pgp": methods.PGP,
    "rpgp": methods.RPGP,
    "while_training": methods.PruneWhileTraining,
}
