"""Orders and counts."""

import pytest
import torch

from cases.methods import ranking
from prunekernels.methods.ranking import pruned_count, rounded


@pytest.mark.parametrize(
    ("width", "shares", "expected"),
    [
        (10, (1 - 0.9,), 0),  # as code that knows the kept share has it
        (16, (1 - 0.9,), 1),
        (10, (0.1,), 1),
        (10, (0.7,), 7),
        (100, (0.29,), 28),
        (64, (0.5, 0.5), 16),
        (7, (0.0,), 0),
        (10, (0.4, 1.0), 4),
    ],
)
def test_pruned_count_truncates(width, shares, expected):
    assert pruned_count(width, *shares) == expected


@pytest.mark.parametrize(
    ("width", "pruned", "round_to", "left"),
    [
        (64, 30, 8, 40),
        (64, 32, 8, 32),
        (64, 31, 1, 33),
        (12, 5, 8, 8),
        (12, 3, 8, 12),
        (6, 3, 8, 6),
        (20, 9, 8, 16),
        (64, 0, 8, 64),
    ],
)
def test_rounded_leaves_a_multiple_or_all(width, pruned, round_to, left):
    assert width - rounded(width, pruned, round_to) == left


def test_order_is_by_score_then_dead_then_index():
    assert ranking([3, 1, 0, 2, 0, 1]).order.tolist() == [2, 4, 1, 5, 3, 0]
    assert ranking([0, 0, 0, 2, 0, 1], dead=(2, 4)).order.tolist() == [2, 4, 0, 1, 5, 3]
    assert ranking([1, 1, 1, 1]).order.tolist() == [0, 1, 2, 3]


def test_hard_dead_go_first_whatever_their_score():
    r = ranking([3, 9, 0, 2], hard=(1,))
    assert r.order.tolist() == [1, 2, 3, 0] and r.hard == 1
    assert r.first(2).tolist() == [False, True, True, False]


def test_each_layer_keeps_its_best_filter():
    r = ranking([1, 2, 3, 4, 5, 6], members=[range(6), (0, 1)])
    assert r.order.tolist() == [0, 2, 3, 4, 1, 5] and r.protected == 2


PADDED = [range(4), range(2, 6), range(12)]  # three layers that meet: four channels, four, and all twelve


def test_evenly_takes_the_same_share_of_each_layer():
    scores = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert ranking(scores, members=PADDED).order[:6].tolist() == [6, 7, 8, 9, 10, 11]  # none of the first two layers
    r = ranking(scores, members=PADDED, evenly=True)
    gone = r.first(6)
    assert [int(gone[list(layer)].sum()) for layer in PADDED] == [2, 2, 6]
    assert gone.nonzero().flatten().tolist() == [1, 3, 5, 6, 7, 8]  # the weakest of [0, 1], [2, 3], [4, 5] and the rest


@pytest.mark.parametrize("count", range(10))
def test_evenly_is_near_the_share_at_every_count_and_only_adds(count):
    generator = torch.Generator().manual_seed(count)
    scores = torch.rand(60, generator=generator).tolist()
    layers = [range(20), range(10, 40), range(60)]
    r = ranking(scores, members=layers, evenly=True)
    share = count / 10
    gone = r.first(pruned_count(60, share))
    for layer in layers:
        assert abs(int(gone[list(layer)].sum()) - share * len(layer)) <= 1.5  # half a filter of each class
    again = ranking(scores, hard=gone.nonzero().flatten().tolist(), members=layers, evenly=True)
    assert bool((r.first(54) >= gone).all()) and torch.equal(again.first(54), r.first(54))


def test_evenly_changes_nothing_where_each_layer_has_all():
    scores = torch.rand(30, generator=torch.Generator().manual_seed(0)).tolist()
    members = [range(30), tuple(torch.randperm(30, generator=torch.Generator().manual_seed(1)).tolist())]
    options = {"dead": (3, 4), "hard": (7, 20), "members": members}
    assert ranking(scores, **options, evenly=True).order.tolist() == ranking(scores, **options).order.tolist()


def test_evenly_leaves_each_layer_a_filter():
    layers = [(0,), (0, 1), (1, 2, 3)]
    r = ranking([1.0, 2, 3, 4], members=layers, evenly=True)
    live = ~r.first(4 - r.protected)
    assert all(bool(live[list(layer)].any()) for layer in layers)
