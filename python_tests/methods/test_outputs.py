"""Layers whose channels are outputs of the network: methods leave them out, unless they are asked for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.methods import sgd
from prunekernels.methods import GHFP, SFP

IMAGES = torch.randn(1, 3, 6, 6)

OUTPUT = "its channels are outputs of the network (see prune_outputs)"


class Classifier(nn.Module):
    """A convolutional classifier over a residual stream, of which the network returns the pooled features too."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = (nn.Conv2d(c, k, 1) for c, k in ((3, 8), (8, 6), (6, 8)))
        self.inner, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(self.second(F.relu(self.first(x))) + x)
        return self.head(F.relu(self.inner(x))).mean((2, 3)), x.mean((2, 3))


def classifier():
    torch.manual_seed(0)
    net = Classifier()
    pk.convert(net)
    return net


@pytest.mark.parametrize("coupling", ["independent", "joint"])
def test_outputs_are_left_out(coupling):
    net = classifier()
    method = GHFP(net, sgd(net), 0.5, 1, coupling=coupling, example_input=IMAGES)
    assert list(method.layers) == ["first", "inner"]
    assert method.left_out == dict.fromkeys(("stem", "second", "head"), OUTPUT)
    method.end_epoch()
    assert [layer.filter_mask.sum().item() for layer in net.children()] == [8, 3, 8, 4, 4]


@pytest.mark.parametrize(
    ("coupling", "prune_outputs", "layers"),
    [
        ("independent", True, ["stem", "first", "second", "inner", "head"]),
        ("joint", True, ["stem", "first", "second", "inner", "head"]),
        ("independent", ["stem"], ["stem", "first", "inner"]),
        ("joint", ("stem",), ["stem", "first", "second", "inner"]),
        ("joint", ["head"], ["first", "inner", "head"]),
    ],
)
def test_outputs_that_are_wanted(coupling, prune_outputs, layers):
    net = classifier()
    options = {"coupling": coupling, "example_input": IMAGES, "prune_outputs": prune_outputs}
    method = SFP(net, sgd(net), 0.5, 1, **options)
    assert list(method.layers) == layers and set(method.left_out.values()) <= {OUTPUT}


def test_outputs_are_not_known_without_an_example():
    net = classifier()
    assert set(SFP(net, sgd(net)).layers) == {"stem", "first", "second", "inner", "head"}


def test_nothing_but_outputs():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    pk.convert(net)
    expected = (
        r"SFP: model: expected some layers left to prune, got none: 0: its channels are outputs .* prune_outputs\)"
    )
    with pytest.raises(ValueError, match=expected):
        SFP(net, sgd(net), example_input=IMAGES)
