"""GHFP: its special cases, and what is hard-dead."""

import pytest
import torch
import torch.nn.functional as F

from cases.methods import (
    TOGETHER,
    assert_same,
    batches,
    chain,
    convs,
    copied,
    momentum,
    norms,
    run,
    sgd,
    snapshot,
    together,
    train_epoch,
)
from prunekernels import methods
from prunekernels.methods import GHFP, schedules

SOFT = {
    "sfp": (methods.SFP, {}),
    "asfp": (methods.ASFP, {"schedule": schedules.asymptotic}),
    "srfp": (methods.SRFP, {"alpha": 0.5}),
    "asrfp": (methods.ASRFP, {"alpha": 0.5, "schedule": schedules.asymptotic}),
}


@pytest.mark.parametrize("duty", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", SOFT)
def test_without_hard_filters_it_is_the_soft_method(name, duty):
    cls, options = SOFT[name]
    shared = {} if duty == 1 else together(cls)
    net, optimizer, method = run(cls, duty=duty, **shared)
    other, its_optimizer, its_method = run(GHFP, hard=0.0, duty=duty, **shared | options)
    assert_same(snapshot(net, optimizer), snapshot(other, its_optimizer))
    assert method.history == its_method.history


@pytest.mark.parametrize("norms", [False, True])
def test_all_hard_is_hard_filter_pruning(norms):
    """The weights of hard masking from the start; a hard-dead filter has no momentum."""
    net, _, method = run(GHFP, hard=1.0, norms=norms)
    other, _, _ = run(methods.SFP, duty=0.0, norms=norms, **TOGETHER)
    alive = [name for name, _ in net.named_parameters()]
    norm_of = {"1": "0", "4": "3", "7": "6"}
    for name in alive:
        a, b = net.get_parameter(name), other.get_parameter(name)
        layer = name.split(".")[0]
        if layer in norm_of and norms:  # those of a hard-dead filter are zero
            live = method.states[norm_of[layer]] == 0
            a, b = a[live], b[live]
        assert torch.equal(a, b), name
    assert all(counts.soft == 0 for epoch in method.history for counts in epoch.values())


def literal_hfp(net, epochs):
    """Zero by L2 once; gradients and momentum of those filters are zero from then on."""
    dead = {}
    for name, conv in convs(net).items():
        weakest = conv.weight.flatten(1).norm(dim=1).sort(stable=True).indices[: conv.out_channels // 2]
        dead[name] = weakest
        conv.weight.data[weakest] = 0
    optimizer = sgd(net)
    for epoch in range(epochs):
        for x, y in batches(epoch, torch.float64):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            for name, conv in convs(net).items():
                conv.weight.grad[dead[name]] = 0
            optimizer.step()


def test_all_hard_is_the_literal_loop():
    net = chain(dtype=torch.float64)
    other = copied(net)
    optimizer = sgd(net)
    method = GHFP(net, optimizer, 0.5, 10, hard=1.0, norms=False)
    for epoch in range(3):
        train_epoch(net, optimizer, epoch, method, dtype=torch.float64)
        method.end_epoch()
    literal_hfp(other, 3)
    for (name, a), b in zip(net.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)


def test_counts_follow_the_schedules():
    _, _, method = run(GHFP, 10, schedule=schedules.cubic)
    for epoch, counts in enumerate(method.history[:-1]):
        for name, K in (("0", 8), ("3", 12), ("6", 10)):
            share, hard = schedules.cubic(0.5, epoch, 10), schedules.cubic(1.0, epoch, 10)
            assert counts[name].live == K - int(K * share) and counts[name].hard == int(K * share * hard)
    assert all(counts.soft == 0 for counts in method.history[-1].values())


def test_hard_set_grows_and_stands_still():
    net = chain()
    optimizer = sgd(net)
    method = GHFP(net, optimizer, 0.5, 6)
    hard = {name: torch.zeros(m.out_channels, dtype=torch.bool) for name, m in convs(net).items()}
    for epoch in range(6):
        train_epoch(net, optimizer, epoch, method)
        for name, conv in convs(net).items():
            assert not conv.weight[hard[name]].any() and not momentum(optimizer, conv.weight)[hard[name]].any()
        method.end_epoch()
        for name, conv in convs(net).items():
            now = method.states[name] == 2
            assert bool((now | ~hard[name]).all()) and torch.equal(conv.hard_mask, ~now)
            hard[name] = now
    assert all(bool(h.any()) for h in hard.values())


def test_weakest_become_hard_first():
    net = chain()
    optimizer = sgd(net)
    method = GHFP(net, optimizer, 0.5, 10, alpha=1.0, alpha_schedule=schedules.constant)
    train_epoch(net, optimizer, 0, method)
    order = {name: conv.weight.detach().flatten(1).norm(dim=1).argsort() for name, conv in convs(net).items()}
    method.end_epoch()
    for name, counts in method.history[0].items():
        assert counts.hard > 0 and counts.soft > 0
        states = method.states[name][order[name]]
        assert states.tolist() == [2] * counts.hard + [1] * counts.soft + [0] * counts.live


def test_hard_filters_take_their_norms_along():
    net, optimizer, method = run(GHFP, 5)
    hard = method.states["3"] == 2
    norm = norms(net)["4"]
    assert torch.equal(norm.channel_mask, ~hard)
    for p in (norm.weight, norm.bias):
        assert not p[hard].any() and not momentum(optimizer, p)[hard].any() and p[~hard].abs().sum() > 0


@pytest.mark.parametrize("hard", [-0.1, 1.5, "all"])
def test_hard_share_is_checked(hard):
    net = chain()
    with pytest.raises(ValueError, match=r"GHFP: hard: expected a number in \[0, 1\] or a schedule, got"):
        GHFP(net, sgd(net), hard=hard)
