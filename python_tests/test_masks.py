"""ConvMask: what it infers, counts and refuses."""

import copy

import pytest
import torch

import prunekernels as pk


def bools(*values):
    return torch.tensor(values, dtype=torch.bool)


FILTERS = bools(1, 0, 1, 1, 0, 1)
INPUTS = bools(1, 1, 0, 1)
KERNELS = bools(1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1).view(6, 2)


def test_counts():
    mask = pk.ConvMask(FILTERS, KERNELS, INPUTS, groups=2)
    # rows 0 1 2 read inputs 0 1, rows 3 4 5 inputs 2 3; live: (0,0) (2,1) (3,3) (5,3)
    assert (mask.live_filters, mask.live_inputs, mask.live_kernels) == (4, 3, 4)
    assert mask.density == pytest.approx(4 / 12)


def test_keeps_the_masks():
    mask = pk.ConvMask(FILTERS, KERNELS, INPUTS, groups=2)
    assert torch.equal(mask.filter_mask, FILTERS)
    assert torch.equal(mask.kernel_mask, KERNELS)
    assert torch.equal(mask.input_mask, INPUTS)


@pytest.mark.parametrize(
    ("args", "counts"),
    [
        ({"filter_mask": FILTERS, "in_channels": 4}, (4, 4, 16)),
        ({"input_mask": INPUTS, "out_channels": 6}, (6, 3, 18)),
        ({"input_mask": INPUTS, "out_channels": 6, "groups": 2}, (6, 3, 9)),
        ({"kernel_mask": KERNELS, "groups": 2}, (6, 4, 9)),
        ({"filter_mask": FILTERS, "input_mask": INPUTS}, (4, 3, 12)),
        ({"out_channels": 6, "in_channels": 4}, (6, 4, 24)),
        ({"filter_mask": FILTERS & False, "in_channels": 4}, (0, 4, 0)),
    ],
    ids=str,
)
def test_sizes_are_inferred(args, counts):
    mask = pk.ConvMask(**args)
    assert (mask.live_filters, mask.live_inputs, mask.live_kernels) == counts


def test_sizes_may_stay_open_until_first_use():
    mask = pk.ConvMask(FILTERS)
    x, weight = torch.randn(2, 3, 5, 5), torch.randn(6, 3, 3, 3)
    y = pk.masked_conv2d(x, weight, mask=mask)
    assert not y[:, ~FILTERS].count_nonzero() and y[:, FILTERS].count_nonzero()
    assert mask.density == pytest.approx(4 / 6)


def test_serves_several_convolutions():
    mask = pk.ConvMask(FILTERS, input_mask=INPUTS)
    x, wide, narrow = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3), torch.randn(6, 4, 1, 1)
    masks = {"filter_mask": FILTERS, "input_mask": INPUTS}
    assert torch.equal(pk.masked_conv2d(x, wide, mask=mask, stride=2), pk.masked_conv2d(x, wide, stride=2, **masks))
    assert torch.equal(pk.masked_conv2d(x, narrow, mask=mask), pk.masked_conv2d(x, narrow, **masks))


@pytest.mark.parametrize("move", [lambda m: m.to("cpu"), copy.deepcopy], ids=["to", "deepcopy"])
def test_copies(move):
    mask = pk.ConvMask(FILTERS, KERNELS, INPUTS, groups=2)
    other = move(mask)
    assert isinstance(other, pk.ConvMask) and other.density == mask.density
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(6, 2, 3, 3)
    a, b = (pk.masked_conv2d(x, weight, mask=m, groups=2) for m in (mask, other))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"filter_mask": FILTERS.int()}, "filter_mask"),
        ({"filter_mask": FILTERS.tolist()}, "filter_mask"),
        ({"filter_mask": FILTERS[None]}, "filter_mask"),
        ({"input_mask": INPUTS.float()}, "input_mask"),
        ({"input_mask": INPUTS.view(2, 2)}, "input_mask"),
        ({"kernel_mask": KERNELS.flatten()}, "kernel_mask"),
        ({"kernel_mask": KERNELS.byte()}, "kernel_mask"),
        ({"filter_mask": FILTERS[:5], "kernel_mask": KERNELS}, "(filter|kernel)_mask"),
        ({"input_mask": INPUTS, "kernel_mask": KERNELS}, "(input|kernel)_mask"),
        ({"filter_mask": FILTERS, "out_channels": 7}, "filter_mask"),
        ({"input_mask": INPUTS, "in_channels": 5}, "input_mask"),
        ({"filter_mask": FILTERS, "in_channels": 3, "groups": 2}, "groups|in_channels"),
        ({"filter_mask": FILTERS[:5], "in_channels": 4, "groups": 2}, "groups|out_channels|filter_mask"),
    ],
    ids=str,
)
def test_bad_masks(args, named):
    with pytest.raises((ValueError, TypeError), match=rf"(?s)(ConvMask|conv_mask).*({named}).*expected.*got"):
        pk.ConvMask(**args)


@pytest.mark.parametrize(("size", "named"), [((6, 5), "4 channels|input_mask"), ((5, 4), "6 filters|filter_mask")])
def test_wrong_layer(size, named):
    mask = pk.ConvMask(FILTERS, input_mask=INPUTS)
    with pytest.raises((ValueError, RuntimeError), match=rf"(?s)(masked_conv2d|ConvMask).*expected.*({named}).*got"):
        pk.masked_conv2d(torch.zeros(1, size[1], 4, 4), torch.zeros(*size, 3, 3), mask=mask)


def test_wrong_groups():
    mask = pk.ConvMask(FILTERS, input_mask=INPUTS, groups=2)
    with pytest.raises((ValueError, RuntimeError), match=r"(?s)(masked_conv2d|ConvMask).*groups.*got"):
        pk.masked_conv2d(torch.zeros(1, 4, 4, 4), torch.zeros(6, 4, 3, 3), mask=mask)
