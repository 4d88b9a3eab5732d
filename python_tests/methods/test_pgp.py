"""PGP and RPGP against a loop that rebuilds a smaller network after each epoch."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cases.methods import batches, chain, convs, momentum, norms, residual, run, sgd, train_epoch
from prunekernels.methods import PGP, RPGP, schedules

CONVS, NORMS, WIDTHS = ("0", "3", "6"), ("1", "4", "7"), (8, 12, 10)


def small_copy(net, optimizer, keep, reset):
    """A network of the filters that stay, and an optimizer with their momenta."""
    state = {p: optimizer.state[p]["momentum_buffer"] for p in net.parameters()}
    layers, C, columns = [], 3, torch.arange(3)
    momenta = []
    for i in range(3):
        conv, norm = net[3 * i], net[3 * i + 1]
        for t in (conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var):
            t.data[reset[i]] = 0
            if t in state:
                state[t][reset[i]] = 0
        rows, K = keep[i], len(keep[i])
        new, new_norm = nn.Conv2d(C, K, 3, padding=1, bias=False).double(), nn.BatchNorm2d(K).double()
        new.weight.data = conv.weight.data[rows][:, columns].clone()
        momenta.append((new.weight, state[conv.weight][rows][:, columns].clone()))
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(new_norm, name).data = getattr(norm, name).data[rows].clone()
            if name in ("weight", "bias"):
                momenta.append((getattr(new_norm, name), state[getattr(norm, name)][rows].clone()))
        layers += [new, new_norm, nn.ReLU()]
        C, columns = K, rows
    fc = nn.Linear(C, 4).double()
    fc.weight.data, fc.bias.data = net[11].weight.data[:, columns].clone(), net[11].bias.data.clone()
    momenta += [(fc.weight, state[net[11].weight][:, columns].clone()), (fc.bias, state[net[11].bias].clone())]
    small = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), fc)
    made = sgd(small)
    for p, v in momenta:
        made.state[p]["momentum_buffer"] = v
    return small, made


def literal_loop(real, epochs, rate, R, off_by_one):
    """The released algorithm with its traps removed. Returns the network and each layer's surviving filters."""
    net = chain(dtype=torch.float64)
    net = nn.Sequential(*[_plain(m) for m in net])
    optimizer = sgd(net)
    alive = [torch.arange(K) for K in WIDTHS]
    for e in range(1, epochs + 1):
        sums = [torch.zeros_like(net[3 * i].weight) for i in range(3)]
        for x, y in batches(e - 1, torch.float64):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            for i in range(3):
                grad = net[3 * i].weight.grad
                sums[i] += grad.abs() if real else grad
            optimizer.step()
        keep, reset = [], []
        for i, C0 in enumerate(WIDTHS):
            current = len(alive[i])
            score = sums[i].abs().sum((1, 2, 3))
            remain = C0 * (1 - rate) ** ((e + off_by_one) / epochs)
            weak = score.sort(stable=True).indices[: min(int(current - remain), current - 1)]
            removed = int(len(weak) * (1.0 if e == epochs else R))
            gone = set(weak[:removed].tolist())
            keep.append(torch.tensor([j for j in range(current) if j not in gone]))
            reset.append(weak[removed:])
            alive[i] = alive[i][keep[i]]
        net, optimizer = small_copy(net, optimizer, keep, reset)
    return net, optimizer, alive


def _plain(module):
    if hasattr(module, "to_conv"):
        return module.to_conv()
    return module.to_norm() if hasattr(module, "to_norm") else module


@pytest.mark.parametrize("off_by_one", [False, True])
@pytest.mark.parametrize("R", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("cls", [PGP, RPGP])
def test_masks_are_the_released_algorithm(cls, R, off_by_one):
    net = chain(dtype=torch.float64)
    optimizer = sgd(net)
    method = cls(net, optimizer, 0.6, 4, remove=R, off_by_one=off_by_one, fine_tune=0)
    for epoch in range(4):
        train_epoch(net, optimizer, epoch, method, dtype=torch.float64)
        method.end_epoch()
    small, its_optimizer, alive = literal_loop(cls is RPGP, 4, 0.6, R, off_by_one)
    columns = torch.arange(3)
    for i, name in enumerate(CONVS):
        rows = (method.states[name] == 0).nonzero().flatten()
        assert torch.equal(rows, alive[i])
        conv, norm = net[3 * i], net[3 * i + 1]
        close(conv.weight[rows][:, columns], small[3 * i].weight)
        close(momentum(optimizer, conv.weight)[rows][:, columns], momentum(its_optimizer, small[3 * i].weight))
        close(norm.bias[rows], small[3 * i + 1].bias)
        close(norm.running_var[rows], small[3 * i + 1].running_var)
        columns = rows
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    close(net.eval()(x), small.eval()(x))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def after_one_epoch(cls=PGP, **options):
    net = chain(bias=True)
    optimizer = sgd(net)
    method = cls(net, optimizer, 0.5, 2, fine_tune=0, **options)
    train_epoch(net, optimizer, 0, method)
    method.end_epoch()
    return net, optimizer, method


@pytest.mark.parametrize("cls", [PGP, RPGP])
def test_reset_and_removed_filters(cls):
    net, optimizer, method = after_one_epoch(cls)
    for name, norm in zip(CONVS, NORMS, strict=True):
        conv, norm, states = convs(net)[name], norms(net)[norm], method.states[name]
        reset, live = states == 1, states == 0
        assert bool(reset.any()) and bool((states == 2).any())
        for p in (conv.weight, conv.bias, norm.weight, norm.bias):
            assert not p[~live].any() and not momentum(optimizer, p)[~live].any()
            assert bool(momentum(optimizer, p)[live].any())
        assert not norm.running_mean[reset].any() and not norm.running_var[reset].any()
        assert torch.equal(conv.filter_mask, states != 2) and torch.equal(norm.channel_mask, states != 2)


@pytest.mark.parametrize(("remove", "hard"), [(0.0, 0), (0.5, 1), (1.0, 3)])
def test_remove_share(remove, hard):
    method = after_one_epoch(remove=remove)[2]
    weak = 12 - math.ceil(12 * 0.5**0.5)
    assert method.history[0]["3"][:3] == (12 - weak, weak - hard, hard) and weak == 3


def test_reset_filters_are_the_next_to_go():
    net, optimizer, method = after_one_epoch()
    reset = {name: states == 1 for name, states in method.states.items()}
    train_epoch(net, optimizer, 1, method)
    assert all(not method.criterion.scores()[name][rows].any() for name, rows in reset.items())
    method.end_epoch()
    assert all(bool((method.states[name][rows] == 2).all()) for name, rows in reset.items())


def test_linear_schedule():
    _, _, method = run(PGP, 3, total=4, schedule=schedules.linear, rate=0.5, fine_tune=0)
    assert [epoch["0"].live for epoch in method.history] == [7, 6, 5]


@pytest.mark.parametrize(("epochs", "pruning"), [(1, 1), (2, 1), (3, 1), (20, 7), (30, 10)])
def test_by_default_two_thirds_of_the_epochs_only_train(epochs, pruning):
    """10 and 20 in the released code."""
    _, _, method = run(PGP, pruning, total=epochs)
    assert method.finished and method.epochs == pruning
    assert all(counts.soft == 0 and counts.hard == counts.live for counts in method.history[-1].values())


def test_off_by_one_prunes_more():
    lives = [run(PGP, 2, total=2, fine_tune=0, off_by_one=flag)[2].history[-1]["3"].live for flag in (False, True)]
    assert lives == [6, 5]


def test_joint_filters_are_scored_together():
    net = residual()
    optimizer = sgd(net)
    method = PGP(net, optimizer, 0.5, 1, coupling="joint", example_input=torch.randn(1, 3, 6, 6))
    train_epoch(net, optimizer, 0, method)
    scores = method.criterion.scores()
    method.end_epoch()
    order = sum(scores[name] / scores[name].mean() for name in ("stem", "second")).argsort()
    assert torch.equal(method.states["stem"], method.states["second"])
    assert bool((method.states["stem"][order[:4]] == 2).all()) and not method.states["stem"][order[4:]].any()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"remove": 1.5}, r"PGP: remove: expected a number in \[0, 1\], got 1.5"),
        ({"remove": "all"}, r"PGP: remove: expected a number in \[0, 1\], got all"),
        ({"schedule": "linear"}, "PGP: schedule: expected a function .*, got 'linear'"),
        (
            {"schedule": schedules.linear, "off_by_one": True},
            "PGP: off_by_one: expected False with a schedule, got True",
        ),
    ],
)
def test_bad_input(options, error):
    net = chain()
    with pytest.raises(ValueError, match=error):
        PGP(net, sgd(net), **options)
