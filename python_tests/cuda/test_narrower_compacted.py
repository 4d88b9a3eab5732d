"""Masks on a GPU are read in one transfer, and say what those on the CPU do."""

import copy

import pytest

from cases.cuda import WHY_NOT
from cases.networks import images, mask_at_random, trained
from prunekernels.graph.narrower import Narrower, read_masks
from prunekernels.graph.trace import trace

if WHY_NOT:
    pytest.skip(WHY_NOT, allow_module_level=True)


@pytest.mark.parametrize("name", ["basic", "inverted", "halves"])
def test_masks_of_a_network_on_a_gpu(name):
    net = trained(name)
    narrower = Narrower.of(trace("test", net, images()), net)
    for seed in range(3):
        mask_at_random(net, seed, kernels=0.5)
        want, got = read_masks(net), read_masks(copy.deepcopy(net).cuda())
        assert want.keys() == got.keys() and any(masks.kernels is not None for masks in want.values())
        assert all(want[layer].equals(got[layer]) for layer in want)
        one, other = narrower.narrow(want), narrower.narrow(got)
        assert one.counts == other.counts
