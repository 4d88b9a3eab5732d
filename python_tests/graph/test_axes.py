"""Channels that a forward moves to another axis, splits and puts together again, and constants of each channel."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.compacted import assert_same_training, batches, both_modes
from cases.networks import assert_same_function, conv_norm, mask_at_random
from graph.test_narrower import assert_same
from prunekernels.graph import coupled_groups, tidy_masks
from prunekernels.graph.narrow import LITERALS
from prunekernels.graph.narrower import Narrower
from prunekernels.graph.shrink import shrink
from prunekernels.graph.trace import trace

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
EVEN = torch.arange(8) % 2 == 0


class Net(nn.Module):
    """conv_norm(3, 8), the given middle, and a convolution that reads its outputs."""

    def __init__(self, middle, width=8, **layers):
        super().__init__()
        self.first, self.middle, self.last = conv_norm(3, 8), middle, nn.Conv2d(width, 2, 3, padding=1)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.last(self.middle(self, self.first(x)))


def net_of(middle, width=8, **layers):
    torch.manual_seed(0)
    net = Net(middle, width, **layers).double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    pk.convert(net, linears=True)
    return net


def halve(net):
    """Masks every other joint channel of each group that is no output."""
    for group in coupled_groups(net, X):
        if not group.is_output:
            group.set_masks(net, torch.arange(group.width) % 2 == 0)
    return net


def gamma(*shape):
    """Layer scale: a module with a parameter and a buffer."""
    scale = nn.Module()
    scale.gamma = nn.Parameter(torch.rand(shape) + 0.5)
    scale.register_buffer("shift", torch.rand(shape))
    return scale


def channels_last(function):
    return lambda net, x: function(net, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def split(x, groups=2):
    return x.view(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])


def shuffled(x, groups=2):
    return split(x, groups).transpose(1, 2).contiguous().view(x.shape[0], -1, *x.shape[2:])


def split_attention(net, x):
    """ResNeSt: the sum over parts weighs the parts."""
    x = net.wide(x)
    parts = x.reshape(x.shape[0], 2, x.shape[1] // 2, *x.shape[2:])
    gap = parts.sum(1).mean((2, 3), keepdim=True)
    attention = net.expand(F.relu(net.reduce(gap)))
    attention = attention.view(x.shape[0], 1, 2, -1).transpose(1, 2).softmax(1).reshape(x.shape[0], -1)
    return (parts * attention.reshape(x.shape[0], 2, x.shape[1] // 2, 1, 1)).sum(1).contiguous()


def selective_kernels(net, x):
    """SK: branches on an axis of their own."""
    branches = torch.stack([net.one(x), net.two(x)], 1)
    weights = net.expand(F.relu(net.reduce(branches.sum(1).mean((2, 3), keepdim=True))))
    weights = weights.view(x.shape[0], 2, weights.shape[1] // 2, 1, 1).softmax(1)
    return (branches * weights).sum(1)


def selective_halves(net, x):
    """SK as timm has it: each branch reads a part of the input, of a width that is a constant."""
    a, b = torch.split(x, 4, 1)
    branches = torch.stack([net.one(a), net.two(b)], 1)
    weights = net.expand(F.relu(net.reduce(branches.sum(1).mean((2, 3), keepdim=True))))
    weights = weights.view(x.shape[0], 2, weights.shape[1] // 2, 1, 1).softmax(1)
    return (branches * weights).sum(1)


def convnext(net, x):
    y = net.deep(x).permute(0, 2, 3, 1)
    y = net.second(F.gelu(net.hidden(net.norm(y)))) * net.scale.gamma
    return x + y.permute(0, 3, 1, 2)


def attention_layers(width=8):
    return {"reduce": nn.Conv2d(8, 4, 1), "expand": nn.Conv2d(4, 2 * width, 1)}


# Name: the middle, its layers, the number of filters that the first layer keeps of 8 in module and in graph form.
MOVES = {
    "permute": (channels_last(lambda net, x: x.tanh().contiguous()), {}, 4, 4),
    "transpose": (lambda net, x: x.transpose(1, 3).tanh().transpose(3, 1), {}, 4, 4),
    "movedim": (lambda net, x: x.movedim(1, -1).tanh().movedim(-1, 1), {}, 4, 4),
    "moveaxis": (lambda net, x: x.moveaxis((1, 2), (3, 1)).tanh().moveaxis((3, 1), (1, 2)), {}, 4, 4),
    "swapaxes": (lambda net, x: x.swapaxes(1, 2).tanh().swapdims(-2, -3), {}, 4, 4),
    "mT": (lambda net, x: x.transpose(1, 2).mT.tanh().mT.transpose(1, 2), {}, 4, 4),
    "t": (lambda net, x: x * x.mean((0, 2, 3)).unsqueeze(1).expand(-1, 3).t()[0].view(1, -1, 1, 1), {}, 4, 4),
    "formats": (lambda net, x: x.to(memory_format=torch.channels_last).clone().float().double(), {}, 4, 4),
    "tokens": (lambda net, x: x.flatten(2).transpose(1, 2).tanh().mT.unflatten(2, x.shape[2:]), {}, 4, 4),
    "linear": (channels_last(lambda net, x: net.linear(x)), {"linear": nn.Linear(8, 8)}, 4, 4),
    "scale": (channels_last(lambda net, x: x * net.scale.gamma + x), {"scale": gamma(8)}, 4, 4),
    "scale_and_shift": (channels_last(lambda net, x: x * (x * net.scale.shift)), {"scale": gamma(1, 1, 1, 8)}, 4, 4),
    "layer_norm": (channels_last(lambda net, x: net.norm(x)), {"norm": nn.LayerNorm(8)}, 4, 4),
    "convnext": (convnext, {"deep": nn.Conv2d(8, 8, 7, padding=3, groups=8), "norm": nn.LayerNorm(8),
                            "hidden": nn.Linear(8, 16), "second": nn.Linear(16, 8), "scale": gamma(8)}, 4, 4),
    "sum_of_parts": (lambda net, x: split(x).sum(1), {}, 4, 4),
    "mean_of_parts": (lambda net, x: split(x, 4).mean(1), {}, 4, 4),
    "softmax_of_parts": (lambda net, x: split(x).softmax(1).flatten(1, 2) * x, {}, 4, 4),
    "unbound_parts": (lambda net, x: split(x).unbind(1)[0] * split(x)[:, 1], {}, 4, 4),
    "squeezed": (lambda net, x: x.unsqueeze(1).squeeze(1).unsqueeze(-1).squeeze(4), {}, 4, 4),
    "stacked": (lambda net, x: torch.stack([x, x.tanh()], -1).sum(-1), {}, 4, 4),
    "shuffle": (lambda net, x: shuffled(x), {}, 4, 4),
    "shuffle_twice": (lambda net, x: shuffled(shuffled(x), 4), {}, 8, 4),
    "shuffle_last": (channels_last(lambda net, x: x.unflatten(3, (2, x.shape[3] // 2)).mT.flatten(3)), {}, 4, 4),
    "channel_shuffle": (lambda net, x: F.channel_shuffle(x, 2), {}, 4, 4),
    "pixel_unshuffle": (lambda net, x: F.pixel_unshuffle(x, 2), {}, 4, 4),
    "pixel_shuffle": (lambda net, x: F.pixel_shuffle(x, 2), {}, 4, 4),
    "split_attention": (split_attention, {"wide": nn.Conv2d(8, 16, 3, padding=1), **attention_layers()}, 4, 4),
    "selective_kernels": (selective_kernels, {"one": nn.Conv2d(8, 8, 3, padding=1), "two": nn.Conv2d(8, 8, 1),
                                              **attention_layers()}, 4, 4),
    "selective_halves": (selective_halves, {"one": nn.Conv2d(4, 8, 3, padding=1), "two": nn.Conv2d(4, 8, 1),
                                            **attention_layers()}, 8, 4),
}  # fmt: skip
WIDTHS = {"sum_of_parts": 4, "mean_of_parts": 2, "unbound_parts": 4, "pixel_unshuffle": 32, "pixel_shuffle": 2}


def moved(name):
    middle, layers, *kept = MOVES[name]
    return net_of(middle, WIDTHS.get(name, 8), **copy.deepcopy(layers)), kept


@pytest.mark.parametrize("form", ["module", "graph"])
@pytest.mark.parametrize("name", MOVES)
def test_moved_channels_go(name, form):
    net, (in_module, in_graph) = moved(name)
    halve(net)
    small = shrink(net, X, form=form)
    assert_same_function(net, small, torch.randn(3, 3, 8, 8, dtype=torch.float64))
    assert small.get_submodule("first.0").out_channels == (in_module if form == "module" else in_graph)
    if name in ("linear", "convnext"):
        layers = [m for m in small.modules() if isinstance(m, nn.Linear)]
        assert [(m.in_features, m.out_features) for m in layers] == ([(4, 4)] if name == "linear" else [(4, 8), (8, 4)])
    if in_module == 4 or "reduce" in dict(net.named_modules()):
        assert small.get_submodule("last").in_channels * 2 == WIDTHS.get(name, 8)
    if "reduce" in dict(net.named_modules()):
        assert small.get_submodule("reduce").in_channels == 4 and small.get_submodule("expand").out_channels == 8


@pytest.mark.parametrize("form", ["module", "graph"])
@pytest.mark.parametrize("name", MOVES)
def test_moved_channels_under_any_masks(name, form):
    net, _ = moved(name)
    for seed in range(2):
        mask_at_random(net, seed)
        assert_same_function(net, shrink(net, X, form=form), torch.randn(3, 3, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize("name", MOVES)
def test_moved_channels_are_tidied(name):
    net, _ = moved(name)
    mask_at_random(net, 3)
    want = net(X)
    tidy_masks(net, X)
    torch.testing.assert_close(net(X), want)
    assert str(tidy_masks(net, X)) == "nothing to tidy"


@pytest.mark.parametrize("literal", LITERALS)
@pytest.mark.parametrize("name", MOVES)
def test_compacted_narrower_moved_channels(name, literal):
    net, _ = moved(name)
    traced = trace("test", net, X)
    narrower = Narrower.of(traced, net, literal=literal)
    for seed in range(3):
        assert_same(narrower, mask_at_random(net, seed), traced, literal)


@pytest.mark.parametrize("name", MOVES)
def test_compacted_moved_channels(name):
    net, _ = moved(name)
    rounds = [(lambda net, seed=seed: mask_at_random(net, seed), batches((2, 3, 8, 8))) for seed in (1, 2)]
    assert_same_training(*both_modes(net, lambda net: torch.optim.SGD(net.parameters(), 0.02, momentum=0.9), X, rounds))
