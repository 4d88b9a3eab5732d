"""Transposed convolutions in the graph: groups, shrinking in both forms, tidying, counts."""

import copy

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.decoders import Adding, UNet

X = torch.randn(2, 3, 8, 8)


def masked(net, share=2):
    """Joint masks: of every group that is no output, each channel whose number `share` divides is dead."""
    torch.manual_seed(0)
    pk.convert(net)
    for group in pk.coupled_groups(net, X):
        if not group.is_output:
            group.set_masks(net, torch.arange(group.width) % share != 0)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.5, 2)
    return net.eval()


def test_groups():
    net = UNet()
    pk.convert(net)
    groups = {group.layers: group for group in pk.coupled_groups(net, X)}
    assert ("up2",) in groups and ("up1",) in groups and groups["head",].is_output
    assert set(groups["up2",].readers) == {"back2.0"} and groups["up2",].width == 16
    assert set(groups["bottom.0",].readers) == {"up2"}
    plain = {group.layers for group in pk.coupled_groups(UNet(), X)}
    assert plain == set(groups)


def test_filters_that_meet_in_an_add():
    net = Adding()
    pk.convert(net)
    groups = {group.layers: group for group in pk.coupled_groups(net, X)}
    assert set(groups) == {("low",), ("high", "up"), ("last",)} or set(groups) == {("low",), ("up", "high"), ("last",)}


@pytest.mark.parametrize("form", ["graph", "module"])
@pytest.mark.parametrize("make", [UNet, Adding, lambda: Adding(4)], ids=["unet", "adding", "groups"])
def test_shrink(make, form):
    net = masked(make())
    want = net(X)
    small = pk.shrink(net, X, form=form)
    torch.testing.assert_close(small(X), want)
    up = next(m for m in small.modules() if isinstance(m, nn.ConvTranspose2d))
    assert type(up) is nn.ConvTranspose2d and up.weight.shape[0] == up.in_channels
    assert up.weight.shape[1] * up.groups == up.out_channels
    assert sum(p.numel() for p in small.parameters()) < 0.75 * sum(p.numel() for p in make().parameters())


@pytest.mark.parametrize("form", ["graph", "module"])
def test_independent_masks_are_exact(form):
    torch.manual_seed(0)
    net = UNet().eval()
    pk.convert(net)
    for module in net.modules():
        if isinstance(module, (pk.MaskedConv2d, pk.MaskedConvTranspose2d)) and module is not net.head:
            K, kernels = module.out_channels, module.kernel_mask.shape
            module.set_masks(filter=torch.rand(K) < 0.6, kernel=torch.rand(kernels) < 0.8)
    torch.testing.assert_close(pk.shrink(net, X, form=form)(X), net(X))


def test_a_constant_input_is_no_constant_behind_it():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.ConvTranspose2d(4, 4, 3, stride=2), nn.Conv2d(4, 2, 1))
    pk.convert(net)
    net[0].set_masks(filter=torch.arange(4) > 1)
    net[2].set_masks(filter=torch.arange(4) > 0)
    net.eval()
    for form in ("graph", "module"):
        torch.testing.assert_close(pk.shrink(net, X, form=form)(X), net(X))


def test_an_output_size_that_follows_the_input():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ConvTranspose2d(8, 8, 3, 2, 1)
            self.last = nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return self.last(self.up(self.down(x).relu(), output_size=x.shape[2:]))

    net = masked(Sized())
    for form in ("graph", "module"):
        small = pk.shrink(net, X, form=form)
        torch.testing.assert_close(small(X), net(X))


def test_shrunk_for_any_size():
    net = masked(UNet())
    small, x = pk.shrink(net, X), torch.randn(1, 3, 16, 12)
    torch.testing.assert_close(small(x), net(x))


def test_tidy_masks():
    net = Adding()
    pk.convert(net)
    net.low.set_masks(filter=torch.arange(8) > 3)
    net.low.bias.data.zero_()
    net.eval()
    want = net(X)
    pk.tidy_masks(net, X)
    assert net.up.input_mask.tolist() == [False] * 4 + [True] * 4
    torch.testing.assert_close(net(X), want)


def test_live_mode_of_a_network():
    net = masked(UNet())
    want = net(X)
    from prunekernels.live import recording

    live = pk.flow(copy.deepcopy(net))
    with recording() as found:
        got = live(X)
    assert not found
    torch.testing.assert_close(got, want)


def test_flops():
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, stride=2))
    pk.convert(net)
    net[0].set_masks(filter=torch.arange(6) < 3, input=torch.arange(4) < 2)
    flops = pk.count_flops(net, torch.zeros(1, 4, 5, 5))
    assert (flops.dense, flops.live) == (25 * 4 * 6 * 4, 25 * 2 * 3 * 4)
    flops = pk.count_flops(pk.flow(net), torch.zeros(1, 4, 5, 5))
    assert flops.live == 25 * 2 * 3 * 4
