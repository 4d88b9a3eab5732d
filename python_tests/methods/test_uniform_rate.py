"""rate_for, and budgets of what is left: the same rate in each layer, at which a share of the cost is left."""

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.methods import EVERY, chain, residual, run, sgd, train
from prunekernels.graph.shrink import shrink
from prunekernels.methods import CSGD, GHFP, PruneWhileTraining, uniform_rate
from prunekernels.train.models import build

IMAGES = torch.randn(2, 3, 6, 6)


def network(name, **options):
    torch.manual_seed(0)
    return build(name, 10, **options)


def left_of(net, images, kind):
    """The share that is left of a network whose masks are set."""
    small = shrink(net, images)
    if kind == "flops":
        return pk.count_flops(small, images).dense / pk.count_flops(net, images).dense
    return sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in net.parameters())


def pruned(net, images, rate, **options):
    method = PruneWhileTraining(net, sgd(net), rate, 1, example_input=images, criterion="l2", **options)
    method.end_epoch()
    method.detach()
    return method


@pytest.mark.parametrize("round_to", [1, 4])
@pytest.mark.parametrize("kind", ["flops", "params"])
@pytest.mark.parametrize(
    ("name", "coupling"), [("vgg_small", "joint"), ("resnet20", "joint"), ("resnet20", "independent")]
)
def test_the_small_network_has_the_share_and_at_a_lower_rate_more(name, coupling, kind, round_to):
    images, options = torch.randn(1, 3, 16, 16), {"coupling": coupling, "round_to": round_to}
    rate = pk.rate_for(network(name, width=0.5), images, **{kind: 0.5}, **options)
    for at, holds in ((rate, True), (rate - 1e-4, False)):
        net = network(name, width=0.5)
        pk.convert(net)
        method = pruned(net, images, at, **options)
        assert (left_of(net, images, kind) <= 0.5) is holds
        assert all(int((~dead).sum()) % round_to == 0 for dead in method.filters.dead)


@pytest.mark.parametrize("bias", [False, True])
def test_parameters_are_counted_with_biases_and_norms(bias):
    net = chain(bias=bias)
    masks = pk.methods.channel_masks.ChannelMasks(net, IMAGES)
    layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, pk.MaskedConv2d)}
    units, _ = pk.methods.channel_masks.units_of(layers, masks.groups, (), joint=True, prune_outputs=False)
    costs = pk.methods.costs.Costs(net, masks.groups, units, IMAGES, "params")
    dead = torch.rand(sum(unit.width for unit in units)) < 0.4
    parts = dead.split([unit.width for unit in units])
    live = {name: ~part[c] for unit, part in zip(units, parts, strict=True) for name, c in unit.filters.items()}
    masks.set_masks(live, {name: torch.ones_like(mask) for name, mask in live.items()}, True)
    small = shrink(net, IMAGES)
    assert costs.dense - costs.saved(dead.numpy()) == sum(p.numel() for p in small.parameters())


def test_a_masked_network_stays_as_it_was_and_its_masks_do_not_count():
    net = residual().train()
    net.first.set_masks(filter=torch.arange(6) < 2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    rate = pk.rate_for(net, IMAGES, flops=0.5, coupling="joint")
    assert rate == pk.rate_for(residual(), IMAGES, flops=0.5, coupling="joint")
    pk.rate_for(net, IMAGES, latency=0.5, coupling="joint", timer=parameters)
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.first.filter_mask.tolist() == [True, True, False, False, False, False]


def test_rates_and_skipped_layers_stay():
    net = chain()
    rate = pk.rate_for(net, IMAGES, flops=0.5, rates={"0": 0.0})
    assert rate > pk.rate_for(net, IMAGES, flops=0.5)
    assert rate == pk.rate_for(net, IMAGES, flops=0.5, skip=["0"])
    method = pruned(net, IMAGES, rate, rates={"0": 0.0})
    assert method.history[-1]["0"].live == 8 and left_of(net, IMAGES, "flops") <= 0.5


# ---- latency


def parameters(network, example_input):
    """A timer that needs no clock."""
    assert not network.training and not any(isinstance(m, pk.MaskedConv2d) for m in network.modules())
    return float(sum(p.numel() for p in network.parameters()))


def test_latency_by_a_timer():
    networks = []

    def timer(network, x):
        networks.append(network)
        assert x is IMAGES
        return parameters(network, x)

    rate = pk.rate_for(chain(), IMAGES, latency=0.5, timer=timer)
    exact = pk.rate_for(chain(), IMAGES, params=0.5)
    assert exact <= rate < exact + 1 / 64 and (64 * rate).is_integer()
    assert len(networks) <= 8  # the dense one, and a search among 64
    assert pk.rate_for(chain(), IMAGES, latency=1.0, timer=timer) == 0


def test_latency_by_the_clock():
    """Whatever the machine says, a rate comes out, and passes change nothing."""
    net = chain()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    try:
        assert 0 <= pk.rate_for(net, IMAGES, latency=0.9) < 1
    except ValueError as error:  # so small a network may not get faster
        assert "latency: expected at least" in str(error)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_times_are_medians_of_passes_in_turns(monkeypatch):
    now, order = 0.0, []

    class Sleeper(nn.Linear):
        def forward(self, x):
            nonlocal now
            order.append(self.bias is None)
            now += 3.0 if order[-1] else 2.0
            now += 100.0 * (len(order) == 7)  # one that the machine disturbs
            return x

    monkeypatch.setattr(uniform_rate.time, "perf_counter", lambda: now)
    slow, fast = Sleeper(1, 1, bias=False), Sleeper(1, 1)
    assert uniform_rate.time_ratio(slow, fast, torch.zeros(1)) == 1.5
    assert order == [True, False] * (uniform_rate.WARM_UPS + uniform_rate.ROUNDS[0])


# ---- methods


@pytest.mark.parametrize("name", EVERY)
def test_every_method_leaves_the_share(name):
    net = residual()
    options = {"coupling": "joint", "budget": {"flops": 0.5}, "example_input": IMAGES, "duty": 0.5}
    _, _, method = run(EVERY[name], 4, net=net, total=4, steps_per_epoch=4, **options)
    assert left_of(net.eval(), IMAGES, "flops") <= 0.5
    assert method.rate == pk.rate_for(residual(), IMAGES, flops=0.5, coupling="joint")
    assert method.budget == {"flops": 0.5}


class Shuffled(nn.Module):
    """A layer whose filters cannot be merged: what follows is no sum over its channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.b(torch.relu(self.a(x)))
        x = self.c(torch.softmax(x, 1))
        return self.fc(torch.relu(x).mean((2, 3)))


def test_csgd_counts_what_it_can_merge():
    torch.manual_seed(0)
    net = Shuffled()
    pk.convert(net)
    given = {"example_input": IMAGES, "budget": {"params": 0.75}}
    method = CSGD(net, sgd(net), 0.5, 4, **given)
    assert "b" in method.left_out
    assert method.rate == pk.rate_for(net, IMAGES, params=0.75, coupling="joint", skip=["b"])


def test_a_resumed_method_has_the_rate_that_it_had():
    """Other weights, or times, would give another one."""
    options = {"coupling": "independent", "budget": {"latency": 0.5, "timer": parameters}, "example_input": IMAGES}
    options |= {"duty": 0.5, "steps_per_epoch": 4}
    net, optimizer, first = run(GHFP, 2, net=residual(), total=4, **options)
    state = first.state_dict()
    first.detach()
    options["budget"] = {"latency": 0.8, "timer": parameters}
    second = GHFP(net, optimizer, 0.5, 4, state=state, **options)
    assert second.rate == first.rate == second._budget.rate
    train(net, optimizer, second, 2, 2)
    assert left_of(net.eval(), IMAGES, "params") <= 0.55


# ---- what cannot be

BAD = {
    "nothing": ({}, "flops, params, latency: expected one of flops, params, latency, got none"),
    "two": ({"flops": 0.5, "params": 0.5}, "flops, params, latency: expected one of .*, got flops, params"),
    "0": ({"flops": 0}, r"flops: expected a share in \(0, 1\], got 0"),
    "above 1": ({"latency": 1.1}, r"latency: expected a share in \(0, 1\], got 1.1"),
    "too little": ({"flops": 0.001}, r"flops: expected at least 0\.\d+, which is left where each .*, got 0.001"),
    "rates": (
        {"flops": 0.1, "rates": {"*": 0.1}},
        r"flops: expected at least 0\.\d+, .*\(at most 0\.\d+: rates have the rest\), got 0.1",
    ),
    "timer": ({"flops": 0.5, "timer": parameters}, "timer: expected a function .* with latency, got"),
    "no timer": ({"latency": 0.5, "timer": 3}, "timer: expected a function .* with latency, got 3"),
    "round_to": ({"flops": 0.5, "round_to": 0}, "round_to: expected an integer from 1, got 0"),
    "coupling": ({"flops": 0.5, "coupling": "none"}, "coupling: expected one of independent, joint, got 'none'"),
    "skip": ({"flops": 0.5, "skip": ["x"]}, "skip: expected names of MaskedConv2d layers, got 'x'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_rate_for_refuses(case):
    options, error = BAD[case]
    with pytest.raises(ValueError, match=f"rate_for: {error}"):
        pk.rate_for(chain(), IMAGES, **options)


BAD_BUDGETS = {
    "unknown": ({"budget": {"memory": 0.5}}, "budget: expected one of flops, params, latency, got memory"),
    "no input": ({"example_input": None}, "example_input: expected an input, from which budget=.* what is left"),
    "no norms": ({"norms": False}, "norms: expected True with budget="),
    "floor": ({"floor": 0.1}, "floor: expected a share"),
    "too little": ({"budget": {"flops": 0.001}}, "flops: expected at least"),
}


@pytest.mark.parametrize("case", BAD_BUDGETS)
def test_what_methods_refuse(case):
    options, error = BAD_BUDGETS[case]
    net = chain()
    with pytest.raises(ValueError, match=f"GHFP: {error}"):
        GHFP(net, sgd(net), **{"budget": {"flops": 0.5}, "example_input": IMAGES, "epochs": 2} | options)
