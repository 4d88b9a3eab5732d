"""Transposed convolutions and masked linear layers in compacted mode: training moves what it moves in masked mode."""

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.compacted import assert_same_training, batches, both_modes
from cases.decoders import Adding
from cases.optimizers import over

X = torch.randn(3, 3, 8, 8, dtype=torch.float64)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.up, self.last = nn.Conv2d(3, 6, 3), nn.Linear(6, 10), nn.Linear(10, 2)

    def forward(self, x):
        x = self.conv(x).relu().permute(0, 2, 3, 1)
        return self.last(self.up(x).relu()).mean((1, 2))


def converted(make):
    torch.manual_seed(0)
    net = make().double()
    pk.convert(net, linears=True)
    return net


def masking(groups, seed, kernels=False, hard=False):
    """Sets joint masks, some filters for good, and single kernels of the layers that are no convolutions."""

    def set_masks(net):
        generator = torch.Generator().manual_seed(seed)
        for group in groups:
            if not group.is_output:
                keep = torch.rand(group.width, generator=generator) < 0.6
                keep[0] = True
                group.set_masks(net, keep)
        if hard and hasattr(net.up, "kernel_size"):
            net.up.set_masks(hard=net.up.filter_mask | (torch.arange(len(net.up.filter_mask)) > 3))
        if kernels:
            net.up.set_masks(kernel=torch.rand(net.up.kernel_mask.shape, generator=generator) < 0.7)

    return set_masks


@pytest.mark.parametrize("freeze", ["dead", "hard"])
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("name", ["sgd_nesterov", "masked_adamw"])
@pytest.mark.parametrize("make", [Adding, lambda: Adding(4), Head], ids=["transposed", "groups", "linear"])
def test_steps(make, name, kernels, freeze):
    net = converted(make)
    groups = pk.coupled_groups(net, X)
    rounds = [(masking(groups, seed, kernels, hard=True), batches((3, 3, 8, 8), seed=seed)) for seed in (1, 2)]
    assert_same_training(*both_modes(net, over(name), X, rounds, freeze=freeze))


def test_the_small_layers():
    net = converted(Adding)
    masking(pk.coupled_groups(net, X), 1)(net)
    with pk.compacted(net, X) as (small, _):
        assert type(small.up) is nn.ConvTranspose2d
        assert small.up.weight.shape[:2] == (int(net.low.filter_mask.sum()), int(net.up.filter_mask.sum()))
        assert (small.up.in_channels, small.up.out_channels) == small.up.weight.shape[:2]
        torch.testing.assert_close(small(X), net(X))
