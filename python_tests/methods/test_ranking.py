"""Orders and counts."""

import pytest

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
