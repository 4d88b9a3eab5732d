"""Group and layer norms in compacted, live and masked mode: the same training in all three."""

import copy

import pytest
import torch

import prunekernels as pk
from cases.norms import NETWORKS, X, mask, network
from prunekernels.compaction.compaction import Compaction


@pytest.mark.parametrize(("how", "align"), [("joint", 1), ("alone", 1), ("joint", 4), ("alone", 4), ("norms", 1)])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_three_modes_train_alike(name, how, align):
    """Momentum and weight decay, masks that change, channels that come back; also where zeros fill widths up."""
    nets = [network(name)]
    nets += [copy.deepcopy(nets[0]) for _ in range(2)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2) for net in nets]
    for net, optimizer in zip(nets, optimizers, strict=True):
        pk.optim.bind(optimizer, net)
    pk.flow(nets[1])
    compaction = Compaction(nets[2], X, optimizers[2], align=align)
    for seed in (0, 1, 0):
        for net in nets:
            mask(net, how, seed)
        small, small_optimizer = compaction.enter()
        pairs = [*zip(nets[:2], optimizers[:2], strict=True), (small, small_optimizer)]
        for _ in range(2):
            for net, optimizer in pairs:
                optimizer.zero_grad()
                net(X).square().sum().backward()
                optimizer.step()
        compaction.leave()
        for net in nets[1:]:
            for (key, want), got in zip(nets[0].state_dict().items(), net.state_dict().values(), strict=True):
                torch.testing.assert_close(got, want, msg=lambda text, key=key: f"{key}: {text}")
    torch.testing.assert_close(nets[1](X), nets[0](X))


def test_all_channels_come_back():
    net = mask(network("groups"), "joint")
    with pk.compacted(net, X) as (small, _):
        assert small.norm1.num_channels < 12
    for module in net.modules():
        if isinstance(module, pk.MaskedGroupNorm):
            module.set_mask("all")
        elif isinstance(module, pk.MaskedConv2d):
            module.set_masks(filter="all", input="all")
    with pk.compacted(net, X) as (small, _):
        assert type(small.norm1) is torch.nn.GroupNorm and small.norm1.num_channels == 12
        torch.testing.assert_close(small(X), net(X))
