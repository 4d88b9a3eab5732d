"""Loops of training: schedulers, accumulated, clipped and scaled gradients, closures, states of any kind."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import prunekernels as pk
from cases.compacted import (
    assert_same_training,
    batches,
    bind,
    both_modes,
    loss_of,
    mask_small,
    small,
    train,
)
from cases.optimizers import OPTIMIZERS, ROUNDS, X, over


@pytest.mark.parametrize("by", ["optimizer", "opt"])
def test_schedulers_may_be_over_either_optimizer(by):
    def loop(net, opt, data, optimizer):
        scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
        for x in data:
            train(net, opt, [x])
            scheduler.step()
        return scheduler.get_last_lr()

    masked, other = mask_small(small()), mask_small(small())
    optimizer, its = over("sgd_momentum")(masked), over("sgd_momentum")(other)
    bind(masked, optimizer, "dead"), bind(other, its, "dead")
    want = loop(masked, optimizer, batches(steps=4), optimizer)
    with pk.compacted(other, X, its) as (net, opt):
        got = loop(net, opt, batches(steps=4), its if by == "optimizer" else opt)
    assert got == want
    assert_same_training(masked, optimizer, other, its)


def test_a_scheduler_over_the_optimizer_goes_on_through_blocks(recwarn):
    masked, other = small(), small()
    optimizer, its = over("sgd_momentum")(masked), over("sgd_momentum")(other)
    bind(masked, optimizer, "dead"), bind(other, its, "dead")
    one, two = (lr_scheduler.OneCycleLR(o, 0.1, total_steps=8) for o in (optimizer, its))  # momentum as well
    for seed in (1, 2, 1):
        mask_small(masked, seed), mask_small(other, seed)
        for x in batches(seed=seed):
            train(masked, optimizer, [x])
            one.step()
        with pk.compacted(other, X, its) as (net, opt):
            for x in batches(seed=seed):
                train(net, opt, [x])
                two.step()
    assert_same_training(masked, optimizer, other, its)
    assert two.state_dict()["_last_lr"] == one.state_dict()["_last_lr"]
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_a_rate_set_by_hand_inside():
    def loop(net, opt, data):
        for i, x in enumerate(data):
            opt.param_groups[0]["lr"] = 0.1 / (1 + i)
            train(net, opt, [x])
        return []

    masked, optimizer, other, its = both_modes(small(), over("sgd_momentum"), X, ROUNDS, loop=loop)
    assert_same_training(masked, optimizer, other, its)
    assert its.param_groups[0]["lr"] == 0.05


def test_accumulated_gradients():
    def loop(net, opt, data):
        opt.zero_grad()
        for x in data:
            loss_of(net(x)).backward()
        opt.step()
        return []

    assert_same_training(*both_modes(small(), over("adamw"), X, ROUNDS, loop=loop))


@pytest.mark.parametrize("freeze", ["dead", "hard"])
def test_clipped_gradients(freeze):
    norms = []

    def loop(net, opt, data):
        for x in data:
            opt.zero_grad()
            (100 * loss_of(net(x))).backward()
            norms.append(nn.utils.clip_grad_norm_(net.parameters(), 0.1).item())
            opt.step()
        return norms[-len(data) :]

    assert_same_training(*both_modes(small(), over("sgd_momentum"), X, ROUNDS, loop=loop, freeze=freeze))
    assert min(norms) > 0.1


@pytest.mark.parametrize("name", ["sgd_momentum", "masked_adamw", "adamw_fused"])
@pytest.mark.parametrize("overflow", [False, True])
def test_scaled_gradients(name, overflow):
    """The first step has no state yet; with an overflow that step is left out."""

    def loop(net, opt, data):
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        for i, x in enumerate(data):
            opt.zero_grad()
            scaler.scale(loss_of(net(x)) * (torch.inf if overflow and i == 0 else 1.0)).backward()
            scaler.step(opt)
            scaler.update()
        return [scaler.get_scale()]

    assert_same_training(*both_modes(small(), over(name), X, ROUNDS, loop=loop))


@pytest.mark.parametrize("freeze", ["dead", "hard"])
@pytest.mark.parametrize("name", ["sgd_momentum", "masked_sgd", "adamw"])
def test_steps_with_a_closure(name, freeze):
    def loop(net, opt, data):
        losses = []
        for x in data:

            def closure(x=x):
                opt.zero_grad()
                loss = loss_of(net(x))
                loss.backward()
                return loss

            losses.append(opt.step(closure).item())
        return losses

    assert_same_training(*both_modes(small(), over(name), X, ROUNDS, loop=loop, freeze=freeze))


def test_zero_grad_of_the_network_and_zeros_in_place():
    def loop(net, opt, data):
        for x in data:
            net.zero_grad()
            loss_of(net(x)).backward()
            opt.step()
            opt.zero_grad(set_to_none=False)
            opt.step()  # momentum and weight decay alone
        return []

    assert_same_training(*both_modes(small(), over("sgd_momentum"), X, ROUNDS, loop=loop, freeze="hard"))


def test_a_parameter_without_gradient_takes_no_step():
    def loop(net, opt, data):
        for x in data:
            opt.zero_grad()
            net.first(x).square().sum().backward()  # the rest of the network is not used
            opt.step()
        return []

    masked, optimizer, other, its = both_modes(small(), over("adamw"), X, ROUNDS, loop=loop, freeze="hard")
    assert_same_training(masked, optimizer, other, its)
    assert not its.state.get(other.second.weight)


def test_state_before_the_first_step_and_after_steps_in_masked_mode():
    """Dense steps between: all entries have state that the small optimizer must not lose."""
    masked, other = small(), small()
    optimizer, its = over("adamw")(masked), over("adamw")(other)
    bind(masked, optimizer, "dead"), bind(other, its, "dead")
    for seed in (1, 2):
        mask_small(masked, seed), mask_small(other, seed)
        train(masked, optimizer, batches(seed=seed))
        with pk.compacted(other, X, its) as (net, opt):
            train(net, opt, batches(seed=seed))
        for net, o in ((masked, optimizer), (other, its)):
            for layer in (net.first[0], net.second):
                layer.set_masks(filter="all")
            net.first[1].set_mask("all")
            train(net, o, batches(seed=5))
    assert_same_training(masked, optimizer, other, its)


def test_optimizer_state_loaded_inside():
    masked, other = mask_small(small()), mask_small(small())
    optimizer, its = over("adamw")(masked), over("adamw")(other)
    bind(masked, optimizer, "dead"), bind(other, its, "dead")

    def loop(net, opt, data):
        saved = copy.deepcopy(opt.state_dict())
        train(net, opt, data)
        opt.load_state_dict(saved)
        return train(net, opt, data)

    train(masked, optimizer, batches(seed=3)), train(other, its, batches(seed=3))
    want = loop(masked, optimizer, batches())
    with pk.compacted(other, X, its) as (net, opt):
        got = loop(net, opt, batches())
    torch.testing.assert_close(got, want)
    assert_same_training(masked, optimizer, other, its)


def test_scaled_rows_of_gradients():
    """grad_scale of a layer, edited in place between blocks and replaced."""

    def set_masks(net, seed, in_place):
        mask_small(net, seed % 2)
        scale = torch.linspace(0.2, 0.9, 5) / seed
        if in_place:
            net.second.grad_scale.copy_(scale)
        else:
            net.second.grad_scale = scale

    rounds = [
        (functools.partial(set_masks, seed=seed, in_place=in_place), batches(seed=seed))
        for seed, in_place in ((1, False), (3, True), (5, False), (2, False))
    ]
    assert_same_training(*both_modes(small(), over("sgd_momentum"), X, rounds))


def test_scaled_rows_of_a_layer_in_which_nothing_is_dead():
    def set_masks(net):
        mask_small(net)
        net.second.set_masks(filter="all")
        net.second.grad_scale = torch.linspace(0.1, 0.9, 5)

    assert_same_training(*both_modes(small(), over("sgd_momentum"), X, [(set_masks, batches())]))


def test_scaled_rows_of_a_frozen_layer():
    net = small()
    net.second.grad_scale = torch.full((5,), 0.5)
    net.second.requires_grad_(False)
    assert_same_training(*both_modes(net, over("sgd_momentum"), X, ROUNDS))


def test_dense_gradients_of_dead_filters():
    """Such a layer keeps its width, and its dead filters train as in masked mode."""
    net = small()
    net.second.weight_grad = "dense"
    masked, optimizer, other, its = both_modes(net, over("sgd_momentum"), X, ROUNDS)
    assert_same_training(masked, optimizer, other, its)
    dead = ~other.second.filter_mask & other.second.hard_mask
    assert (other.second.weight[dead] != small().second.weight[dead]).any()


def test_a_layer_of_full_width_that_the_optimizer_does_not_have():
    def others(net):
        return OPTIMIZERS["sgd_momentum"]([p for p in net.parameters() if p is not net.second.weight])

    net = small()
    net.second.weight_grad = "dense"
    net.second.bias = None
    assert_same_training(*both_modes(net, others, X, ROUNDS))


class Wrapper:
    """As those of training libraries: no optimizer itself, but it has one."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


def test_a_wrapper_stands_for_the_optimizer_inside():
    masked, other = mask_small(small()), mask_small(small())
    optimizer, its = over("adamw")(masked), over("adamw")(other)
    bind(masked, optimizer, "dead"), bind(other, its, "dead")
    train(masked, optimizer, batches())
    with pk.compacted(other, X, Wrapper(Wrapper(its))) as (net, opt):
        assert type(opt) is torch.optim.AdamW
        train(net, opt, batches())
    assert_same_training(masked, optimizer, other, its)


class Warm(torch.optim.SGD):
    """Counts its steps in an attribute, and takes smaller ones first."""

    def __init__(self, params):
        super().__init__(params, lr=0.05, momentum=0.9)
        self.count = 0

    def step(self, closure=None):
        self.count += 1
        for group in self.param_groups:
            group["lr"] = 0.01 * self.count
        return super().step(closure)


def test_numbers_that_an_optimizer_keeps_in_attributes():
    masked, other = mask_small(small()), mask_small(small())
    optimizer, its = Warm(masked.parameters()), Warm(other.parameters())
    bind(masked, optimizer, "dead"), bind(other, its, "dead")
    for seed in range(4):
        train(masked, optimizer, batches(seed=seed))
        if seed % 2:
            train(other, its, batches(seed=seed))
        else:
            with pk.compacted(other, X, its) as (net, opt):
                train(net, opt, batches(seed=seed))
    assert its.count == optimizer.count == 8
    assert_same_training(masked, optimizer, other, its)


def test_a_rate_that_is_a_tensor():
    def made(net):
        return torch.optim.AdamW(net.parameters(), lr=torch.tensor(0.01), eps=1e-3, foreach=False)

    def loop(net, opt, data):
        for x in data:
            opt.param_groups[0]["lr"].mul_(0.5)
            train(net, opt, [x])
        return []

    assert_same_training(*both_modes(small(), made, X, ROUNDS, loop=loop))


class Blockwise(torch.optim.Optimizer):
    """State of another shape than the parameter's, as of Adafactor."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["rows"] = p.grad.flatten(1).norm(dim=1) if p.dim() > 1 else p.grad.norm()
                    p.sub_(p.grad, alpha=group["lr"])


def test_state_of_another_shape_is_refused():
    net = mask_small(small())
    optimizer = Blockwise(net.parameters())
    train(net, optimizer, batches())
    message = "compacted: optimizer: expected state that is a number or shaped like its parameter, got rows of shape"
    with pytest.raises(TypeError, match=message):
        with pk.compacted(net, X, optimizer):
            raise AssertionError("entered")
    with pk.compacted(net, X):  # nothing is left entered
        pass


def test_state_of_another_shape_that_the_first_step_makes_is_told():
    net, before = mask_small(small()), small()
    optimizer = Blockwise(net.parameters())
    with pytest.raises(TypeError, match="got rows of shape .* in Blockwise: train in masked mode"):
        with pk.compacted(net, X, optimizer) as (inside, opt):
            train(inside, opt, batches())
    live = net.second.filter_mask
    assert (net.second.weight[live] != before.second.weight[live]).any()  # what was trained is there
    with pk.compacted(net, X):
        pass


@pytest.mark.parametrize("kind", ["LBFGS", "Muon", "Adafactor"])
def test_optimizers_whose_steps_mix_entries_are_refused(kind):
    net = mask_small(small())
    made = {
        "LBFGS": lambda: torch.optim.LBFGS(net.parameters()),
        "Adafactor": lambda: torch.optim.Adafactor(net.parameters()),
        "Muon": lambda: torch.optim.Muon([net.hidden.weight, net.last.weight]),
    }
    if not hasattr(torch.optim, kind):
        pytest.skip(f"torch {torch.__version__} has no {kind}")
    with pytest.raises(TypeError, match=f"compacted: optimizer: expected .*, got {kind}"):
        with pk.compacted(net, X, made[kind]()):
            raise AssertionError("entered")
