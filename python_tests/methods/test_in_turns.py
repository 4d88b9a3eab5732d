"""Soft-dead filters that train along in turns: what sleeps stands still, what is awake trains, and some come back."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import prunekernels as pk
from cases.averages import TorchEmaOfBuffers
from cases.methods import (
    assert_same,
    batches,
    chain,
    convs,
    momentum,
    residual,
    run,
    sgd,
    share,
    snapshot,
    train,
    train_epoch,
    train_modes,
)
from cases.ranks import run_ranks
from prunekernels.methods import ASFP, CSGD, GHFP, PGP, SFP, SRFP, CoarsePruning, PruneWhileTraining, schedules

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(5))
TURNS = {"duty": 0.25, "steps_per_epoch": 4, "warm_up": 0, "fine_tune": 1}  # a turn is a step
NORMS = {"0": "1", "3": "4", "6": "7"}


def masked_sgd(net):
    return pk.optim.MaskedSGD(net.parameters(), 0.05, 0.9, weight_decay=1e-2)


def made(cls=SFP, net=None, optimizer=sgd, epochs=6, **options):
    net = chain() if net is None else net
    optimizer = optimizer(net)
    return net, optimizer, cls(net, optimizer, 0.5, epochs, **TURNS | options)


def held(net, optimizer):
    """By layer, all that belongs to its filters: [K, ...] each."""
    found = {}
    for name, norm in NORMS.items():
        conv, bn = net.get_submodule(name), net.get_submodule(norm)
        tensors = [conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var]
        tensors += [momentum(optimizer, p) for p in (conv.weight, bn.weight, bn.bias) if optimizer.state.get(p)]
        found[name] = [tensor.detach().clone() for tensor in tensors]
    return found


def test_masks_of_each_turn():
    """A group of each layer trains along, with its norms, and what reads it; all of them have had their turn in the
    end."""
    net, optimizer, method = made(example_input=IMAGES)
    for epoch in range(3):
        soft = {name: states == 1 for name, states in method.states.items()}
        seen = {name: [conv.filter_mask.clone()] for name, conv in convs(net).items()}

        def see(seen=seen):
            for name, conv in convs(net).items():
                seen[name].append(conv.filter_mask.clone())
                assert torch.equal(net.get_submodule(NORMS[name]).channel_mask, conv.filter_mask)
            assert torch.equal(net[3].input_mask, net[0].filter_mask)

        train_epoch(net, optimizer, epoch, method, see)
        for name, masks in seen.items():
            woken = torch.stack(masks[:4]) & soft[name]
            assert all(torch.equal(mask | soft[name], torch.ones_like(mask)) for mask in masks)
            assert woken.sum(1).tolist() == [-(-int(soft[name].sum()) // 4)] * 4
            assert torch.equal(woken.any(0), soft[name]) and bool(convs(net)[name].hard_mask.all())
        method.end_epoch()


@pytest.mark.parametrize("optimizer", [sgd, masked_sgd])
@pytest.mark.parametrize("live", [False, True])
def test_what_sleeps_stands_still_to_the_bit(live, optimizer):
    net, optimizer, method = made(net=pk.flow(chain(), live), optimizer=optimizer, example_input=IMAGES)
    train(net, optimizer, method, 1)
    before, moved = held(net, optimizer), {name: 0 for name in NORMS}
    net.train()
    for x, y in batches(1):
        asleep = {name: ~conv.filter_mask for name, conv in convs(net).items()}
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        method.step()
        after = held(net, optimizer)
        for name, rows in asleep.items():
            assert bool(rows.any()) and len(after[name]) == 8
            assert all(torch.equal(a[rows], b[rows]) for a, b in zip(after[name], before[name], strict=True))
            awake = (method.states[name] == 1) & ~rows
            moved[name] += int((after[name][0] != before[name][0])[awake].flatten(1).any(1).sum())
        before = after
    assert all(moved[name] >= int((method.states[name] == 1).sum()) for name in NORMS)  # each had its turn


def test_a_pruning_changes_no_weight_that_stays_soft():
    """The tuned alpha of SFP is 1; that of SRFP shortens, and keeps direction and momentum."""
    for cls, factor in ((SFP, 1.0), (SRFP, 0.5)):
        net, optimizer, method = made(cls)
        train_epoch(net, optimizer, 0, method)
        before = held(net, optimizer)["3"]
        method.end_epoch()
        soft, after = method.states["3"] == 1, held(net, optimizer)["3"]
        assert torch.equal(after[0][soft], before[0][soft] * factor) and bool(soft.any())
        assert all(torch.equal(a, b) for a, b in zip(after[1:], before[1:], strict=True))


def test_filters_come_back_in_turns():
    """At the end of the first of these epochs one of the soft-dead has the longest weights of its layer."""
    net, optimizer, method = made()
    train_epoch(net, optimizer, 0, method)
    worst = int((method.states["3"] == 1).nonzero()[0])
    net[3].weight.data[worst] *= 100
    counts = method.end_epoch()
    assert counts["3"].returned >= 1 and int(method.states["3"][worst]) == 0
    assert counts["3"].live == 6


def test_none_comes_back_while_fine_tuning():
    net, optimizer, method = made(epochs=2)
    train(net, optimizer, method, 1)
    assert method.finished and all(int((s == 1).sum()) == 0 for s in method.states.values())
    states = method.states
    net[3].weight.data[0] *= 100
    train(net, optimizer, method, 1)
    assert all(torch.equal(states[name], now) for name, now in method.states.items())


@pytest.mark.parametrize("cls", [SFP, GHFP])
def test_masks_are_set_where_a_turn_begins_and_nowhere_else(cls):
    net, optimizer, method = made(cls, steps_per_epoch=16, epochs=3, fine_tune=1, example_input=IMAGES)
    calls = []
    original = method.channel_masks.set_masks
    method.channel_masks.set_masks = lambda *args: (calls.append(method.steps), original(*args))
    for _ in range(16):
        method.step()
    assert calls == [4, 8, 12]
    for _ in range(2):
        method.end_epoch()
    assert method.finished
    calls.clear()
    for _ in range(16):
        method.step()
    assert not calls


def test_no_mask_is_set_in_the_warm_up():
    net, _, method = made(warm_up=2, example_input=IMAGES)
    calls = []
    method.channel_masks.set_masks = lambda *args: calls.append(args)
    for _ in range(4):
        method.step()
    assert not calls


@pytest.mark.parametrize("network", [chain, residual])
def test_compacted_and_live_are_masked_mode(network):
    runs = []
    for mode in ("masked", "live", "compacted"):
        net = pk.flow(network().double(), mode == "live")
        options = {"example_input": IMAGES.double(), "coupling": "joint"}
        runs.append(made(net=net, mode="compacted" if mode == "compacted" else "masked", **options))
    for epoch in range(3):
        assert train_modes([method for *_, method in runs], epoch) == 4
        counts = [method.end_epoch() for *_, method in runs]
        assert counts[0] == counts[1] == counts[2]
        runs[2][2].leave()
    states = [snapshot(*each[:2]) for each in runs]
    for name, expected in states[0].items():
        for other in states[1:]:
            torch.testing.assert_close(other[name], expected, rtol=1e-8, atol=1e-10, msg=name)


def test_followers_have_the_masks_of_each_turn():
    net = chain()
    average = TorchEmaOfBuffers(net).holder
    net, optimizer, method = made(net=net, example_input=IMAGES, followers=[average])
    masks = []

    def see():
        masks.append(net[3].filter_mask.clone())
        average.update_parameters(net)
        assert torch.equal(average.module[3].filter_mask, net[3].filter_mask)
        assert torch.equal(average.module[4].channel_mask, net[4].channel_mask)

    train_epoch(net, optimizer, 0, method, see)
    assert any(not torch.equal(a, b) for a, b in zip(masks, masks[1:], strict=False))


def test_masked_in_the_middle_of_a_turn():
    net, optimizer, method = made(example_input=IMAGES)
    seen = []

    def see():
        before = net[3].filter_mask.clone()
        with method.masked():
            assert torch.equal(net[3].filter_mask, method.states["3"] == 0)
            assert torch.equal(net[4].channel_mask, method.states["3"] == 0)
        assert torch.equal(net[3].filter_mask, before)
        seen.append(before)

    train_epoch(net, optimizer, 0, method, see)
    assert len(seen) == 4 and not torch.equal(seen[0], seen[1])


# ---- checkpoints


def saved(*things):
    held = io.BytesIO()
    torch.save([thing.state_dict() for thing in things], held)
    held.seek(0)
    return torch.load(held, weights_only=True)


def some_steps(method, epoch, first, last):
    for x, y in list(batches(epoch, torch.float64, last))[first:]:
        net, opt = method.net, method.opt
        net.train()
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        opt.step()
        method.step()


@pytest.mark.parametrize("cls", [SFP, GHFP, SRFP])
@pytest.mark.parametrize("mode", ["masked", "compacted"])
@pytest.mark.parametrize("at", [3, 4])  # in the middle of a turn of two steps, and between two
def test_resumes_to_the_bit_in_an_epoch(cls, mode, at):
    def new(seed):
        net = chain(seed, dtype=torch.float64)
        return made(cls, net, mode=mode, steps_per_epoch=8, example_input=IMAGES.double())

    first, second = new(0), new(1)
    some_steps(first[2], 0, 0, 8)
    first[2].end_epoch()
    some_steps(first[2], 1, 0, at)
    for thing, state in zip(second, saved(*first), strict=True):
        thing.load_state_dict(state)
    assert torch.equal(first[0][3].filter_mask, second[0][3].filter_mask)
    for *_, method in (first, second):
        for epoch in (1, 2):
            some_steps(method, epoch, at if epoch == 1 else 0, 8)
            method.end_epoch()
        method.leave()
    assert_same(snapshot(*first[:2]), snapshot(*second[:2]))
    assert first[2].history == second[2].history


def test_a_state_without_groups_wakes_all_until_the_next_pruning():
    net, optimizer, method = made()
    state = method.state_dict()
    del state["orders"]
    state["criterion"] = {}
    other, its_optimizer, resumed = made(net=chain(1))
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(state)
    assert bool(other[3].filter_mask.all()) and int((resumed.states["3"] == 1).sum()) == 6
    train(other, its_optimizer, resumed, 1)
    assert int((~other[3].filter_mask).sum()) == 4  # 6 are dead, 2 of them awake


def of_rank(rank, world):
    """By step, all filter masks, of a rank with a seed and images of its own."""
    net, optimizer, method = made(seed=rank, net=residual(), coupling="joint", example_input=IMAGES)
    model = torch.nn.parallel.DistributedDataParallel(net)
    masks = []
    for epoch in range(2):
        for x, y in share(epoch, rank, world):
            masks.append(torch.cat([conv.filter_mask for conv in convs(net).values()]))
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            method.step()
        method.end_epoch()
    return torch.stack(masks)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed")
def test_ranks_wake_the_same_filters_whatever_their_seeds():
    first, second = run_ranks(of_rank, 2, 2)
    assert torch.equal(first, second) and not torch.equal(first[0], first[1])


# ---- warm-up


@pytest.mark.parametrize("cls", [SFP, ASFP, GHFP, PGP])
def test_nothing_is_dead_in_the_warm_up(cls):
    net, optimizer, method = made(cls, warm_up=2, epochs=6, fine_tune=1)
    weights = copy.deepcopy(net.state_dict())
    assert all(torch.equal(weights[name], tensor) for name, tensor in chain().state_dict().items())
    train(net, optimizer, method, 1)
    assert all(counts.live == len(method.states[name]) for name, counts in method.history[0].items())
    assert all(bool(conv.filter_mask.all()) for conv in convs(net).values())
    train(net, optimizer, method, 4, 1)
    assert method.finished and [c.hard for c in method.history[-1].values()] == [4, 6, 5]


def test_sfp_prunes_as_the_warm_up_ends():
    _, _, method = run(SFP, 3, total=8, duty=0.25, steps_per_epoch=4)  # tuned: warm_up is 2, of 8
    assert [counts["3"].soft for counts in method.history] == [0, 6, 6]


def test_schedules_run_over_what_the_warm_up_leaves():
    _, _, method = made(SFP, epochs=9, warm_up=2, fine_tune=1, schedule=schedules.cubic)
    shares = [method.pruned_share(epoch) for epoch in range(8)]
    assert shares == [0.0] + [schedules.cubic(0.5, epoch, 6) for epoch in range(-1, 6)]
    _, _, method = made(SRFP, epochs=9, warm_up=2, fine_tune=1, alpha_schedule=schedules.linear)
    weight = method.layers["3"].weight
    for epoch, factor in ((1, 0.0), (2, 1 / 12), (4, 0.25)):
        weight.data.fill_(1.0)
        with torch.no_grad():
            method.soften("3", torch.tensor([2]), epoch)
        torch.testing.assert_close(weight[2], torch.full_like(weight[2], factor))


def test_the_hard_share_runs_over_what_the_warm_up_leaves():
    _, _, method = run(GHFP, 7, total=8, **TURNS | {"warm_up": 3})
    expected = [schedules.cubic(1.0, epoch, 4) for epoch in range(-1, 3)]
    hard = [int(12 * 0.5 * share) for share in expected]
    assert [counts["3"].hard for counts in method.history] == [0, 0, *hard, 6]


@pytest.mark.parametrize("value", [-1, 5, 2.5, "x"])
def test_a_wrong_warm_up(value):
    error = f"SFP: warm_up: expected fewer than the 5 epochs before fine tuning, got {value}"
    with pytest.raises(ValueError, match=error):
        made(epochs=6, warm_up=value)


@pytest.mark.parametrize("cls", [PruneWhileTraining, CoarsePruning, CSGD])
def test_methods_with_a_start_have_no_warm_up(cls):
    net, data = chain(), list(batches(9, steps=1))
    more = {"data": data} if cls is CoarsePruning else {"example_input": IMAGES} if cls is CSGD else {}
    error = f"{cls.__name__}: warm_up: expected None or 0, as start says when filters go, got 2"
    with pytest.raises(ValueError, match=error):
        cls(net, sgd(net), 0.5, 6, warm_up=2, **more)


@pytest.mark.parametrize("wake", ["both", True, 3])
def test_a_wrong_wake(wake):
    with pytest.raises(ValueError, match="SFP: wake: expected one of together, in_turns, got"):
        made(wake=wake)
