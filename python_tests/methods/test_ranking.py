"""Orders and counts."""

import pytest
import torch

from prunekernels.methods.ranking import Ranking, pruned_count, pruned_counts, rounded


def ranking(scores, dead=(), hard=(), members=None):
    scores = torch.tensor(scores, dtype=torch.float64)
    masks = [torch.zeros(len(scores), dtype=torch.bool) for _ in range(2)]
    for mask, which in zip(masks, (dead, hard), strict=True):
        mask[list(which)] = True
    members = [torch.arange(len(scores))] if members is None else [torch.tensor(m) for m in members]
    return Ranking.of(scores, masks[0] | masks[1], masks[1], members)


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
    assert pruned_counts([r], (0.9,), "layer", 1) == [4]


def test_a_single_filter_stays():
    assert pruned_counts([ranking([0.0])], (0.99,), "layer", 1) == [0]


def test_layer_budget():
    rankings = [ranking([1.0] * 10), ranking([100.0] * 5)]
    assert pruned_counts(rankings, (0.5,), "layer", 1) == [5, 2]
    assert pruned_counts(rankings, (0.5, 0.5), "layer", 1) == [2, 1]
    assert pruned_counts(rankings, (0.5,), "layer", 4) == [2, 1]


def test_global_budget_compares_scores_over_their_mean():
    rankings = [ranking([1, 1, 1, 1]), ranking([10, 10, 90, 90])]
    assert pruned_counts(rankings, (0.25,), "global", 1) == [0, 2]
    assert pruned_counts(rankings, (0.75,), "global", 1) == [3, 3]
    assert pruned_counts(rankings, (0.99,), "global", 1) == [3, 3]


def test_global_budget_counts_hard_dead_first():
    rankings = [ranking([9, 1, 1, 1], hard=(0,)), ranking([1, 2, 3, 4])]
    assert pruned_counts(rankings, (0.125,), "global", 1) == [1, 0]
    assert pruned_counts(rankings, (0.25,), "global", 1) == [1, 1]


def test_global_budget_of_zeros():
    assert pruned_counts([ranking([0, 0, 0]), ranking([0, 0, 0])], (0.5,), "global", 1) == [2, 1]
