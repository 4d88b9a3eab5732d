"""Lists of live channels padded to a multiple of a number, as on CUDA: the padding is zeros that nothing changes."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.conv import assert_zero, only
from cases.networks import IMAGE, NETWORKS
from prunekernels.live import LiveList, LiveTensor, channel_list

C = 40
FEW, MANY = ~only(C, *range(0, 26, 2)), ~only(C, *range(5, 17))  # 27 and 28 of 40


@pytest.fixture(autouse=True)
def aligned_on_the_cpu(monkeypatch):
    monkeypatch.setitem(channel_list.ALIGN, "cpu", 8)


def listed(*live, channels=C):
    return LiveList.of(np.array(live), channels)


# ---- lists


def test_padding_is_the_first_dead_channels():
    live = listed(1, 2, 9)
    padded = live.aligned(8)
    assert padded.host.tolist() == [0, 1, 2, 3, 4, 5, 6, 9] and padded.is_padded and padded.unpadded is live
    assert padded.is_live(torch.device("cpu")).tolist() == [False, True, True, *[False] * 4, True]
    assert padded.aligned(8) is padded and live.aligned(1) is live and padded.aligned(2).count == 4
    assert copy.deepcopy(padded) is padded


def test_all_channels_where_there_are_too_few():
    assert listed(1, 2, 9, channels=10).aligned(16) is LiveList.all(10)
    assert listed(*range(8)).aligned(8).host.tolist() == list(range(8)) and not listed(*range(8)).aligned(8).is_padded


def test_what_is_made_of_padded_lists():
    a, b = listed(1, 2, 9).aligned(8), listed(*range(20, 29)).aligned(16)
    assert a.union(b) is listed(1, 2, 9, *range(20, 29)) and a.intersection(b) is listed()
    assert a.spread(2).unpadded is listed(1, 2, 9).spread(2) and a.spread(2).count == 16
    assert a.pad(1, 2).unpadded is listed(1, 2, 9).pad(1, 2)
    assert LiveList.cat([a, b]).unpadded is LiveList.cat([a.unpadded, b.unpadded])
    part, first, count = a.slice(3, 20)
    assert (part.unpadded.host.tolist(), first, count) == ([6], 3, 5)
    assert a.slice(9, 20)[0] is listed(0, channels=11)  # without padding it is the list that others make


def test_padding_is_a_hole_wherever_it_goes():
    a, b = listed(1, 2, 9).aligned(8), listed(0, 2).aligned(4)
    index, inverse = (each.tolist() for each in a.remap(b, torch.device("cpu")))
    assert b.host.tolist() == [0, 1, 2, 3] and index == [-1, -1, 2, -1]
    assert inverse == [-1, -1, 2, -1, -1, -1, -1, -1]


# ---- layers


def pair(groups=1, bias=True, reads=None, **options):
    """A network in masked mode, and the same in live mode; NaN in what is dead."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(C, C, 3, padding=1, groups=groups, bias=bias), nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, C, 1)
    )
    pk.convert(net.double())
    net[0].set_masks(filter=FEW, input=reads)
    net[1].set_mask(FEW)
    net[3].set_masks(filter=MANY, input=FEW)
    with torch.no_grad():
        for layer in (net[0], net[1]):
            for parameter in (layer.weight, layer.bias):
                if parameter is not None:
                    parameter[~FEW] = float("nan")
        net[1].running_mean[~FEW] = net[1].running_var[~FEW] = float("nan")
        net[3].weight[~MANY] = net[3].weight[:, ~FEW] = float("nan")
    return net, pk.flow(copy.deepcopy(net), **options)


def outcome(net, x):
    net.zero_grad()
    x = x.detach().requires_grad_()
    y = net(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in net.parameters()), *(b.clone() for b in net.buffers())]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reads", [None, MANY], ids=["all", "some"])
@pytest.mark.parametrize(("groups", "bias"), [(1, True), (1, False), (C, True), (C, False), (4, True)])
def test_as_masked_mode(groups, bias, reads, training):
    masked, live = pair(groups, bias, reads)
    masked.train(training), live.train(training)
    x = torch.randn(4, C, 6, 5, dtype=torch.float64)
    for got, want in zip(outcome(live, x), outcome(masked, x), strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize(("align", "count"), [(None, 32), (16, 32), (3, 27), (1, 27), (64, C)])
def test_widths(align, count):
    _, net = pair(align=align)
    x = torch.randn(4, C, 6, 5, dtype=torch.float64)
    for layer in net[:3]:
        x = layer(x)
        assert (type(x) is LiveTensor) == (count < C)
        assert (x.compact if count < C else x).shape == (4, count, 6, 5)


def test_padding_holds_zeros_and_computes_no_plan():
    """Nothing is dead in the small convolutions, so that they run as the vendor's."""
    _, net = pair()
    x = torch.randn(4, C, 6, 5, dtype=torch.float64)
    for layer in net:
        x = layer(x)
        assert_zero(x.compact[:, ~x.live.is_live(x.device)])
    assert all(small.table is None for layer in (net[0], net[3]) for small in layer._lowered.values())


def test_sums_of_other_lists_are_padded():
    a, b, other = pair()[1], pair()[1], ~only(C, *range(20))
    for parameter in b.parameters():
        parameter.data.nan_to_num_()
    b[0].set_masks(filter=other)
    b[1].set_mask(other)
    x = torch.randn(4, C, 6, 5, dtype=torch.float64)
    left, right = a[:3](x), b[0](x).relu()
    y = left + right
    assert y.live.unpadded.mask().tolist() == (FEW | other).tolist()
    torch.testing.assert_close(y.to_dense(), left.to_dense() + right.to_dense())
    product = left * right
    assert product.live.count % 8 == 0 and product.live.unpadded.mask().tolist() == (FEW & other).tolist()
    torch.testing.assert_close(product.to_dense(), left.to_dense() * right.to_dense())


def test_sigmoid_of_padding():
    x = pair()[1][0](torch.randn(4, C, 6, 5, dtype=torch.float64))
    assert x.live.is_padded
    y = torch.sigmoid(x)
    assert torch.equal(y.to_dense(), torch.sigmoid(x.to_dense()))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    """All kinds of networks give the same numbers with padded lists."""
    torch.manual_seed(0)
    net, x = NETWORKS[name](), torch.randn(3, *IMAGE)
    pk.convert(net)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    masked = [module for module in net.modules() if isinstance(module, pk.MaskedConv2d)]
    for layer in masked:
        live = torch.rand(layer.out_channels) < 0.6
        live[0] = True
        if layer.groups == 1:
            layer.set_masks(filter=live)
    flowing = pk.flow(copy.deepcopy(net))
    torch.testing.assert_close(flowing(x), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("align", [0, -8, True, 8.0, "8"])
def test_an_align_that_is_none(align):
    with pytest.raises(ValueError, match=f"flow: align: expected a positive number or None, got {align!r}"):
        pk.flow(pair()[0], align=align)
