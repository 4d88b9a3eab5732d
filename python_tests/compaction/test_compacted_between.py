"""What happens between two blocks, and around them: states loaded, groups added, modes of torch, state dicts held."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import prunekernels as pk
from cases.compacted import CLOSE, assert_same_training, batches, bind, mask_small, small, small_images, train
from prunekernels.compaction.compaction import Compaction
from prunekernels.graph import tidy_masks

X = small_images()


def adamw(net):
    return torch.optim.AdamW(net.parameters(), 0.01, eps=1e-3, weight_decay=0.1)


def sgd(net):
    return torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=0.1)


class Both:
    """The same training in masked and in compacted mode, block by block."""

    def __init__(self, optimizer=adamw, freeze="dead"):
        self.masked, self.other = small(), small()
        self.optimizer, self.its = optimizer(self.masked), optimizer(self.other)
        bind(self.masked, self.optimizer, freeze), bind(self.other, self.its, freeze)

    def each(self, change):
        change(self.masked, self.optimizer)
        change(self.other, self.its)

    def block(self, seed, loop=train):
        self.each(lambda net, _: mask_small(net, seed))
        loop(self.masked, self.optimizer, batches(seed=seed))
        with pk.compacted(self.other, X, self.its) as (net, opt):
            loop(net, opt, batches(seed=seed))

    def check(self):
        assert_same_training(self.masked, self.optimizer, self.other, self.its)


def test_states_loaded_between_blocks():
    both = Both()
    both.block(1)
    saved = [copy.deepcopy((net.state_dict(), o.state_dict())) for net, o in
             ((both.masked, both.optimizer), (both.other, both.its))]  # fmt: skip
    both.block(2)
    for (net, optimizer), (weights, state) in zip(
        ((both.masked, both.optimizer), (both.other, both.its)), saved, strict=True
    ):
        net.load_state_dict(weights)
        optimizer.load_state_dict(state)
    both.check()
    both.block(1)
    both.block(2)
    both.check()


def test_groups_added_between_blocks():
    def few(net):
        return torch.optim.SGD([*net.first.parameters(), *net.second.parameters()], 0.05, momentum=0.9)

    both = Both(few)
    both.block(1)
    both.each(lambda net, o: o.add_param_group({"params": list(net.hidden.parameters()), "lr": 0.02}))
    both.block(1)
    both.block(2)
    both.check()


def test_a_scheduler_over_the_small_optimizer_goes_on():
    both = Both(sgd)
    one = lr_scheduler.ExponentialLR(both.optimizer, 0.8)
    two = None
    for seed in (1, 2, 1):
        both.each(lambda net, _, seed=seed: mask_small(net, seed))
        for x in batches(seed=seed):
            train(both.masked, both.optimizer, [x])
            one.step()
        with pk.compacted(both.other, X, both.its) as (net, opt):
            two = lr_scheduler.ExponentialLR(opt, 0.8) if two is None else two
            for x in batches(seed=seed):
                train(net, opt, [x])
                two.step()
        assert both.its.param_groups[0]["lr"] == both.optimizer.param_groups[0]["lr"] == one.get_last_lr()[0]
    both.check()


def test_options_changed_between_blocks():
    both = Both(sgd)
    both.block(1)
    both.each(lambda _, o: o.param_groups[0].update(lr=0.01, weight_decay=0.0, momentum=0.5))
    both.block(1)
    both.check()


def test_bound_otherwise_between_blocks():
    """The same masks, but other entries move."""
    both = Both(sgd, freeze="hard")
    both.block(1)
    both.each(lambda net, o: pk.optim.bind(o, net, freeze="dead"))
    both.block(1)
    both.each(lambda net, o: pk.optim.bind(o, net, freeze="hard"))
    both.block(1)
    both.check()


def test_dense_steps_between_blocks():
    both = Both()

    def dense(net, optimizer):
        for layer in (net.first[0], net.second):
            layer.weight_grad = "dense"
        train(net, optimizer, batches(seed=9))
        for layer in (net.first[0], net.second):
            layer.weight_grad = "masked"

    both.block(1)
    both.each(dense)
    both.block(1)
    both.block(2)
    both.check()


def test_masks_tidied_between_blocks():
    both = Both()
    both.block(1)
    both.each(lambda net, _: net.second.set_masks(input=torch.tensor([1, 1, 0, 1, 1, 1]).bool()))
    both.each(lambda net, _: tidy_masks(net, X))
    train(both.masked, both.optimizer, batches())
    with pk.compacted(both.other, X, both.its) as (net, opt):
        train(net, opt, batches())
    both.check()


def test_with_and_without_an_optimizer_by_turns():
    """Evaluation in between traces the network once more, and then no more."""
    both = Both()
    seen = set()
    for seed in (1, 2, 1):
        both.block(seed)
        with pk.compacted(both.other, X) as (net, opt):
            assert opt is None
            seen.add(id(net))
            torch.testing.assert_close(copy.deepcopy(net).eval()(X), copy.deepcopy(both.masked).eval()(X), **CLOSE)
    both.check()
    assert len(seen) == 1


def test_state_dicts_that_are_held_follow():
    """As averages of weights and exporters hold them; dead entries are zero in them."""
    net = mask_small(small(), 1)
    optimizer = sgd(net)
    held = net.state_dict()
    with pk.compacted(net, X, optimizer) as (inside, opt):
        train(inside, opt, batches())
    now = net.state_dict()
    for name, tensor in held.items():
        assert torch.equal(tensor, now[name]), name
    with torch.no_grad():
        held["second.weight"].fill_(0.5)
    with pk.compacted(net, X, optimizer) as (inside, _):
        assert (inside.second.weight == 0.5).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_entered_first_without_gradients(mode):
    """To evaluate, say; the same masks train later."""
    both = Both()
    both.each(lambda net, _: mask_small(net, 1))
    for optimizer in (None, both.its):
        with mode(), pk.compacted(both.other, X, optimizer) as (net, _):
            copy.deepcopy(net).eval()(X)
    both.check()
    both.block(1)
    both.block(2)
    both.check()


def test_blocks_within_live_mode():
    both = Both()
    pk.flow(both.other)
    for seed in (1, 2, 1):
        both.block(seed)
    both.check()
    assert both.other.second._flow
    c = Compaction(both.other, X)
    inside, _ = c.enter()
    assert type(inside.first(X)) is torch.Tensor
    c.leave()


@pytest.mark.parametrize("norms", [True, False])
def test_a_network_that_moves_to_another_dtype(norms):
    """Parameters stay the same objects; without norms no buffer tells."""
    net = mask_small(small(), 1)
    if not norms:
        net.first[1] = nn.Identity()
    with pk.compacted(net, X) as (inside, _):
        assert inside.second.weight.dtype == torch.float64
    net.float()
    with pk.compacted(net, X.float()) as (inside, _):
        assert {p.dtype for p in inside.parameters()} == {torch.float32}
        torch.testing.assert_close(inside.eval()(X.float()), copy.deepcopy(net).eval()(X.float()))
    net.double()
    with pk.compacted(net, X) as (inside, _):
        torch.testing.assert_close(inside.eval()(X), copy.deepcopy(net).eval()(X), **CLOSE)


def test_a_layer_that_is_restored():
    """pk.restore makes plain layers: nothing of them is small any more."""
    net = mask_small(small(), 1)
    with pk.compacted(net, X):
        pass
    pk.restore(net)
    with pk.compacted(net, X, sgd(net)) as (inside, opt):
        assert all(a is b for a, b in zip(inside.parameters(), net.parameters(), strict=True))
        train(inside, opt, batches())
    assert not any(isinstance(m, (pk.MaskedConv2d, pk.MaskedBatchNorm2d)) for m in net.modules())


def test_plain_layers_of_the_users_class():
    """A subclass without a forward of its own stays what it is."""

    class Mine(nn.Conv2d):
        pass

    net = nn.Sequential(Mine(3, 6, 3), nn.ReLU(), Mine(6, 2, 1)).double()
    pk.convert(net)
    net[0].set_masks(filter=torch.tensor([1, 0, 1, 1, 0, 1]).bool())
    with pk.compacted(net, X) as (inside, _):
        assert type(inside[0]) is Mine and inside[0].out_channels == 4
