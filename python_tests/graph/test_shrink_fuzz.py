"""Random networks: operators drawn at random over a pool of values, with and without rules, in place and not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.networks import mask_at_random
from prunekernels.graph import coupled_groups, tidy_masks
from prunekernels.graph.shrink import shrink

WIDTHS = (4, 6, 8)
STEPS = "conv conv norm norm again depthwise grouped act act join join cat cut pad gate unknown in_place plain "
STEPS += "move move split scaled"
JOINS = (torch.add, torch.add, torch.sub, torch.mul, torch.maximum, lambda a, b: a.add(b, alpha=2))
MOVES = (
    lambda x: x.permute(0, 2, 3, 1).tanh().permute(0, 3, 1, 2),
    lambda x: x.unflatten(1, (2, x.shape[1] // 2)).transpose(1, 2).flatten(1, 2),
    lambda x: x.flatten(1).view(x.shape[0], -1, x.shape[1] * 5, 5).sigmoid().view(x.shape),
    lambda x: torch.stack([x, x * 2], 1).softmax(1).sum(1) * x,
    lambda x: F.channel_shuffle(x, 2),
)
SPLITS = (lambda x: x.sum(1), lambda x: x.softmax(1)[:, 0], lambda x: x.amax(2), lambda x: x.unbind(1)[1])
WRITES = (F.relu_, lambda x: x.mul_(0.5), lambda x: x.add_(1), lambda x: x[:, 1:3].mul_(2).sum() + x)


class RandomNet(nn.Module):
    """A list of steps; each reads values made before and appends what it makes."""

    def __init__(self, seed, length=12):
        super().__init__()
        self.random = torch.Generator().manual_seed(seed)
        self.layers, self.steps, self.widths = nn.ModuleList(), [], [3]
        self.conv(0)
        for _ in range(length):
            getattr(self, self.pick(STEPS.split()))(self.pick(range(1, len(self.widths))))
        self.head = nn.Linear(sum(self.widths[-3:]), 3)

    def pick(self, values):
        return list(values)[int(torch.randint(len(list(values)), (1,), generator=self.random))]

    def add(self, width, function, *reads):
        self.widths.append(width)
        self.steps.append((function, reads))

    def apply(self, function, i, *more):
        """A function that needs no layer and keeps the width."""
        self.add(self.widths[i], lambda net, *values: function(*values), i, *more)

    def layer(self, i, layer, width):
        self.layers.append(layer)
        at = len(self.layers) - 1
        self.add(width, lambda net, x: net.layers[at](x), i)

    def conv(self, i):
        k, r, bias = self.pick(WIDTHS), self.pick([1, 3]), self.pick([True, False])
        self.layer(i, nn.Conv2d(self.widths[i], k, r, padding=r // 2, bias=bias), k)

    def norm(self, i):
        self.layer(i, nn.BatchNorm2d(self.widths[i]), self.widths[i])

    def again(self, i):
        convs = [(at, m) for at, m in enumerate(self.layers) if isinstance(m, nn.Conv2d)]
        fits = [(at, m.out_channels) for at, m in convs if m.in_channels == self.widths[i]]
        if fits:
            at, width = self.pick(fits)
            self.add(width, lambda net, x: net.layers[at](x), i)

    def depthwise(self, i):
        c, times = self.widths[i], self.pick([1, 2])
        if c * times in WIDTHS:
            self.layer(i, nn.Conv2d(c, c * times, 3, padding=1, groups=c), c * times)

    def grouped(self, i):
        k = self.pick(WIDTHS)
        if self.widths[i] % 2 == 0:
            self.layer(i, nn.Conv2d(self.widths[i], k, 3, padding=1, groups=2, bias=False), k)

    def act(self, i):
        function = self.pick([F.relu, F.relu, F.leaky_relu, torch.sigmoid, torch.tanh, F.hardswish, lambda x: 0.5 - x])
        self.apply(function, i)

    def join(self, i):
        j = self.pick([j for j, w in enumerate(self.widths) if w == self.widths[i]])
        self.apply(self.pick(JOINS), i, j)

    def cat(self, i):
        j = self.pick(range(1, len(self.widths)))
        if self.widths[i] + self.widths[j] <= 12:
            self.add(self.widths[i] + self.widths[j], lambda net, a, b: torch.cat([a, b], 1), i, j)

    def cut(self, i):
        half, which = self.widths[i] // 2, self.pick([0, 1, 2])
        if self.widths[i] in (8, 12):
            cuts = [lambda net, x: x.chunk(2, 1)[1], lambda net, x: x[:, :half], lambda net, x: x[:, ::2]]
            self.add(half, cuts[which], i)

    def pad(self, i):
        if self.widths[i] in (4, 6):
            self.add(self.widths[i] + 2, lambda net, x: F.pad(x, (0, 0, 0, 0, 1, 1)), i)

    def gate(self, i):
        at, c = len(self.layers), self.widths[i]
        self.layers.append(nn.Conv2d(c, c, 1))
        self.add(c, lambda net, x: x * torch.sigmoid(net.layers[at](x.mean((2, 3), keepdim=True))), i)

    def unknown(self, i):
        function = self.pick([lambda x: x.softmax(1), lambda x: x.flip(1), lambda x: F.layer_norm(x, x.shape[1:])])
        self.apply(function, i)

    def in_place(self, i):
        if i > 1:
            self.apply(self.pick(WRITES), i)

    def move(self, i):
        if self.widths[i] % 2 == 0:
            self.apply(self.pick(MOVES), i)

    def split(self, i):
        """Two parts, or the channels of each, become one."""
        function = self.pick(SPLITS)
        if self.widths[i] == 8 and function is not SPLITS[2]:
            self.add(4, lambda net, x: function(x.view(x.shape[0], 2, 4, *x.shape[2:])), i)
        elif self.widths[i] % 4 == 0:
            self.add(4, lambda net, x: SPLITS[2](x.view(x.shape[0], 4, -1, *x.shape[2:])), i)

    def scaled(self, i):
        """A factor of each channel, as a parameter that is viewed."""
        scale = nn.Module()
        scale.gamma = nn.Parameter(torch.randn(self.widths[i], generator=self.random))
        self.layers.append(scale)
        at = len(self.layers) - 1
        self.add(self.widths[i], lambda net, x: x * net.layers[at].gamma.view(1, -1, 1, 1), i)

    def plain(self, i):
        layer = self.pick([nn.Dropout(0.3), nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(3, 1, 1), nn.Identity()])
        self.layer(i, layer, self.widths[i])

    def forward(self, x):
        values = [x]
        for function, reads in self.steps:
            values.append(function(self, *(values[i] for i in reads)))
        return self.head(torch.cat([v.mean((2, 3)) for v in values[-3:]], 1)), values[-1]


def build(seed):
    torch.manual_seed(seed)
    net = RandomNet(seed).double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
    pk.convert(net, norms=seed % 3 != 0)
    return net, torch.randn(2, 3, 5, 5, dtype=torch.float64)


def outputs(net, x):
    with torch.no_grad():
        return net(x.clone())


@pytest.mark.parametrize("args", [{"form": "module"}, {"form": "graph"}, {"fold_constants": True}], ids=str)
def test_random_networks_shrink(fuzz_seed, args):
    net, x = build(fuzz_seed)
    mask_at_random(net, fuzz_seed)
    want = outputs(net, x)
    torch.testing.assert_close(outputs(shrink(net, x, **args).eval(), x), want)


def test_random_networks_tidy(fuzz_seed):
    net, x = build(fuzz_seed)
    mask_at_random(net, fuzz_seed)
    want = outputs(net, x)
    tidy_masks(net, x)
    torch.testing.assert_close(outputs(net, x), want)
    assert str(tidy_masks(net, x)) == "nothing to tidy"


def test_groups_mask_only_inputs_that_are_zero(fuzz_seed):
    net, x = build(fuzz_seed)
    groups = coupled_groups(net, x)
    names = [name for name, module in net.named_modules() if isinstance(module, pk.MaskedConv2d)]
    listed = [name for group in groups for name in group.layers]
    assert len(listed) == len(set(listed)) and set(listed) <= set(names)
    for group in groups:
        group.set_masks(net, torch.arange(group.width) % 3 != fuzz_seed % 3)
    unread = copy.deepcopy(net)
    for module in unread.modules():
        if isinstance(module, pk.MaskedConv2d):
            module.set_masks(input="all")
    torch.testing.assert_close(outputs(net, x), outputs(unread, x))
