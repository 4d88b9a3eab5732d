"""bind: what optimizers leave alone in a model with masks."""

import copy

import pytest
import torch
from torch import nn

import prunekernels as pk
from prunekernels import optim

FILTERS = torch.tensor([1, 1, 0, 0, 1, 0, 1, 1], dtype=torch.bool)
HARD = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1], dtype=torch.bool)


def network(masked=True):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 2)
    )
    pk.convert(net)
    if masked:
        net[0].set_masks(filter=FILTERS, hard=HARD)
        net[1].set_mask(FILTERS)
        net[3].set_masks(input=FILTERS)
    return net


def train(net, optimizer, steps=3, seed=0):
    torch.manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(4, 3, 6, 6)).square().sum().backward()
        optimizer.step()


def snapshot(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


OURS = {
    "sgd": lambda net, freeze: optim.MaskedSGD(net.parameters(), 0.01, 0.9, weight_decay=0.1, freeze=freeze),
    "adamw": lambda net, freeze: optim.MaskedAdamW(net.parameters(), 0.01, weight_decay=0.1, freeze=freeze),
}
OTHERS = {
    "sgd": lambda net: torch.optim.SGD(net.parameters(), 0.01, 0.9, weight_decay=0.1),
    "adamw": lambda net: torch.optim.AdamW(net.parameters(), 0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda net: torch.optim.RMSprop(net.parameters(), 0.01, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda net: torch.optim.Adagrad(net.parameters(), 0.01, weight_decay=0.1),
}


def bound(kind, name, net, freeze):
    if kind == "ours":
        optimizer = OURS[name](net, freeze)
        binding = optim.bind(optimizer, net)
    else:
        optimizer = OTHERS[name](net)
        binding = optim.bind(optimizer, net, freeze=freeze)
    assert isinstance(binding, optim.Binding)
    return optimizer


EVERY = [("ours", name) for name in OURS] + [("others", name) for name in OTHERS]


@pytest.mark.parametrize("freeze", ["hard", "dead"])
@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_frozen_rows_stay(kind, name, freeze):
    net = network()
    optimizer, before = bound(kind, name, net, freeze), snapshot(net)
    train(net, optimizer)
    frozen = ~(HARD if freeze == "hard" else FILTERS)
    moved = {name: p.detach() != before[name] for name, p in net.named_parameters()}
    for parameter in ("0.weight", "0.bias"):
        rows = moved[parameter].view(8, -1).any(1)
        assert not rows[frozen].any() and rows[~frozen].all()
    for parameter in ("1.weight", "1.bias"):  # a norm has no hard mask
        assert torch.equal(moved[parameter], FILTERS)
    assert moved["3.weight"][:, FILTERS].all()
    assert bool(moved["3.weight"][:, ~FILTERS].any()) == (freeze == "hard")
    for state in optimizer.state[net[0].weight].values():
        if state.shape == net[0].weight.shape:
            assert not state[frozen].any() and state[FILTERS].any()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_hooks_give_what_a_masked_optimizer_gives(name):
    ours = network()
    theirs = copy.deepcopy(ours)
    for freeze in ("hard", "dead"):
        train(ours, bound("ours", name, ours, freeze))
        train(theirs, bound("others", name, theirs, freeze))
    for (parameter, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if parameter != "0.bias":  # before a norm its gradient is rounding error alone, which AdamW magnifies
            torch.testing.assert_close(a, b)


def test_soft_dead_filters_move_as_torch_moves_them():
    ours = network(masked=False)
    ours[0].set_masks(filter=FILTERS)
    theirs = copy.deepcopy(ours)
    optimizer = OURS["sgd"](ours, "hard")
    optim.bind(optimizer, ours)
    for net, step in ((ours, optimizer), (theirs, OTHERS["sgd"](theirs))):
        train(net, step)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_dense_gradients_train_soft_dead_filters():
    net = network()
    net[0].weight_grad = "dense"
    net[1].set_mask("all")
    optimizer, before = bound("ours", "sgd", net, "dead"), snapshot(net)
    train(net, optimizer, 1)
    rows = (net[0].weight != before["0.weight"]).flatten(1).any(1)
    assert torch.equal(rows, HARD)
    assert torch.equal(net[0].bias != before["0.bias"], FILTERS)
    net[0].weight_grad = "masked"
    before = snapshot(net)
    train(net, optimizer, 1)
    assert torch.equal((net[0].weight != before["0.weight"]).flatten(1).any(1), FILTERS)


@pytest.mark.parametrize("kind", ["ours", "others"])
@pytest.mark.parametrize("in_place", [True, False])
def test_masks_may_change_between_steps(kind, in_place):
    net = network(masked=False)
    optimizer = bound(kind, "sgd", net, "dead")
    train(net, optimizer, 1)
    before, momentum = snapshot(net), optimizer.state[net[0].weight]["momentum_buffer"].clone()
    if in_place:
        net[0].filter_mask[2] = False
    else:
        net[0].set_masks(filter=torch.arange(8) != 2)
    train(net, optimizer, 1)
    assert torch.equal(net[0].weight[2], before["0.weight"][2])
    assert torch.equal(optimizer.state[net[0].weight]["momentum_buffer"][2], momentum[2])
    net[0].set_masks(filter="all")
    train(net, optimizer, 1)
    assert (net[0].weight[2] != before["0.weight"][2]).all()


def test_masks_are_prepared_only_when_they_change():
    net = network()
    binding = optim.bind(OURS["sgd"](net, "dead"), net)
    tables = binding.tables("dead")
    assert binding.tables("dead") is tables
    assert {net[0].weight, net[0].bias, net[1].weight, net[1].bias, net[3].weight} <= set(tables)
    assert net[3].weight not in binding.tables("hard")
    net[3].set_masks(input="all")
    assert binding.tables("dead") is not tables and net[3].weight not in binding.tables("dead")


def test_later_groups_are_covered():
    net = network()
    optimizer = optim.MaskedSGD(net[0].parameters(), 0.01, weight_decay=0.1, freeze="dead")
    optim.bind(optimizer, net)
    optimizer.add_param_group({"params": list(net[3].parameters())})
    before = snapshot(net)
    train(net, optimizer)
    assert torch.equal(net[3].weight[:, ~FILTERS], before["3.weight"][:, ~FILTERS])


@pytest.mark.parametrize("kind", ["ours", "others"])
def test_binding_again_and_removing(kind):
    net, other = network(), network(masked=False)
    optimizer = bound(kind, "sgd", net, "hard")
    optimizer.add_param_group({"params": list(other.parameters())})
    binding = optim.bind(optimizer, other)
    before = snapshot(net)
    train(net, optimizer, 1)
    assert (net[0].weight != before["0.weight"]).all()
    binding.remove()
    assert "_binding" not in optimizer.__dict__
    train(net, optimizer, 1)


def test_restored_layers_are_forgotten():
    net = network()
    optimizer = bound("ours", "sgd", net, "dead")
    train(net, optimizer, 1)
    pk.restore(net)
    before = snapshot(net)
    train(net, optimizer, 1)
    assert (net[3].weight != before["3.weight"])[:, FILTERS].any()


def test_without_hidden_state_in_torchs_optimizers():
    net = network()
    optimizer = bound("others", "sgd", net, "hard")
    train(net, optimizer, 1)
    assert set(optimizer.state_dict()["param_groups"][0]) == set(OTHERS["sgd"](net).state_dict()["param_groups"][0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda net: optim.bind(net, net),
            TypeError,
            "bind: optimizer: expected a torch.optim.Optimizer or a wrapper .*, got Sequential",
        ),
        (
            lambda net: optim.bind(OTHERS["sgd"](net), net, freeze="all"),
            ValueError,
            "bind: freeze: expected one of hard, dead, got 'all'",
        ),
        (
            lambda net: optim.bind(OURS["sgd"](net, "hard"), net, freeze="dead"),
            ValueError,
            "bind: freeze: expected None, as MaskedSGD has its own, got 'dead'",
        ),
        (
            lambda net: optim.bind(OTHERS["sgd"](net), nn.Linear(2, 2)),
            ValueError,
            r"bind: model: expected masked layers \(see pk.convert\), got none",
        ),
        (
            lambda net: optim.bind(OTHERS["sgd"](network()), net),
            ValueError,
            "bind: optimizer: expected parameters of the model's masked layers, got only others",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(network())


def test_shared_parameters_are_refused():
    net = nn.Sequential(pk.MaskedConv2d(4, 4, 1), pk.MaskedConv2d(4, 4, 1))
    net[1].weight = net[0].weight
    with pytest.raises(ValueError, match="bind: model: expected parameters of their own, got one of 0 and 1"):
        optim.bind(torch.optim.SGD(net.parameters(), 0.1), net)
