"""Compacted mode inside the groups of grouped convolutions: it trains what masked mode trains."""

import functools

import pytest
import torch

import prunekernels as pk
from cases.compacted import assert_same_training, batches, both_modes, sgd
from cases.grouped import GROUPED, MASKS, grouped_network, mask_groups
from cases.networks import images

X = images(3)
OPTIMIZERS = {
    "sgd": sgd,
    # eps: where a gradient is zero but for rounding, Adam would make steps of it
    "adam": lambda net: torch.optim.Adam(net.parameters(), 0.01, eps=1e-5, weight_decay=0.05),
    "adamw": lambda net: torch.optim.AdamW(net.parameters(), 0.01, eps=1e-5, weight_decay=0.05),
}


def live(net):
    for module in net.modules():
        if isinstance(module, pk.MaskedConv2d):
            module.set_masks(filter="all", kernel="all", input="all")
        elif isinstance(module, pk.MaskedBatchNorm2d):
            module.set_mask("all")


def rounds(kind, first):
    """Two sets of masks, all live between them, and the first again."""
    masks = [functools.partial(mask_groups, kind=kind, seed=seed) for seed in (first, first + 1)]
    return [(set_masks, batches((3, 3, 8, 8))) for set_masks in (masks[0], masks[1], live, masks[0])]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", GROUPED)
def test_networks(name, kind):
    net = grouped_network(name).train()
    assert_same_training(*both_modes(net, sgd, X, rounds(kind, len(name))))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("freeze", ["dead", "hard"])
@pytest.mark.parametrize("kind", ["unequal", "inputs", "one group dead"])
def test_optimizers(kind, freeze, make, layout):
    net = grouped_network("resnext").train().to(memory_format=layout)
    assert_same_training(*both_modes(net, make, X, rounds(kind, 3), freeze=freeze))


@pytest.mark.parametrize("align", [2, 8])
def test_aligned_widths(align):
    net = grouped_network("chain").train()
    assert_same_training(*both_modes(net, sgd, X, rounds("unequal", 1), align=align))


def test_the_small_layers_are_narrow():
    net = mask_groups(grouped_network("chain").train(), "equal")
    optimizer = sgd(net)
    for seed, sizes in ((0, (6, 6, 6)), (1, (6, 6, 6))):
        mask_groups(net, "equal", seed)
        with pk.compacted(net, X, optimizer) as (small, opt):
            layers = [small[i][0] for i in (1, 2, 3)]
            assert tuple(layer.out_channels for layer in layers) == sizes
            assert [layer.groups for layer in layers] == [3, 2, 6]
            assert [tuple(layer.weight.shape[:2]) for layer in layers] == [(6, 2), (6, 3), (6, 1)]
    assert [net[i][0].groups for i in (1, 2, 3)] == [3, 2, 6]


def test_input_masks_are_frozen_zeros_of_each_group():
    """No holes: channels that only the mask of one layer leaves out are columns of zeros."""
    net = grouped_network("chain").train()
    inputs = torch.ones(12, dtype=torch.bool)
    inputs[[0, 5, 6]] = False
    net[1][0].set_masks(input=inputs)
    optimizer = sgd(net)
    pk.optim.bind(optimizer, net, freeze="hard")
    with pk.compacted(net, X, optimizer) as (small, opt):
        weight = small[1][0].weight
        assert weight.shape == (12, 4, 3, 3) and not hasattr(small[1][0], "input_mask")
        assert bool((weight.abs().amax((2, 3)) == 0).view(3, 4, 4).any(1).eq(~inputs.view(3, 4)).all())
