"""Operators between the layers: those with a rule, those without one, and layers of every kind."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.layers import bools
from cases.networks import assert_same_function, conv_norm
from prunekernels.graph import tidy_masks
from prunekernels.graph.shrink import shrink

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
KEEP = bools(1, 0, 1, 1)


def masked(net, norms=True):
    net = net.double().eval()
    pk.convert(net, norms=norms)
    return net


class Surprise(nn.Module):
    def __init__(self, between, c=4):
        super().__init__()
        self.a, self.b, self.between = conv_norm(3, 4), nn.Conv2d(c, 2, 3, padding=1), between

    def forward(self, x):
        return self.b(self.between(self.a(x)))


def write_through_a_view(x):
    y = x[:, :2]
    y.mul_(2)
    return x + 1


def write_then_read(x):
    y = x.clone()
    z = y.relu_()
    y.add_(1)
    return z * y


SURPRISES = {
    "group_norm": lambda x: F.group_norm(x, 2),
    "softmax": lambda x: x.softmax(1),
    "cumsum": lambda x: x.cumsum(1),
    "flip": lambda x: x.flip(1),
    "shuffle": lambda x: x.view(x.size(0), 2, 2, 8, 8).transpose(1, 2).reshape(x.size(0), 4, 8, 8),
    "layer_norm": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2),
    "attention": lambda x: x * x.mean(1, keepdim=True).sigmoid(),
    "max": lambda x: x - x.amax((2, 3), keepdim=True),
    "where": lambda x: torch.where(x > 0.5, x, 0.1),
    "sigmoid": torch.sigmoid,
    "cosine": torch.cos,
    "power": lambda x: 2**x + x**2 + 1 / (x + 1),
    "rounded": lambda x: F.avg_pool2d(x + 1, 3, 1, 1),
    "reflect": lambda x: F.pad(x + 0.5, (1, 1, 1, 1), mode="reflect"),
    "circular": lambda x: F.pad(x, (1, 1, 0, 0), mode="circular"),
    "odd_pad": lambda x: F.pad(x, (0, 1, 1, 0), value=0.5),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "nearest": lambda x: F.interpolate(x, size=(5, 5)),
    "stride": lambda x: x[:, ::2].repeat(1, 2, 1, 1),
    "stack": lambda x: torch.stack([x, x], 2).sum(2),
    "cat_space": lambda x: torch.cat([x, x * 2], 2),
    "zeros": lambda x: torch.cat([x[:, :2], torch.zeros_like(x[:, :1]), x.new_zeros(x.size(0), 1, 8, 8)], 1),
    "made": lambda x: torch.cat([x[:, :2], torch.ones(x.size(0), 2, 8, 8, dtype=x.dtype)], 1),
    "einsum": lambda x: torch.einsum("nchw,nchw->nchw", x, x),
    "matmul": lambda x: x @ x,
    "split": lambda x: torch.cat(x.split([1, 3], 1)[::-1], 1),
    "unflatten": lambda x: x.flatten(1).view(x.size(0), 4, 8, 8),
    "flatten_space": lambda x: x.flatten(2).unsqueeze(-1).squeeze().view(x.size(0), 4, 8, 8),
    "half_and_back": lambda x: x.float().double(),
    "dropout": lambda x: F.dropout2d(F.dropout(x, training=False), training=False),
    "view_write": write_through_a_view,
    "write_read": write_then_read,
    "no_grad": lambda x: x + x.detach(),
    "same_twice": lambda x: x + x - x * x,
    "constant": lambda x: x * torch.tensor([1.0, 0.0, 2.0, 3.0], dtype=x.dtype).view(1, 4, 1, 1),
    "gate": lambda x: x * torch.tensor(2.0, dtype=x.dtype),
}


@pytest.mark.parametrize("form", ["module", "graph"])
@pytest.mark.parametrize("norms", [True, False], ids=["masked_norm", "plain_norm"])
@pytest.mark.parametrize("name", SURPRISES)
def test_surprises(name, norms, form):
    net = masked(Surprise(SURPRISES[name]), norms=norms)
    nn.init.normal_(net.a[1].bias)
    net.a[0].set_masks(filter=KEEP)
    if norms:
        net.a[1].set_mask(KEEP)
    small = shrink(net, X, form=form)
    assert_same_function(net, small, torch.randn(3, 3, 8, 8, dtype=torch.float64))
    before = net(X)
    if norms:
        tidy_masks(net, X)
        torch.testing.assert_close(net(X), before)


LAYERS = {
    "same": lambda: nn.Conv2d(4, 4, 4, padding="same"),
    "valid": lambda: nn.Conv2d(4, 4, 3, padding="valid"),
    "circular": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    "reflect": lambda: nn.Conv2d(4, 4, 3, padding=2, padding_mode="reflect"),
    "strided": lambda: nn.Conv2d(4, 4, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)),
    "pairs": lambda: nn.Conv2d(4, 4, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4, bias=False),
    "multiplied": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 2, stride=2),
    "unaffine": lambda: nn.BatchNorm2d(4, affine=False),
    "by_batch": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "averaging": lambda: nn.BatchNorm2d(4, momentum=None),
    "instance": lambda: nn.InstanceNorm2d(4),
    "flat": lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(256), nn.Linear(256, 16), nn.Unflatten(1, (4, 2, 2))),
    "prelu": lambda: nn.PReLU(),
    "shuffle": lambda: nn.Sequential(nn.PixelShuffle(2), nn.Conv2d(1, 4, 1)),
    "last": lambda: nn.Sequential(Tokens(), nn.Conv2d(4, 4, 1)),
}  # fmt: skip


class Tokens(nn.Module):
    """Pixels as tokens: the channels are the last dimension of three."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        tokens = F.gelu(self.linear(x.flatten(2).transpose(1, 2)))
        return tokens.transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("form", ["module", "graph"])
@pytest.mark.parametrize("norms", [True, False], ids=["masked_norm", "plain_norm"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, norms, form):
    layer = LAYERS[name]()
    c = 8 if name == "multiplied" else 4
    net = masked(nn.Sequential(conv_norm(3, 4), layer, nn.Conv2d(c, 2, 1)), norms=norms)
    nn.init.normal_(net[0][1].bias)
    net[0][0].set_masks(filter=KEEP)
    if norms:
        net[0][1].set_mask(KEEP)
    if name == "last" and norms and form == "module":  # takes the channels of one value from the shape of another
        with pytest.raises(RuntimeError, match="shrink: form: expected a network that the module form serves, but"):
            shrink(net, X, form=form)
        form = "auto"
    small = shrink(net, X, form=form)
    assert_same_function(net, small, torch.randn(3, 3, 8, 8, dtype=torch.float64))
    if isinstance(layer, nn.BatchNorm2d):
        assert small.get_submodule("1").momentum == layer.momentum


class DropoutIsNoCopy(nn.Module):
    """In eval mode dropout returns its argument: what is written into the one is seen in the other."""

    def __init__(self):
        super().__init__()
        self.conv, self.drop, self.last = conv_norm(3, 4), nn.Dropout(0.3), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.conv(x)
        y = self.drop(x)
        z = y[:, 1:3].mul_(2).sum()
        y.add_(1)
        return self.last(x) + z


def test_dropout_is_no_copy():
    net = masked(DropoutIsNoCopy())
    net.conv[0].set_masks(filter=KEEP)
    assert_same_function(net, shrink(net, X), X)
