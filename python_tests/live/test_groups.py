"""Grouped convolutions in live mode: groups that keep unequally many filters and channels."""

import copy

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.live import assert_same_step, in_flow, live_list, step
from prunekernels.live import LiveTensor, recording
from prunekernels.live.tensor import wrap
from prunekernels.nn.conv import lowered_for

GROUPS, WIDTH, C = 4, 5, 20  # channels and filters are as many
RAGGED, EVEN = [0, 1, 4, 6, 10, 11, 12, 18], [0, 3, 5, 6, 11, 13, 16, 19]
LISTS = {
    "ragged": RAGGED, "even": EVEN, "whole groups": [*range(5, 15)], "a group and a bit": [*range(5), 7],
    "one": [13], "all but one": [*range(1, C)], "all": [*range(C)],
}  # fmt: skip


def mask(channels):
    return torch.isin(torch.arange(C), torch.tensor(channels))


def of_groups(channels):
    """Whether each group has some of these channels."""
    return mask(channels).view(GROUPS, -1).any(1)


def grouped(filters, *, seed=0, **args):
    """A masked layer with whole numbers in it, NaN where it is dead."""
    torch.manual_seed(seed)
    layer = pk.MaskedConv2d(C, C, 3, **({"padding": 1, "groups": GROUPS} | args)).double()
    layer.set_masks(filter=mask(filters))
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randint(-4, 5, p.shape))
            p[~mask(filters)] = torch.nan
    return layer


def run(layer, channels, layout=torch.contiguous_format):
    """Result and gradients behind an input with these live channels; live if the layer is in live mode."""
    torch.manual_seed(1)
    compact = torch.randint(-4, 5, (2, len(channels), 6, 5)).double().to(memory_format=layout).requires_grad_()
    x = wrap(compact * 1, live_list(channels, C))
    x = x if layer._flow or type(x) is not LiveTensor else x.to_dense()
    y = layer(x)
    wide = y.to_dense() if type(y) is LiveTensor else y
    weights = torch.arange(1.0, wide.numel() + 1).view(wide.shape)
    grads = torch.autograd.grad((wide * weights).sum(), [compact, *layer.parameters()])
    return y, [wide.detach(), *grads]


def assert_as_masked(layer, channels, **args):
    _, want = run(layer, channels, **args)
    with recording() as fallbacks:
        y, got = run(in_flow(nn.Sequential(layer))[0], channels, **args)
    assert not fallbacks
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    return y


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("channels", LISTS)
@pytest.mark.parametrize("filters", LISTS)
def test_groups_flow(filters, channels, bias, layout):
    layer, shared = grouped(LISTS[filters], bias=bias), of_groups(LISTS[filters]) & of_groups(LISTS[channels])
    if not shared.any():
        pytest.skip("no live filter reads a live channel: full width")
    y = assert_as_masked(layer, LISTS[channels], layout=layout)
    if type(y) is LiveTensor:
        read = shared.repeat_interleave(WIDTH)
        assert y.live.host.tolist() == [k for k in LISTS[filters] if bias or read[k]]


@pytest.mark.parametrize("weight_grad", ["masked", "dense"])
@pytest.mark.parametrize("reads", [RAGGED, [*range(C)]], ids=["ragged", "all"])
@pytest.mark.parametrize("channels", LISTS)
def test_other_masks_beside(channels, reads, weight_grad):
    """Kernels and inputs that are dead as well, and gradients of dead kernels."""
    layer = grouped(EVEN, bias=False)
    with torch.no_grad():
        layer.weight.nan_to_num_(3)
    layer.set_masks(kernel=torch.arange(C * WIDTH).view(C, WIDTH) % 3 > 0, input=mask(reads))
    layer.weight_grad = weight_grad
    layer.set_masks(hard=layer.filter_mask)
    layer.grad_scale = torch.arange(C) * 0.5
    if (mask(LISTS[channels]) & mask(reads)).any():
        assert_as_masked(layer, LISTS[channels])


def test_no_group_with_a_live_filter_reads_a_live_channel():
    """The result is the bias. The channel that is live belongs to a group without filters."""
    layer = grouped([13])
    layer.set_masks(input=mask([2]), hard=mask([13]))
    layer.weight_grad = "dense"
    _, want = run(layer, [2, 13])
    _, got = run(in_flow(nn.Sequential(layer))[0], [2, 13])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)) and want[0].any()


@pytest.mark.parametrize("args", [
    {"stride": 2, "padding": "valid"}, {"padding": 2, "dilation": 2}, {"padding": 1, "padding_mode": "reflect"},
    {"groups": 2}, {"groups": 10},
], ids=str)  # fmt: skip
def test_geometry(args):
    assert_as_masked(grouped(RAGGED, **args), EVEN)


def test_more_filters_than_channels():
    layer = pk.MaskedConv2d(4, 12, 3, groups=4).double()
    layer.set_masks(filter=torch.arange(12) % 5 > 1)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    assert_same_step(step(in_flow(nn.Sequential(layer)), x), step(nn.Sequential(copy.deepcopy(layer)), x))


def test_only_what_is_live_is_computed():
    live = live_list(EVEN, C)
    even = lowered_for(grouped(EVEN), live)
    assert (even.filters, even.channels, even.groups) == (8, 8, 4) and even.evened.result is None
    assert even.remap is None and even.table is None
    ragged = lowered_for(grouped(RAGGED), live)
    assert (ragged.filters, ragged.channels, ragged.groups) == (12, 8, 4)  # each group three filters, as the first has
    whole = lowered_for(grouped(LISTS["whole groups"]), live)
    assert (whole.filters, whole.channels, whole.groups) == (10, 4, 2)


def test_infinities_stay_in_their_group():
    layer = grouped(RAGGED)
    compact = torch.zeros(1, len(EVEN), 4, 4, dtype=torch.float64)
    compact[:, 0] = torch.inf  # channel 0, read by filters 0 to 4
    y = in_flow(nn.Sequential(layer))[0](wrap(compact, live_list(EVEN, C))).to_dense()
    assert y[:, 5:].isfinite().all() and not y[:, mask(RAGGED).logical_not()].any()


def test_explain_shows_the_small_convolution():
    net = pk.flow(nn.Sequential(pk.MaskedConv2d(C, C, 1), grouped(RAGGED).float(), pk.MaskedConv2d(C, C, 1)))
    net[0].set_masks(filter=mask(EVEN))
    explanation = pk.explain(net, torch.randn(2, C, 6, 6), modes=())
    assert not explanation.fallbacks
    row = explanation.rows[1]
    assert (row["mode"], row["live_filters"], row["live_inputs"], row["live_kernels"]) == ("live", 8, 8, 16)
    assert row["ms"] is not None


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_networks(training):
    """A bottleneck as of ResNeXt, in which masks of both sides of the grouped layer differ."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, C, 3, padding=1, groups=GROUPS),
        nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, 6, 1),
    ).double().train(training)  # fmt: skip
    pk.convert(net)
    for conv, norm, live in ((0, 1, EVEN), (3, 4, RAGGED)):
        net[conv].set_masks(filter=mask(live)), net[norm].set_mask(mask(live))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    with recording() as fallbacks:
        got = step(in_flow(net), x)
    assert not fallbacks
    assert_same_step(got, step(net, x))
