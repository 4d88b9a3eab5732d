"""SFP and its kin against loops written out here."""

import pytest
import torch
import torch.nn.functional as F

import prunekernels as pk
from cases.methods import (
    TOGETHER,
    assert_same,
    batches,
    chain,
    convs,
    copied,
    momentum,
    run,
    sgd,
    snapshot,
    train,
    train_epoch,
)
from prunekernels import methods
from prunekernels.methods import schedules

EPOCHS, TOTAL = 3, 10


@torch.no_grad()
def prune_by_l2(net, share, alpha=0.0):
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            K = module.out_channels
            weakest = module.weight.flatten(1).norm(dim=1).sort(stable=True).indices[: int(K * share)]
            keep = torch.ones(K)
            keep[weakest] = alpha
            module.weight.mul_(keep.view(-1, 1, 1, 1))


def literal_loop(net, share=lambda t: 0.5, alpha=lambda t: 0.0, **options):
    """Prune, then train every filter freely, and so on: nothing but plain layers."""
    optimizer = sgd(net, **options)
    prune_by_l2(net, share(-1), alpha(0))
    for epoch in range(EPOCHS):
        net.train()
        for x, y in batches(epoch):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        prune_by_l2(net, share(epoch), alpha(epoch))
    return snapshot(net, optimizer)


def plain(**options):
    net = chain(**options)
    pk.restore(net)
    return net


def alpha_of(start):
    return lambda t: schedules.decay(start, t, TOTAL)


def rising(t):
    return schedules.asymptotic(0.5, t, TOTAL, full_from=0.9)


LETTER = {
    "sfp": (methods.SFP, {}, lambda t: 0.5, lambda t: 0.0),
    "asfp": (methods.ASFP, {}, rising, lambda t: 0.0),
    "srfp": (methods.SRFP, {}, lambda t: 0.5, alpha_of(0.5)),
    "asrfp": (
        methods.ASRFP,
        {"alpha": 1.0},
        rising,
        alpha_of(1.0),
    ),
}


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("name", LETTER)
def test_duty_1_is_the_literal_loop(name, nesterov):
    cls, options, share, alpha = LETTER[name]
    net, optimizer, _ = run(cls, EPOCHS, optimizer=lambda net: sgd(net, nesterov=nesterov), total=TOTAL, **options)
    expected = literal_loop(plain(), share, alpha, nesterov=nesterov)
    assert_same(snapshot(net, optimizer), expected)
    assert any(name.endswith("'") for name in expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_sfp_is_literal_with_biases_and_masked_optimizers(bias, masked):
    def optimizer(net):
        if not masked:
            return sgd(net)
        return pk.optim.MaskedSGD(net.parameters(), 0.05, 0.9, weight_decay=1e-2)

    net, made, _ = run(methods.SFP, EPOCHS, net=chain(bias=bias), optimizer=optimizer)
    assert_same(snapshot(net, made), literal_loop(plain(bias=bias)))


def test_the_last_epoch_ends_like_the_literal_loop():
    net, _, method = run(methods.SFP, EPOCHS, total=EPOCHS)
    expected = literal_loop(plain())
    assert method.finished
    for name, conv in convs(net).items():
        assert torch.equal(conv.weight, expected[f"{name}.weight"])


def test_no_filter_is_masked_in_training_with_duty_1():
    net = chain()
    optimizer = sgd(net)
    method = methods.SFP(net, optimizer, 0.5, TOTAL)
    masks = []
    train_epoch(net, optimizer, 0, method, lambda: masks.extend(bool(m.filter_mask.all()) for m in convs(net).values()))
    assert all(masks)
    method.end_epoch()
    assert all(bool(m.filter_mask.all()) for m in convs(net).values())


def test_prunes_before_the_first_epoch_and_keeps_momentum_after():
    net = chain()
    optimizer = sgd(net)
    method = methods.SFP(net, optimizer, 0.5, TOTAL)
    dead = {name: method.states[name] == 1 for name in convs(net)}
    assert [int(d.sum()) for d in dead.values()] == [4, 6, 5]
    assert all(not conv.weight[dead[name]].any() for name, conv in convs(net).items())
    train(net, optimizer, method, 1)
    dead = method.states["3"] == 1
    assert not net[3].weight[dead].any() and momentum(optimizer, net[3].weight)[dead].abs().sum() > 0


def test_filters_come_back():
    _, _, method = run(methods.SFP, 5, criterion="random")
    assert sum(counts.returned for epoch in method.history for counts in epoch.values()) > 0


def test_scaled_norms():
    net = chain()
    before = copied(net)
    method = methods.SRFP(net, sgd(net), 0.5, TOTAL, scale_norms=True, example_input=torch.randn(1, 3, 6, 6))
    dead = method.states["0"] == 1
    torch.testing.assert_close(net[1].bias, torch.where(dead, 0.5, 1.0) * before[1].bias)
    torch.testing.assert_close(net[1].weight, torch.where(dead, 0.5, 1.0) * before[1].weight)
    torch.testing.assert_close(net[0].weight[dead], before[0].weight[dead] * 0.5)


class TestDuty0:
    """Hard masking: the first set stays for ever."""

    @pytest.mark.parametrize("with_graph", [False, True])
    @pytest.mark.parametrize("flow", [False, True])
    def test_dead_filters_stand_still(self, flow, with_graph):
        net = pk.flow(chain(), flow)
        example = torch.randn(1, 3, 6, 6) if with_graph else None
        _, optimizer, method = run(methods.SRFP, 3, net=net, duty=0.0, alpha=1.0, example_input=example, warm_up=0,
                                   criterion="l2", alpha_schedule=schedules.constant)  # fmt: skip
        fresh = chain()
        for name, conv in convs(net).items():
            dead = method.states[name] == 1
            assert torch.equal(conv.filter_mask, ~dead) and bool(conv.hard_mask.all())
            assert torch.equal(conv.weight[dead], convs(fresh)[name].weight[dead])  # no decay, no momentum
            assert not momentum(optimizer, conv.weight)[dead].any()
            assert bool((conv.weight[~dead] != convs(fresh)[name].weight[~dead]).any())
        assert torch.equal(net[1].channel_mask, net[0].filter_mask)
        assert torch.equal(net[3].input_mask, net[0].filter_mask if with_graph else torch.ones(8, dtype=torch.bool))
        assert all(counts.returned == 0 for epoch in method.history for counts in epoch.values())

    def test_it_is_training_the_network_of_the_others(self):
        """norms=False: a network whose filters are zero and get no gradient."""
        net, other = chain(dtype=torch.float64), chain(dtype=torch.float64)
        its_optimizer = sgd(net)
        method = methods.SFP(net, its_optimizer, 0.5, TOTAL, duty=0.0, norms=False, **TOGETHER)
        train(net, its_optimizer, method, 3, dtype=torch.float64)
        pk.restore(other)
        optimizer = sgd(other)
        prune_by_l2(other, 0.5)
        dead = {name: ~m.weight.flatten(1).any(1) for name, m in other.named_modules() if hasattr(m, "kernel_size")}
        dead = {name: d for name, d in dead.items() if name in convs(net)}
        for epoch in range(3):
            for x, y in batches(epoch, torch.float64):
                optimizer.zero_grad()
                F.cross_entropy(other(x), y).backward()
                for name, rows in dead.items():
                    other.get_submodule(name).weight.grad[rows] = 0
                optimizer.step()
        for (name, a), b in zip(net.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)


class TestPhases:
    def watch(self, duty, steps_per_epoch=4, epochs=2):
        net = chain()
        optimizer = sgd(net)
        options = {"duty": duty, "steps_per_epoch": steps_per_epoch, **TOGETHER}
        method = methods.SFP(net, optimizer, 0.5, TOTAL, **options)
        sparse = []
        for epoch in range(epochs):
            for x, y in batches(epoch):
                sparse.append(not bool(net[0].filter_mask.all()))
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
                method.step()
            method.end_epoch()
        return sparse

    @pytest.mark.parametrize(("duty", "sparse"), [(1.0, 0), (0.75, 1), (0.5, 2), (0.25, 3), (0.01, 3), (0.0, 4)])
    def test_sparse_phase_comes_first(self, duty, sparse):
        assert self.watch(duty) == [step < sparse for step in range(4)] * 2

    def test_length_of_an_epoch_is_learnt(self):
        assert self.watch(0.5, None, 3) == [False] * 4 + [True, True, False, False] * 2

    def test_a_longer_epoch_is_dense_at_its_end(self):
        assert self.watch(0.5, 2) == [True, False, False, False] * 2

    def test_momentum_waits_through_the_sparse_phase(self):
        net = chain()
        optimizer = sgd(net)
        method = methods.SFP(net, optimizer, 0.5, TOTAL, duty=0.5, steps_per_epoch=4, **TOGETHER)
        train(net, optimizer, method, 2)
        dead = method.states["3"] == 1
        held = momentum(optimizer, net[3].weight)[dead].clone()
        assert held.abs().sum() > 0
        moved = []
        train_epoch(net, optimizer, 2, method, lambda: moved.append(
            (not torch.equal(momentum(optimizer, net[3].weight)[dead], held), bool(net[3].weight[dead].any()))
        ))  # fmt: skip
        assert moved == [(False, False), (False, False), (True, True), (True, True)]
