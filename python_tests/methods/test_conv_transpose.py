"""Methods on transposed convolutions, whose weights have filters in the second dimension."""

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.conv import assert_zero
from cases.decoders import Adding, UNet
from prunekernels.methods import criteria

X = torch.randn(2, 3, 8, 8)


def made(method, net=UNet, optimizer=torch.optim.SGD, **options):
    torch.manual_seed(0)
    net = net()
    pk.convert(net)
    options = {"rate": 0.5, "epochs": 3, "example_input": X} | options
    momentum = {"momentum": 0.9} if issubclass(optimizer, torch.optim.SGD) else {}
    trained = optimizer(net.parameters(), lr=0.05, **momentum)
    return net, getattr(pk.methods, method)(net, trained, **options)


def epoch(method, steps=2):
    for _ in range(steps):
        method.opt.zero_grad()
        method.net(X).square().mean().backward()
        method.opt.step()
        method.step()
    return method.end_epoch()


@pytest.mark.parametrize(
    ("name", "optimizer", "options"),
    [
        ("SFP", torch.optim.SGD, {"coupling": "joint"}),
        ("SFP", pk.optim.MaskedSGD, {"duty": 0.5, "steps_per_epoch": 2}),
        ("GHFP", torch.optim.AdamW, {"coupling": "joint", "mode": "compacted"}),
        ("GHFP", pk.optim.MaskedAdamW, {}),
        ("PGP", torch.optim.SGD, {"coupling": "joint", "mode": "compacted"}),
        ("ASRFP", torch.optim.SGD, {}),
        ("PruneWhileTraining", torch.optim.SGD, {"coupling": "joint"}),
    ],
    ids=str,
)
def test_methods_train_a_unet(name, optimizer, options):
    net, method = made(name, optimizer=optimizer, **options)
    assert {"up1", "up2"} <= set(method.layers) and set(method.left_out) == {"head"}
    for _ in range(3):
        counts = epoch(method)
    method.leave()
    assert counts["up1"].live < 8 and counts["up2"].live < 16
    for up in (net.up1, net.up2):
        dead = ~(up.filter_mask & up.hard_mask)
        assert 0 < int(dead.sum()) < len(dead)
        assert_zero(up.weight[:, ~up.hard_mask])
    torch.testing.assert_close(pk.shrink(net.eval(), X)(X), net(X))


def test_soft_filters_are_zeroed_by_their_dimension():
    net, method = made("SFP", epochs=1)
    before = net.up1.weight.detach().clone()
    order = before.transpose(0, 1).flatten(1).norm(dim=1).argsort()
    method.end_epoch()
    dead, live = order[:4], order[4:]
    assert not net.up1.filter_mask[dead].any() and net.up1.filter_mask[live].all()
    assert_zero(net.up1.weight[:, dead])
    assert torch.equal(net.up1.weight[:, live], before[:, live])


def test_momentum_of_hard_filters_is_forgotten():
    net, method = made("PGP", remove=1.0)
    epoch(method)
    method.leave()
    dead = ~net.up2.hard_mask
    momentum = method.optimizer.state[net.up2.weight]["momentum_buffer"]
    assert dead.any() and not momentum[:, dead].any() and momentum[:, ~dead].any()


SCORES = {
    "l1": lambda w, grads: w.abs().sum(1),
    "l2": lambda w, grads: w.norm(dim=1),
    "geometric_median": lambda w, grads: torch.cdist(w, w).sum(1),
    "gradient_norms": lambda w, grads: sum(g.abs().sum(1) for g in grads),
    "gradient_sum": lambda w, grads: sum(grads).abs().sum(1),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_those_of_filters(name):
    net, method = made("SFP", criterion=name)
    grads = []
    for _ in range(2):
        method.opt.zero_grad()
        net(X).square().mean().backward()
        grads.append(net.up2.weight.grad.transpose(0, 1).flatten(1).clone())
        method.opt.step(), method.step()
    weight = net.up2.weight.detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(method.criterion.scores()["up2"], SCORES[name](weight, grads), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, pk.optim.MaskedSGD])
@pytest.mark.parametrize("mode", ["masked", "compacted"])
def test_update_norms(mode, optimizer):
    net, method = made("SFP", optimizer=optimizer, criterion="update_norm", mode=mode)
    before = net.up2.weight.detach().clone()
    method.opt.zero_grad()
    method.net(X).square().mean().backward()
    method.opt.step(), method.step()
    method.leave()
    change = (net.up2.weight - before).detach().transpose(0, 1).flatten(1).abs().sum(1)
    torch.testing.assert_close(method.criterion.scores()["up2"], change, rtol=1e-4, atol=1e-5)


def test_mean_activation_and_taylor():
    for criterion in (criteria.MeanActivation(), "taylor", "credited_l2"):
        net, method = made("SFP", criterion=criterion)
        assert epoch(method)["up2"].live == 8


@pytest.mark.parametrize("name", ["CSGD", "FPAGL"])
def test_merging_leaves_them_out(name):
    net, method = made(name)
    assert {"up1", "up2"} <= set(method.left_out) and "first.0" in method.layers
    for _ in range(3):
        epoch(method)
    assert net.up1.filter_mask.all()
    torch.testing.assert_close(pk.shrink(net.eval(), X)(X), net(X))


@pytest.mark.parametrize("coupling", ["independent", "joint"])
def test_groups_are_left_out(coupling):
    net, method = made(
        "SFP", net=lambda: nn.Sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 3, 1), Adding(4)), coupling=coupling
    )
    assert "in groups" in method.left_out["2.up"]
    assert ("meets 2.up" in method.left_out["2.high"]) if coupling == "joint" else ("2.high" in method.layers)
    epoch(method)


@pytest.mark.parametrize("budget", ["flops", "params"])
def test_budgets_count_transposed_convolutions(budget):
    net, method = made("SFP", budget={budget: 0.5}, coupling="joint", epochs=1)
    method.end_epoch()
    small, dense = pk.shrink(net.eval(), X), UNet()
    measure = {
        "flops": lambda n: pk.count_flops(n, X).dense,
        "params": lambda n: sum(p.numel() for p in n.parameters()),
    }[budget]
    assert 0.3 < measure(small) / measure(dense) <= 0.5


def test_rate_for_is_that_of_the_small_network():
    net = UNet()
    pk.convert(net)
    rate = pk.rate_for(net, X, flops=0.5)
    assert 0.1 < rate < 0.6


def test_checkpoints():
    net, method = made("PGP")
    epoch(method)
    state, weights = method.state_dict(), net.state_dict()
    other, again = made("PGP")
    other.load_state_dict(weights)
    again.load_state_dict(state)
    assert torch.equal(other.up1.filter_mask, net.up1.filter_mask)
    assert isinstance(net.up1, nn.ConvTranspose2d)
