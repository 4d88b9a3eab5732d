"""Norms of other kinds behind masked convolutions, and norms of weights (weight norm, spectral norm), in each mode and
over changes of masks by a method, against a judge of plain operators.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import prunekernels as pk
from cases.judged import MODES, assert_same_network, batches, pair, pruned_by_a_method, take
from cases.norms import LayerNorm2d

modes = pytest.mark.parametrize("mode", MODES)


def train(net, judge, method_options=None, after_epoch=lambda net: None):
    """Three epochs with changes of masks between them; compares after each step."""
    optimizers = [torch.optim.SGD(n.parameters(), 0.1) for n in (net, judge)]
    method = pruned_by_a_method(net, optimizers[0], **(method_options or {}))
    for epoch in range(3):
        for x, labels in batches(seed=epoch):
            outputs = []
            for each, optimizer in zip((net, judge), optimizers, strict=True):
                optimizer.zero_grad()
                outputs.append(each(x))
                F.cross_entropy(outputs[-1], labels).backward()
            torch.testing.assert_close(*outputs)
            assert_same_network(net, judge)
            for optimizer in optimizers:
                optimizer.step()
            method.step()
        method.end_epoch()
        after_epoch(net)
        take(judge, net)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(x), judge.eval()(x))


class ChannelsLast(nn.Module):
    """A layer norm between two permutations, as in ConvNeXt."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    @property
    def bias(self):
        return self.norm.bias

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


NORMS = {
    "two groups": lambda channels: nn.GroupNorm(2, channels),
    "one group": lambda channels: nn.GroupNorm(1, channels),
    "a group each": lambda channels: nn.GroupNorm(channels, channels),
    "layer norm": LayerNorm2d,
    "channels last": ChannelsLast,
}


@modes
@pytest.mark.parametrize("name", NORMS)
def test_norms_over_channels(name, mode):
    net, judge = pair(mode, norm=NORMS[name])
    by_graph = {"example_input": next(batches())[0]}  # a permutation hides the norm from what watches tensors
    train(net, judge, by_graph if name == "channels last" else {})
    norms = [m for m in net.modules() if isinstance(m, (pk.MaskedGroupNorm, pk.MaskedLayerNorm))]
    assert [int(norm.channel_mask.sum()) for norm in norms] == [4, 3]
    assert net[0].filter_mask.sum() == 4


# ---- norms of weights


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return weight_norm(layer)


WEIGHT_NORMS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": old_weight_norm,
    "old spectral_norm": spectral_norm,
}


@modes
@pytest.mark.parametrize("name", WEIGHT_NORMS)
def test_norms_of_weights(name, mode):
    """A method prunes what such a layer reads, and its own masks are set by hand: methods refuse computed weights."""
    net, judge = pair(mode)
    for each in (net, judge):
        torch.manual_seed(0)  # of the vectors of spectral norm
        WEIGHT_NORMS[name](each[3])
    filters = iter([torch.arange(6) > 1, torch.arange(6) < 3, torch.arange(6) % 2 == 0])

    def set_masks(net):
        keep = next(filters)
        net[3].set_masks(filter=keep), net[4].set_mask(keep)

    train(net, judge, {"skip": ("3",), "example_input": next(batches())[0]}, set_masks)
    assert isinstance(net[3], pk.MaskedConv2d) and net[3].input_mask.sum() == 4
    assert [int(net[i].filter_mask.sum()) for i in (0, 3)] == [4, 3]


@pytest.mark.parametrize("name", WEIGHT_NORMS)
def test_a_method_that_would_prune_such_a_layer_says_what_to_do(name):
    net, _ = pair("masked")
    WEIGHT_NORMS[name](net[3])
    with pytest.raises(ValueError, match=r"expected weights that are parameters, others in skip.* in 3"):
        pruned_by_a_method(net, torch.optim.SGD(net.parameters(), 0.1))
