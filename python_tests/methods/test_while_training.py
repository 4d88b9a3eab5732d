"""PruneWhileTraining: when, how many, and that they never come back."""

import pytest
import torch

from cases.methods import chain, convs, norms, run, sgd, train
from prunekernels.methods import PruneWhileTraining

K = 12


def dead(method, name="3"):
    return [counts[name].hard for counts in method.history]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"start": 2, "period": 3, "end": 8}, [0, 0, 2, 2, 2, 4, 4, 4, 6, 6]),
        ({"start": 0, "period": 1, "end": 0}, [6] * 10),
        ({"start": 9, "period": 5, "end": 9}, [0] * 9 + [6]),
        ({"start": 0, "period": 4, "end": 9}, [2, 2, 2, 2, 4, 4, 4, 4, 6, 6]),
        ({}, [1, 2, 3, 4, 6, 6, 6, 6, 6, 6]),
    ],
)
def test_events(options, expected):
    method = run(PruneWhileTraining, 10, **options)[2]
    assert dead(method) == expected
    assert all(counts["3"].soft == counts["3"].returned == 0 for counts in method.history)


def test_defaults_of_a_long_run():
    net = chain()
    method = PruneWhileTraining(net, sgd(net), 0.5, 200)
    shares = [method.pruned_share(epoch) for epoch in range(200)]
    assert shares[4] == 0 < shares[5] == shares[9] < shares[10] and shares[94] < shares[95] == shares[199] == 0.5


@pytest.mark.parametrize("criterion", ["l1", "mean_activation", "random"])
def test_monotone_for_every_criterion(criterion):
    net = chain()
    optimizer = sgd(net)
    method = PruneWhileTraining(net, optimizer, 0.5, 6, criterion=criterion, start=1, period=1, end=4)
    before = {name: torch.zeros(m.out_channels, dtype=torch.bool) for name, m in convs(net).items()}
    for epoch in range(6):
        train(net, optimizer, method, 1, epoch)
        for name, conv in convs(net).items():
            gone = method.states[name] == 2
            assert bool((gone | ~before[name]).all()) and torch.equal(conv.hard_mask, ~gone)
            assert not conv.weight[gone].any()
            before[name] = gone
        assert torch.equal(norms(net)["4"].channel_mask, net[3].filter_mask)
    assert [int(b.sum()) for b in before.values()] == [4, 6, 5]


def test_weakest_by_l1_go():
    net = chain()
    optimizer = sgd(net)
    method = PruneWhileTraining(net, optimizer, 0.5, 4, start=0, period=1, end=0)
    norm = net[3].weight.detach().abs().sum((1, 2, 3))
    method.end_epoch()
    assert torch.equal(method.states["3"] == 2, norm <= norm.sort().values[5])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"start": 5, "end": 3}, r"PruneWhileTraining: start, end: expected 0 <= start <= end < 10, got \(5, 3\)"),
        ({"end": 10}, "expected 0 <= start <= end < 10"),
        ({"end": "late"}, "PruneWhileTraining: end: expected an integer, got 'late'"),
        ({"period": 0}, "PruneWhileTraining: period: expected at least 1, got 0"),
    ],
)
def test_bad_input(options, error):
    net = chain()
    with pytest.raises(ValueError, match=error):
        PruneWhileTraining(net, sgd(net), 0.5, 10, **options)
