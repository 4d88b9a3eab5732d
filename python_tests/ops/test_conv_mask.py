"""conv_mask: the compiled operator and its fallback build the same table."""

import pytest
import torch

from prunekernels.ops import fallback

conv_mask = torch.ops.prunekernels.conv_mask
WIDTHS = [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 39, 40, 63, 64, 65, 72, 97]  # flags are packed by 8 into words of 32
NONE, DEAD = torch.ones(6).bool(), torch.zeros(6).bool()
SPECIAL = {
    "no masks": (None, None, None, 6, 4, 2),
    "all live": (NONE, torch.ones(6, 2).bool(), None, 6, 4, 2),
    "all dead": (DEAD, None, None, 6, 4, 2),
    "ragged": (torch.tensor([0, 0, 1, 0, 1, 1]).bool(), None, None, 6, 9, 3),
    "depthwise": (torch.arange(6) % 4 > 0, torch.arange(6)[:, None] > 1, torch.arange(6) != 5, 6, 6, 6),
    "live filters without kernels": (NONE, torch.arange(6)[:, None].expand(6, 4) > 1, None, 6, 8, 2),
    "no filters": (None, None, None, 0, 4, 1),
    "no channels": (NONE, torch.ones(6, 0).bool(), torch.ones(0).bool(), 6, 0, 1),
}


def random_masks(width, groups, given):
    gen = torch.Generator().manual_seed(width * groups)
    K, C = 3 * groups, width * groups
    made = [torch.rand(size, generator=gen) < 0.5 for size in ((K,), (K, width), (C,))]
    return *(mask if letter in given else None for letter, mask in zip("fki", made, strict=True)), K, C, groups


@pytest.mark.parametrize("name", SPECIAL)
def test_special_masks_equal_the_fallback(name):
    assert torch.equal(conv_mask(*SPECIAL[name]), fallback.conv_mask(*SPECIAL[name]))


@pytest.mark.parametrize("given", ["f", "k", "i", "fk", "fi", "ki", "fki"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("width", WIDTHS)
def test_random_masks_equal_the_fallback(width, groups, given):
    args = random_masks(width, groups, given)
    assert torch.equal(conv_mask(*args), fallback.conv_mask(*args))


@pytest.mark.parametrize("width", WIDTHS)
def test_masks_with_odd_strides(width):
    filters, kernels, channels, *sizes = random_masks(width, 1, "fki")
    odd = filters.repeat_interleave(2)[::2], kernels.T.contiguous().T, channels.repeat_interleave(3)[::3]
    assert torch.equal(conv_mask(*odd, *sizes), conv_mask(filters, kernels, channels, *sizes))
