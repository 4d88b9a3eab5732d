"""The border between a network and its compacted form: errors, and what they leave."""

import copy

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.compacted import (
    assert_same_training,
    batches,
    bind,
    mask_small,
    outputs,
    pair,
    sgd,
    small,
    small_images,
    train,
)
from cases.networks import conv_norm
from prunekernels.compaction.compaction import Compaction

X = small_images()
KEEP = torch.tensor([1, 0, 1, 1, 0, 1]).bool()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_an_exception_inside_writes_back(error):
    masked, optimizer, other, its = pair()
    train(masked, optimizer, batches())
    with pytest.raises(error, match="^stop$"):
        with pk.compacted(other, X, its) as (net, opt):
            train(net, opt, batches())
            raise error("stop")
    assert_same_training(masked, optimizer, other, its)
    with pk.compacted(other, X, its) as (net, opt):  # and goes on
        train(net, opt, batches(seed=2))
    train(masked, optimizer, batches(seed=2))
    assert_same_training(masked, optimizer, other, its)


def test_an_exception_within_a_step_writes_back_and_is_the_one_that_is_seen():
    net = mask_small(small(), 1)
    before = net.second.weight.detach().clone()
    with pytest.raises(ZeroDivisionError):
        with pk.compacted(net, X, sgd(net)) as (inside, opt):
            train(inside, opt, batches())
            mask_small(net, 2)  # an error of its own on leaving
            1 / 0  # noqa: B018
    assert not torch.equal(net.second.weight, before)


def test_entering_twice():
    net = mask_small(small(), 1)
    optimizer = sgd(net)
    message = "^compacted: expected a network that is not compacted already: leave"
    with pk.compacted(net, X, optimizer) as (inside, opt):
        for again in (optimizer, None, sgd(net)):
            with pytest.raises(RuntimeError, match=message):
                with pk.compacted(net, X, again):
                    raise AssertionError("entered")
        train(inside, opt, batches())
        want = inside.second.bias.detach().clone()
    assert torch.equal(net.second.bias[net.second.filter_mask], want)


def test_entering_twice_by_an_object():
    net = mask_small(small(), 1)
    c = Compaction(net, X)
    c.enter()
    with pytest.raises(RuntimeError, match="not compacted already"):
        c.enter()
    c.leave()
    for call in (c.leave, c.write_back):
        with pytest.raises(RuntimeError, match="compacted: expected a network that is compacted"):
            call()
    assert not c.entered


@pytest.mark.parametrize("how", ["set_masks", "in place", "norm", "hard", "loaded", "kernel"])
def test_masks_that_change_inside(how):
    net = mask_small(small(), 1)
    optimizer = sgd(net)
    live = net.second.filter_mask.clone()
    state = copy.deepcopy(mask_small(small(), 2).state_dict())
    change = {
        "set_masks": lambda: net.second.set_masks(filter="all"),
        "in place": lambda: net.second.filter_mask.fill_(True),
        "norm": lambda: net.first[1].set_mask("all"),
        "hard": lambda: net.second.set_masks(hard=live & (torch.arange(5) > 0)),
        "loaded": lambda: net.load_state_dict(state),
        "kernel": lambda: net.second.set_masks(kernel=torch.rand(5, 6) < 0.5),
    }[how]
    name = "first.1" if how == "norm" else "first.0" if how == "loaded" else "second"
    with pytest.raises(RuntimeError, match=f"^compacted: {name}: expected masks that stay as they are .* written back"):
        with pk.compacted(net, X, optimizer) as (inside, opt):
            train(inside, opt, batches())
            want = inside.second.bias.detach().clone()
            change()
    assert torch.equal(net.second.bias[live], want)
    with pk.compacted(net, X, optimizer):  # the new masks
        pass


def test_masks_written_anew_with_the_same_contents_are_no_change():
    masked, optimizer, other, its = pair()
    train(masked, optimizer, batches())
    with pk.compacted(other, X, its) as (net, opt):
        train(net, opt, batches())
        other.load_state_dict(other.state_dict())
        other.eval(), other(X), other.train()
    assert_same_training(masked, optimizer, other, its)


@pytest.mark.parametrize("which", ["optimizer", "opt"])
def test_a_parameter_that_left_an_optimizer(which):
    net = mask_small(small(), 1)
    optimizer = sgd(net)
    message = f"compacted: {which}: expected the parameters that it had on entering, got them without first.0.weight"
    with pytest.raises(RuntimeError, match=message):
        with pk.compacted(net, X, optimizer) as (inside, opt):
            train(inside, opt, batches())
            want = inside.second.bias.detach().clone()
            del {"optimizer": optimizer, "opt": opt}[which].param_groups[0]["params"][0]
    assert torch.equal(net.second.bias[net.second.filter_mask], want)


@pytest.mark.parametrize("which", ["optimizer", "opt"])
def test_a_parameter_that_came_to_an_optimizer(which):
    net = mask_small(small(), 1)
    optimizer = sgd(net)
    with pytest.raises(RuntimeError, match=f"compacted: {which}: expected the parameters .*, got more"):
        with pk.compacted(net, X, optimizer) as (inside, opt):
            train(inside, opt, batches())
            {"optimizer": optimizer, "opt": opt}[which].add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_a_parameter_that_left_before_is_not_trained():
    net = mask_small(small(), 1)
    optimizer = sgd(net)
    with pk.compacted(net, X, optimizer):
        pass
    optimizer.param_groups[0]["params"] = [p for p in optimizer.param_groups[0]["params"] if p is not net.second.weight]
    before = net.second.weight.detach().clone()
    with pk.compacted(net, X, optimizer) as (inside, opt):
        train(inside, opt, batches())
    assert torch.equal(net.second.weight, before)
    assert not torch.equal(net.first[0].weight, small().first[0].weight)


@pytest.mark.parametrize("what", ["parameter", "layer"])
def test_what_is_replaced_inside(what):
    net = mask_small(small(), 1)
    with pytest.raises(RuntimeError, match="compacted: model: expected the modules and parameters that it had"):
        with pk.compacted(net, X, sgd(net)) as (inside, opt):
            train(inside, opt, batches())
            if what == "parameter":
                net.second.weight = nn.Parameter(net.second.weight.detach().clone())
            else:
                net.last = nn.Linear(4, 2).double()
    with pk.compacted(net, X, sgd(net)) as (inside, opt):  # with the new one
        train(inside, opt, batches())


def test_what_is_replaced_between_blocks():
    masked, _, other, _ = pair()
    with pk.compacted(other, X):
        pass
    for net in (masked, other):
        torch.manual_seed(5)
        net.second = nn.Conv2d(6, 4, 3).double()
        net.hidden = nn.Linear(16, 4).double()
        pk.convert(net)
        net.second.set_masks(filter=torch.tensor([1, 0, 1, 1]).bool())
    optimizer, its = sgd(masked), sgd(other)
    bind(masked, optimizer, "dead"), bind(other, its, "dead")
    train(masked, optimizer, batches())
    with pk.compacted(other, X, its) as (net, opt):
        train(net, opt, batches())
    assert_same_training(masked, optimizer, other, its)


ALIGN = "compacted: align: expected a positive number or None, got"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda net: Compaction(net, X, align=0), ValueError, f"{ALIGN} 0"),
        (lambda net: Compaction(net, X, align=True), ValueError, f"{ALIGN} True"),
        (lambda net: Compaction(net, X, net), TypeError, "compacted: optimizer: expected a torch.optim.Optimizer"),
        (lambda net: Compaction(net, "x").enter(), TypeError, "compacted: example_input: expected "),
    ],
)
def test_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(mask_small(small(), 1))


def test_an_optimizer_of_another_network():
    net = mask_small(small(), 1)
    with pytest.raises(ValueError, match="compacted: optimizer: expected parameters of the model"):
        with pk.compacted(net, X, sgd(small())):
            raise AssertionError("entered")


class Wrong(nn.Module):
    """Computes something else where channels are missing."""

    def __init__(self):
        super().__init__()
        self.first, self.last = conv_norm(3, 6), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.first(x)
        return self.last(x * float(self.first[0].weight.shape[0]))


@pytest.mark.parametrize("verify", [False, True])
def test_a_forward_that_small_layers_do_not_serve(verify):
    """It is refused, and nothing is left entered; masks that leave all layers whole come first."""
    net = Wrong().double()
    pk.convert(net)
    c = Compaction(net, X)
    c.enter()
    c.leave()
    net.first[0].set_masks(filter=KEEP)
    net.first[1].set_mask(KEEP)
    before = copy.deepcopy(net.state_dict())
    for _ in range(2):
        with pytest.raises(ValueError, match="compacted: model: expected a network whose forward serves small layers"):
            c.enter(verify=verify)
        assert not c.entered
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    net.first[0].set_masks(filter="all"), net.first[1].set_mask("all")
    inside, _ = c.enter()
    torch.testing.assert_close(outputs(inside, X), outputs(net, X))
    c.leave()


def test_a_network_without_masked_layers():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).double()
    with pk.compacted(net, X) as (inside, _):
        assert torch.equal(inside(X), net(X))
