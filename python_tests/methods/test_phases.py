"""Which soft-dead filters are awake when: the arithmetic, without a network."""

import math

import pytest
import torch

from prunekernels.methods.phases import Phases

SOFT = [torch.tensor([False] + [True] * n + [False] * 3) for n in (20, 13, 3, 1, 0)]


def keys(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(len(mask), generator=generator) for mask in SOFT]


def turns(duty=0.2, steps=40, seed=0):
    phases = Phases(duty, "in_turns", steps)
    phases.deal(SOFT, keys(seed))
    return phases


def awake(phases, steps):
    """By unit, bool [steps, width]."""
    return [torch.stack(masks) for masks in zip(*(phases.awake(SOFT, step) for step in range(steps)), strict=True)]


@pytest.mark.parametrize("steps", [10, 40, 43, 312])
@pytest.mark.parametrize("duty", [0.5, 0.2, 0.15, 0.1])
def test_each_soft_dead_filter_is_awake_for_its_share_of_the_steps(duty, steps):
    for soft, woken in zip(SOFT, awake(turns(duty, steps), steps), strict=True):
        assert not bool(woken[:, ~soft].any())
        count, n = round(1 / duty), int(soft.sum())
        least = woken.sum(0)[soft]
        assert bool((least >= math.floor(steps / count)).all())
        if n and n % count == 0:
            assert bool((least <= math.ceil(steps / count)).all())


def test_groups_of_a_unit_are_of_one_size_and_cover_it():
    for soft, woken in zip(SOFT, awake(turns(), 40), strict=True):
        assert woken.sum(1).tolist() == [math.ceil(int(soft.sum()) / 5)] * 40
        assert torch.equal(woken.any(0), soft)
        for turn in woken.split(8):  # a turn lasts 40 / 5 steps
            assert bool((turn == turn[0]).all())


def test_groups_that_divide_have_no_filter_twice():
    assert bool((awake(turns(), 40)[0][::8].sum(0) <= 1).all())


def test_turns_are_as_long_as_each_other_but_for_a_step():
    phases = turns(0.2, 43)
    lengths = torch.bincount(torch.tensor([phases.at(step) for step in range(43)]))
    assert len(lengths) == 5 and int(lengths.max() - lengths.min()) <= 1


def test_a_longer_epoch_stays_in_the_last_turn():
    phases = turns(0.2, 10)
    assert [phases.at(step) for step in (8, 9, 10, 50)] == [4] * 4
    assert all(map(torch.equal, phases.awake(SOFT, 50), phases.awake(SOFT, 9)))


def test_a_shorter_epoch_than_there_are_turns():
    phases = turns(0.1, 4)
    assert [phases.at(step) for step in range(4)] == [0, 2, 5, 7]
    assert bool(awake(phases, 4)[0].any())


def test_the_deal_follows_the_keys_alone():
    first, again, other = turns(seed=0), turns(seed=0), turns(seed=1)
    assert all(map(torch.equal, awake(first, 40), awake(again, 40)))
    assert not torch.equal(awake(first, 40)[0], awake(other, 40)[0])
    first.deal(SOFT, keys(1))
    assert all(map(torch.equal, awake(first, 40), awake(other, 40)))


def test_what_is_no_longer_soft_does_not_wake():
    phases = turns()
    fewer = [mask & (torch.arange(len(mask)) < 4) for mask in SOFT]
    woken = [phases.awake(fewer, step) for step in range(40)]
    assert all(not bool((w & ~mask).any()) for step in woken for w, mask in zip(step, fewer, strict=True))
    assert all(bool(torch.stack([step[i] for step in woken])[:, mask].any()) for i, mask in enumerate(fewer[:4]))


@pytest.mark.parametrize("wake", ["together", "in_turns"])
def test_all_are_awake_while_the_length_of_an_epoch_is_not_known(wake):
    phases = Phases(0.2, wake, None)
    if phases.deals:
        phases.deal(SOFT, keys())
    assert not phases.wakes_none(0) and all(map(torch.equal, phases.awake(SOFT, 0), SOFT))
    assert len({phases.at(step) for step in range(50)}) == 1


def test_all_are_awake_in_turns_that_were_never_dealt():
    """As from a checkpoint that has no groups."""
    phases = Phases(0.2, "in_turns", 40)
    assert all(map(torch.equal, phases.awake(SOFT, 3), SOFT))


@pytest.mark.parametrize("wake", ["together", "in_turns"])
@pytest.mark.parametrize(("duty", "count"), [(0, 0), (1, 40)])
def test_never_and_always(wake, duty, count):
    phases = Phases(duty, wake, 40)
    assert not phases.deals
    for soft, woken in zip(SOFT, awake(phases, 40), strict=True):
        assert torch.equal(woken.sum(0), soft * count)


@pytest.mark.parametrize(("duty", "sparse"), [(0.5, 20), (0.25, 30), (0.01, 39)])
def test_together_is_the_end_of_the_epoch(duty, sparse):
    phases = Phases(duty, "together", 40)
    assert not phases.deals
    assert [phases.wakes_none(step) for step in range(40)] == [step < sparse for step in range(40)]
    assert [phases.at(step) for step in range(40)] == [int(step >= sparse) for step in range(40)]
    assert torch.equal(awake(phases, 40)[0].sum(0), SOFT[0] * (40 - sparse))


def test_state():
    phases, other = turns(), Phases(0.2, "in_turns", None)
    other.load_state_dict(phases.state_dict(), keeps_length=False)
    assert other.steps_per_epoch == 40
    assert all(map(torch.equal, awake(phases, 40), awake(other, 40)))
    phases.deal(SOFT, keys(1))  # the state is a copy
    assert not torch.equal(awake(phases, 40)[0], awake(other, 40)[0])
    other = Phases(0.2, "in_turns", 20)
    other.load_state_dict({"steps_per_epoch": 40}, keeps_length=True)  # an older one, without groups
    assert other.steps_per_epoch == 20 and all(map(torch.equal, other.awake(SOFT, 3), SOFT))
