"""Compacted mode trains what masked mode trains: the reference networks, blocks of public ones, random ones."""

import functools

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.blocks import BLOCKS, block
from cases.compacted import assert_same_training, batches, both_modes, loss_of
from cases.networks import EXACT, NETWORKS, images, mask_at_random, trained
from prunekernels.graph import coupled_groups

X = images(3)


def sgd(net):
    return torch.optim.SGD(net.parameters(), 0.02, momentum=0.9, weight_decay=0.05)


def masked_networks(net, x, seed):
    """Functions that mask a network or a copy of it: all live, random, by groups, and the random ones again."""
    groups = coupled_groups(net, x)
    generator = torch.Generator().manual_seed(seed)
    keeps = [torch.rand(group.width, generator=generator) < 0.6 for group in groups]

    def jointly(net):
        unmask(net)
        for group, keep in zip(groups, keeps, strict=True):
            group.set_masks(net, keep)

    def unmask(net):
        for module in net.modules():
            if isinstance(module, pk.MaskedConv2d):
                module.set_masks(filter="all", kernel="all", input="all")
            elif isinstance(module, pk.MaskedBatchNorm2d):
                module.set_mask("all")

    def random(net):
        unmask(net)
        mask_at_random(net, seed, kernels=0)

    return [unmask, random, jointly, random]


def without_dropout(net):
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net.train()


@pytest.mark.thinned(2)
@pytest.mark.parametrize("freeze", ["dead", "hard"])
@pytest.mark.parametrize("name", NETWORKS)
def test_reference_networks(name, freeze):
    net = without_dropout(trained(name))
    data = batches((3, 3, 8, 8))
    rounds = [(masks, data) for masks in masked_networks(net, X, seed=len(name))[1:]]
    assert_same_training(*both_modes(net, sgd, X, rounds, freeze=freeze))


@pytest.mark.parametrize("name", NETWORKS)
def test_reference_networks_with_dead_kernels(name):
    net = without_dropout(trained(name))
    rounds = [(functools.partial(mask_at_random, seed=seed, kernels=1), batches((3, 3, 8, 8))) for seed in (1, 2)]
    assert_same_training(*both_modes(net, sgd, X, rounds))


def signs(net, opt, data):
    """Steps by the signs of gradients: integers stay integers, so that all sums are exact."""
    losses = []
    for x in data:
        opt.zero_grad()
        loss = net(x).sum()
        loss.backward()
        for p in net.parameters():
            p.grad.sign_()
        opt.step()
        losses.append(loss.item())
    return losses


@pytest.mark.thinned(2)
@pytest.mark.parametrize("plan", ["dense", "compact"])
@pytest.mark.parametrize("name", EXACT)
def test_integers_agree_to_the_bit(name, plan):
    """In eval mode, where norms are the identity and a few integers more; momentum and weight decay of 1."""
    net = trained(name, exact=True)
    rounds = [
        (functools.partial(mask_at_random, seed=seed), [images(2, exact=True) for _ in range(2)]) for seed in (1, 2)
    ]

    def whole(net):
        return torch.optim.SGD(net.parameters(), 1.0, momentum=1.0)

    with pk.plan.force(plan):
        trained_nets = both_modes(net, whole, images(2, exact=True), rounds, loop=signs)
    assert_same_training(*trained_nets, exact=True)
    assert not any(p.frac().any() for p in trained_nets[2].parameters())


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_public_networks(name):
    """The first masks leave all channels live: what the forward makes of fewer shows only later."""
    net, x = block(name), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    rounds = [(masks, batches((3, 3, 6, 6), steps=1)) for masks in masked_networks(net, x, seed=3)[:3]]
    assert_same_training(*both_modes(net, sgd, x, rounds, verify=True))


@pytest.mark.parametrize("name", ["excite", "cat", "shuffle", "chunk", "prelu", "transposed", "unet"])
def test_blocks_get_small(name):
    net, x = block(name), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    keep = torch.tensor([1, 0, 1, 1, 0, 1, 0, 0]).bool()
    net.first[0].set_masks(filter=keep)
    net.first[1].set_mask(keep)
    with pk.compacted(net, x) as (small, _):
        assert type(small) is type(net)
        assert small.first[0].out_channels < 8
        assert not any(isinstance(m, (pk.MaskedConv2d, pk.MaskedBatchNorm2d)) for m in small.modules())


def test_random_networks(fuzz_seed):
    from graph.test_shrink_fuzz import build

    net, x = build(fuzz_seed)
    net.train()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    rounds = [(masks, batches((2, 3, 5, 5), steps=1)) for masks in masked_networks(net, x, seed=fuzz_seed)[1:]]
    try:
        loss_of(net(x.clone())).backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        pytest.skip("autograd refuses what this network writes in place, in every mode")
    net.zero_grad()
    assert_same_training(*both_modes(net, sgd, x, rounds, loop=clipped, verify=True))


def clipped(net, opt, data):
    """Random networks may have large gradients."""
    losses = []
    for x in data:
        opt.zero_grad()
        loss = loss_of(net(x.clone()))
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    net = without_dropout(trained("basic")).to(dtype)
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-1, "atol": 5e-2}
    data = batches((3, 3, 8, 8), dtype=dtype, steps=1)
    rounds = [(masks, data) for masks in masked_networks(net, X.to(dtype), seed=4)[1:2]]
    trained_nets = both_modes(net, sgd, X.to(dtype), rounds, close=tolerance)
    assert_same_training(*trained_nets, close=tolerance)
