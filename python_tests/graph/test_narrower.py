"""Narrower against the slow way: a new trace and analysis for the masks that the network has."""

import pytest
import torch

from cases.networks import NETWORKS, images, mask_at_random, trained
from graph.test_shrink_fuzz import build
from prunekernels.graph.analysis import ChannelAnalysis
from prunekernels.graph.layer_uses import any_weights
from prunekernels.graph.narrow import Narrowing, kept_in_forward, multiply_adds
from prunekernels.graph.narrower import Narrower
from prunekernels.graph.trace import trace


def slowly(net, x, literal=False):
    """The narrowing and the excess, by a new trace of the masked network."""
    traced = trace("test", net, x)
    analysis = ChannelAnalysis(traced, any_weights(net, traced), constants=False, statistics=True)
    least = multiply_adds(analysis, analysis.kept())
    kept = kept_in_forward(analysis, literal=literal)
    return Narrowing.of(analysis, kept), multiply_adds(analysis, kept) / max(least, 1)


def assert_same(net, x, narrower, literal=False):
    want, excess = slowly(net, x, literal)
    got = narrower.narrow(net)
    assert got.numbers == want.numbers
    assert {n: set(by) for n, by in got.indices.items()} == {n: set(by) for n, by in want.indices.items()}
    for name, by_dim in want.indices.items():
        for dim, rows in by_dim.items():
            assert torch.equal(got.indices[name][dim], rows), (name, dim)
    assert narrower.excess(net) == excess


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_compacted_narrower_equals_a_new_analysis(name, literal):
    net, x = trained(name), images()
    narrower = Narrower.of(trace("test", net, x), net, literal=literal)
    assert_same(net, x, narrower, literal)
    for seed in range(4):
        assert_same(mask_at_random(net, seed), x, narrower, literal)


@pytest.mark.parametrize("literal", [False, True])
def test_compacted_narrower_random_networks(fuzz_seed, literal):
    net, x = build(fuzz_seed)
    narrower = Narrower.of(trace("test", net, x), net, literal=literal)
    for seed in range(2):
        assert_same(mask_at_random(net, fuzz_seed + 100 * seed), x, narrower, literal)
