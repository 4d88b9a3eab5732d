import pytest
import torch
from network_cases import EXACT, NETWORKS, assert_same_function, images, mask_at_random, trained

from prunekernels.graph import shrink


def test_random_masks(fuzz_seed):
    for name in list(NETWORKS)[fuzz_seed % 5 :: 5]:
        net = mask_at_random(trained(name, fuzz_seed), fuzz_seed)
        small = shrink(net, images())
        assert_same_function(net, small, images(5))


@pytest.mark.parametrize("name", EXACT)
def test_integers_are_exact(name):
    net = mask_at_random(trained(name, exact=True), 1)
    x = images(3, exact=True)
    assert torch.equal(shrink(net, x)(x), net(x))
