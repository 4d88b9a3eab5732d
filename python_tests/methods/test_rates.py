"""Rates by layer."""

import pytest
import torch

from cases.methods import EVERY, chain, residual, run, sgd, train
from prunekernels.methods import CSGD, GHFP, PGP, SFP, CoarsePruning

IMAGES = torch.randn(2, 3, 6, 6)


def dead(method):
    return {name: counts.soft + counts.hard for name, counts in method.history[-1].items()}


@pytest.mark.parametrize("name", EVERY)
def test_layers_end_at_their_own_rates(name):
    _, _, method = run(EVERY[name], 4, total=4, rates={"0": 0.25, "3": 0.0})
    assert dead(method) == {"0": 2, "3": 0, "6": 5}
    assert method.rate == 0.5 and method.rates == {"0": 0.25, "3": 0.0}


@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("pgp", "rpgp")])
def test_each_rate_goes_through_the_schedule(name):
    """As if every layer had a method of its own."""
    rates = {"0": 0.25, "3": 0.75, "6": 0.5}
    net = chain()
    method = EVERY[name](net, sgd(net), 0.5, 6, rates=rates)
    alone = {rate: EVERY[name](other := chain(), sgd(other), rate, 6) for rate in rates.values()}
    for epoch in range(6):
        for layer, rate in rates.items():
            width = net[int(layer)].out_channels
            counts = int(width * alone[rate].pruned_share(epoch))
            assert int(width * method._share(rate, epoch)) == counts
        method.end_epoch()
        assert dead(method) == {
            layer: int(net[int(layer)].out_channels * alone[rate].pruned_share(epoch)) for layer, rate in rates.items()
        }


def test_progressive_shares_are_not_linear_in_the_rate():
    net = chain()
    method = PGP(net, sgd(net), 0.5, 4, criterion="l2", fine_tune=0, rates={"3": 0.75, "6": 0.25})
    method.end_epoch()
    assert dead(method) == {"0": 1, "3": int(12 * (1 - 0.25**0.25)), "6": 0} == {"0": 1, "3": 3, "6": 0}
    assert int(12 * 1.5 * method.pruned_share(0)) == 2


def test_hard_filters_are_a_share_of_each_layers_own():
    net = chain()
    method = GHFP(net, sgd(net), 0.5, 10, hard=0.5, rates={"3": 0.75, "0": 0.0})
    method.end_epoch()
    assert {name: counts.hard for name, counts in method.history[0].items()} == {"0": 0, "3": 4, "6": 2}


def test_the_last_pattern_counts():
    def rates(patterns):
        net = residual()
        return SFP(net, sgd(net), rates=patterns).rates

    assert rates({"*": 0.2, "f*": 0.4, "stem": 0.0}) == {"stem": 0.0, "first": 0.4, "second": 0.2, "last": 0.2}
    assert rates({"stem": 0.0, "*": 0.2}) == dict.fromkeys(("stem", "first", "second", "last"), 0.2)


def test_joint_filters_have_one_rate():
    options = {"coupling": "joint", "example_input": IMAGES}
    net, _, method = run(SFP, 1, net=residual(), rates={"s*": 0.25, "last": 0.0}, **options)
    assert dead(method) == {"stem": 2, "first": 3, "second": 2, "last": 0}
    assert torch.equal(method.states["stem"], method.states["second"])


def test_rates_equal_to_rate_change_nothing():
    one, other = (run(GHFP, 3, **options)[0] for options in ({}, {"rates": {"*": 0.5}}))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_random_masks_have_the_rates():
    net = chain()
    data = [(torch.randn(8, 3, 6, 6), torch.randint(4, (8,)))]
    options = {"data": data, "masks": 2, "start": -1, "kernel_rate": 0}
    method = CoarsePruning(net, sgd(net), 0.0, 2, rates={"3": 0.5}, **options)
    assert {name: int((states > 0).sum()) for name, states in method.states.items()} == {"0": 0, "3": 6, "6": 0}


def test_clusters_have_the_rates():
    net = chain()
    optimizer = sgd(net)
    method = CSGD(net, optimizer, 0.5, 1, example_input=IMAGES, rates={"0": 0.25, "6": 0.0})
    train(net, optimizer, method, 1)
    assert dead(method) == {"0": 2, "3": 6, "6": 0}


# ---- bad input

BAD = {
    "a list": ([0.5], r"expected a dict of rates by pattern, got \[0.5\]"),
    "1": ({"stem": 1.0}, r"expected numbers in \[0, 1\), for 'stem' as well, got 1.0"),
    "a word": ({"stem": "half"}, r"expected numbers in \[0, 1\), for 'stem' as well, got 'half'"),
    "-1": ({"s*": -0.1}, r"expected numbers in \[0, 1\), for 's\*' as well, got -0.1"),
    "a number": ({3: 0.5}, "expected names or patterns of layers, got 3"),
    "nothing": (
        {"stage1.*": 0.3},
        r"expected names or patterns of layers that are pruned, got 'stage1.\*', which matches none of stem, first, "
        "second, last",
    ),
    "a norm": ({"stem_norm": 0.3}, "got 'stem_norm', which matches none of"),
    "left out": ({"last": 0.3}, r"got 'last', which matches only layers that are left out \(last: skip\)"),
    "split": (
        {"stem": 0.3},
        r"expected one rate for filters that are pruned together \(those of stem, second\), got 0.3 for stem and "
        "rate=0.5 for second",
    ),
    "split in two": ({"stem": 0.3, "second": 0.2}, "got 0.3 for stem and 0.2 for second"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rates(case):
    rates, error = BAD[case]
    net = residual()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    options = {"coupling": "joint", "example_input": IMAGES, "skip": ["last"] if case == "left out" else []}
    with pytest.raises(ValueError, match=f"SFP: rates: .*{error}"):
        SFP(net, sgd(net), rates=rates, **options)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert not net.stem._forward_hooks
