"""Layers of which an eighth or less is dead keep their full width in live mode: odd widths cost more than zeros."""

import copy

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.conv import assert_zero, only
from prunekernels.live import LiveList, LiveTensor, recording

C = 16
WIDE = ~only(C, 3, 9)  # two of sixteen dead: almost full
NARROW = ~only(C, 3, 9, 12)


@pytest.mark.parametrize(
    ("count", "channels", "expected"), [(14, 16, True), (13, 16, False), (7, 8, True), (6, 7, False), (8, 8, True)]
)
def test_what_is_almost_full(count, channels, expected):
    live = LiveList.of(torch.arange(count).numpy(), channels)
    assert live.almost_full == expected
    assert live.widened() is (LiveList.all(channels) if expected else live)


def pair(live, *, reads=None, groups=1, bias=True, norm=True, dtype=torch.float64):
    """A convolution with its norm in masked mode, and the same in live mode; NaN in what is dead."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(C, C, 3, padding=1, groups=groups, bias=bias), nn.BatchNorm2d(C), nn.ReLU())
    pk.convert(net.to(dtype))
    net[0].set_masks(filter=live, input=reads)
    if norm:
        net[1].set_mask(live)
    with torch.no_grad():
        net[0].weight[~live] = float("nan")
        if bias:
            net[0].bias[~live] = float("nan")
        net[1].weight[~live & norm] = float("nan")
    return net, pk.flow(copy.deepcopy(net))


def outcome(net, x):
    net.zero_grad()
    x = x.detach().requires_grad_()
    y = net(x)
    seen = net[0](x)  # without the wrapper's return to full width
    y.square().sum().backward()
    return seen, [y.detach(), x.grad, *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, C])
@pytest.mark.parametrize("reads", [None, WIDE, NARROW], ids=["all", "wide", "narrow"])
@pytest.mark.parametrize(("live", "is_live"), [(WIDE, False), (NARROW, True)], ids=["wide", "narrow"])
def test_as_masked_mode(live, is_live, reads, groups, bias):
    masked, flowing = pair(live, reads=reads, groups=groups, bias=bias)
    x = torch.randn(4, C, 6, 5, dtype=torch.float64)
    (_, want), (seen, got) = outcome(masked, x), outcome(flowing, x)
    assert (type(seen) is LiveTensor) == (is_live or (groups == C and reads is NARROW and not bias))
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)
    assert_zero(got[0][:, ~live])
    assert_zero(got[2][~live])


def test_behind_a_narrow_layer():
    """The input is live, the output has full width; the norm behind it makes no copies."""
    first, flowing_first = pair(NARROW)
    masked, flowing = pair(WIDE, reads=NARROW, dtype=torch.float32)
    net, flowing = nn.Sequential(*first.float(), *masked), pk.flow(nn.Sequential(*flowing_first.float(), *flowing))
    x = torch.randn(4, C, 6, 5)
    with recording() as fallbacks:
        assert torch.allclose(net(x), flowing(x), rtol=1e-4, atol=1e-5)
    assert not fallbacks


def test_dead_for_good_stays_dead():
    """weight_grad="dense" gives soft-dead filters a gradient, hard-dead ones none."""
    _, net = pair(WIDE)
    layer = net[0]
    layer.set_masks(hard=WIDE)
    layer.weight_grad = "dense"
    _, (_, _, grad, *_) = outcome(net, torch.randn(4, C, 6, 5, dtype=torch.float64))
    assert_zero(grad[~WIDE])
    assert grad[WIDE].count_nonzero()


def test_explain_tells_what_is_live():
    _, net = pair(WIDE)
    (row,) = pk.explain(net, torch.randn(2, C, 6, 5, dtype=torch.float64), modes=()).rows
    assert (row["mode"], row["filters"], row["live_filters"], row["live_kernels"]) == ("live", C, 14, 14 * C)
