"""Layouts against views of a tensor whose entries say which channel they belong to."""

import pytest
import torch

from prunekernels.graph.layout import axes_of, channels_along, layout_of, positions, regroup

SIZES = (2, 12, 3, 4)
LABELS = torch.arange(12).view(1, 12, 1, 1).expand(SIZES)


def fixed(sizes):
    return [False] * len(sizes)


VIEWS = {
    "same": ((2, 12, 3, 4), [1]),
    "flat": ((2, 144), [1]),
    "space": ((2, 12, 12), [1]),
    "parts": ((2, 3, 4, 3, 4), [1, 2]),
    "more parts": ((2, 2, 2, 3, 12), [1, 2, 3]),
    "part with space": ((2, 6, 24), [1, 2]),
    "with the batch": ((4, 6, 3, 4), [0, 1]),
    "all": ((288,), [0]),
    "ones": ((1, 2, 1, 12, 1, 3, 4), [3]),
}


@pytest.mark.parametrize("name", VIEWS)
def test_channels_lie_where_a_view_puts_them(name):
    sizes, axes = VIEWS[name]
    layout = regroup(layout_of(SIZES, 1, fixed(SIZES)), sizes, fixed(sizes))
    labels = LABELS.reshape(sizes)
    assert axes_of(layout) == axes
    for axis in axes:
        along = channels_along(layout, axis)
        want = [entries.unique().tolist() for entries in labels.movedim(axis, 0)]
        assert [sorted(set(channels)) for channels in along.tolist()] == want
        assert torch.equal(positions(layout[axis]), along[:, 0])


def test_views_back_give_the_channels_back():
    layout = layout_of(SIZES, 1, fixed(SIZES))
    parts = regroup(layout, (2, 3, 4, 3, 4), fixed(range(5)))
    assert channels_along(regroup(parts, SIZES), 1)[:, 0].tolist() == list(range(12))
    shuffled = regroup([parts[0], parts[2], parts[1], *parts[3:]], SIZES)
    assert axes_of(shuffled) == [1]
    assert channels_along(shuffled, 1)[:, 0].tolist() == torch.arange(12).view(3, 4).T.flatten().tolist()


@pytest.mark.parametrize("sizes", [(2, 8, 18), (2, 9, 16), (2, 7), (2, 12, 3, 5)])
def test_unequal_cuts_have_no_layout(sizes):
    assert regroup(layout_of(SIZES, 1, fixed(SIZES)), sizes, fixed(sizes)) is None


@pytest.mark.parametrize(
    ("sizes", "free", "has_layout"),
    [
        ((2, 3, 4, 3, 4), (True, False, False, False, False), True),
        ((24, 3, 4), (True, False, False), True),
        ((24, 3, 4), (False, False, True), False),  # 24 is a number: with another batch it has other channels
        ((8, 36), (False, True), False),
        ((2, 2, 6, 3, 4), (False, True, False, False, False), False),  # the hints fit by chance
    ],
)
def test_a_free_batch_is_not_cut(sizes, free, has_layout):
    layout = layout_of(SIZES, 1, (True, False, False, False))
    assert (regroup(layout, sizes, free) is not None) == has_layout


def test_a_single_channel_keeps_its_place_before_what_follows():
    layout = layout_of((2, 1, 6), 1, fixed(range(3)))
    assert axes_of(regroup(layout, (2, 6), fixed(range(2)))) == [1]
    assert regroup(layout_of((2, 1), 1, fixed(range(2))), (2, 1, 1), fixed(range(3))) is None
