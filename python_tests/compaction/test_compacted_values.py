"""What goes over the border: odd values, modes, gradients; copies, pickles, threads."""

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch

import prunekernels as pk
from cases.compacted import (
    CLOSE,
    assert_same_training,
    batches,
    bind,
    dead_entries,
    loss_of,
    mask_small,
    outputs,
    pair,
    sgd,
    small,
    small_images,
    train,
)
from prunekernels.compaction.compaction import Compaction

X = small_images()
KEEP = torch.tensor([1, 0, 1, 1, 0, 1]).bool()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_odd_numbers_where_nothing_is_live(value):
    masked, optimizer, other, its = pair()
    for net in (masked, other):
        dead = ~net.first[0].filter_mask
        with torch.no_grad():
            net.first[0].weight[dead] = value
            net.first[1].bias[dead] = value
            net.first[1].running_mean[dead] = value
            net.first[1].running_var[dead] = value
            net.second.weight[~net.second.filter_mask] = value
            net.second.bias[~net.second.filter_mask] = value
    train(masked, optimizer, batches())
    before = dead_entries(other)
    with pk.compacted(other, X, its, verify=True) as (net, opt):
        assert all(torch.isfinite(t).all() for t in net.state_dict().values())
        train(net, opt, batches())
    assert all(torch.equal(v.nan_to_num(7.0), before[k].nan_to_num(7.0)) for k, v in dead_entries(other).items())
    assert_same_training(masked, optimizer, other, its, close=CLOSE | {"equal_nan": True})


@pytest.mark.parametrize("where", ["first", "second", "both"])
def test_all_filters_of_a_layer_dead(where):
    masked, optimizer, other, its = pair()
    for net in (masked, other):
        if where != "second":
            net.first[0].set_masks(filter=torch.zeros(6).bool())
            net.first[1].set_mask(torch.zeros(6).bool())
        if where != "first":
            net.second.set_masks(filter=torch.zeros(5).bool())
    train(masked, optimizer, batches())
    with pk.compacted(other, X, its, verify=True) as (net, opt):
        train(net, opt, batches())
    assert_same_training(masked, optimizer, other, its)


def test_one_image_and_none():
    masked, optimizer, other, its = pair()
    for net in (masked, other):
        net.first[1].eval()
    data = [*batches((1, 3, 4, 4)), torch.zeros(0, 3, 4, 4, dtype=torch.float64)]
    loop = [lambda net, opt, x: (opt.zero_grad(), net(x).square().sum().backward(), opt.step())]
    for x in data:
        loop[0](masked, optimizer, x)
    with pk.compacted(other, small_images(1), its) as (net, opt):
        for x in data:
            loop[0](net, opt, x)
    assert_same_training(masked, optimizer, other, its)


def test_without_an_optimizer():
    net = mask_small(small(), 1)
    before = dead_entries(net)
    with pk.compacted(net, X) as (inside, opt):
        assert opt is None
        with torch.no_grad():
            for p in inside.parameters():
                p.add_(1)
    for name, values in dead_entries(net).items():
        assert torch.equal(values, before[name])
    live = net.second.filter_mask
    assert torch.equal(net.second.bias[live], small().second.bias[live] + 1)


def test_evaluating_inside():
    masked, optimizer, other, its = pair()
    for x in batches():
        train(masked, optimizer, [x])
    with pk.compacted(other, X, its) as (net, opt):
        for x in batches():
            train(net, opt, [x])
            net.eval()
            loss_of(net(x))
            net.train()
        inside = outputs(net, X)
        net.eval()
    assert_same_training(masked, optimizer, other, its)
    torch.testing.assert_close(outputs(other, X), inside, **CLOSE)
    assert all(module.training for module in other.modules())


def test_modes_are_taken_over_at_each_entering():
    net = mask_small(small(), 1)
    with pk.compacted(net, X) as (inside, _):
        assert inside.training
        inside.eval()
    assert net.training
    with pk.compacted(net, X) as (inside, _):
        assert all(m.training for m in inside.modules())
    net.eval()
    net.first[0].train()
    with pk.compacted(net, X) as (inside, _):
        assert [m.training for m in inside.modules()] == [m.training for m in net.modules()]


def test_gradients_stay_on_their_side():
    net = mask_small(small(), 1)
    loss_of(net(X)).backward()
    before = {name: p.grad.clone() for name, p in net.named_parameters()}
    with pk.compacted(net, X) as (inside, _):
        assert all(p.grad is None for p in inside.parameters())
        loss_of(inside(X)).backward()
    for name, p in net.named_parameters():
        assert torch.equal(p.grad, before[name]), name


def test_a_state_dict_loaded_into_the_small_network():
    net = mask_small(small(), 1)
    with pk.compacted(net, X) as (inside, _):
        state = {name: torch.full_like(t, 2) for name, t in inside.state_dict().items()}
        inside.load_state_dict(state)
    assert (net.second.weight[net.second.filter_mask][:, net.first[0].filter_mask] == 2).all()
    assert (net.last.weight == 2).all() and (net.first[1].running_var[net.first[1].channel_mask] == 2).all()


def test_keys_of_the_small_network_are_the_models():
    net = mask_small(small(), 1)
    with pk.compacted(net, X) as (inside, _):
        assert inside.state_dict().keys() == {key for key in net.state_dict() if "mask" not in key}
        assert [n for n, _ in inside.named_modules()] == [n for n, _ in net.named_modules()]
        assert type(inside) is type(net)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_copies_of_the_model(copied):
    """During and after a block; the copy is an ordinary masked network."""
    masked, optimizer, other, its = pair()
    with pk.compacted(other, X, its) as (net, opt):
        train(net, opt, batches())
        during = copied(other)
        assert torch.equal(
            during.second.weight[~other.second.filter_mask], other.second.weight[~other.second.filter_mask]
        )
        outputs(during, X)
    after = copied(other)
    assert all(torch.equal(a, b) for a, b in zip(after.state_dict().values(), other.state_dict().values(), strict=True))
    mine = sgd(after)
    bind(after, mine, "dead")
    mine.load_state_dict(copy.deepcopy(its.state_dict()))
    train(masked, optimizer, batches()), train(masked, optimizer, batches(seed=1))
    with pk.compacted(after, X, mine) as (net, opt):
        train(net, opt, batches(seed=1))
    assert_same_training(masked, optimizer, after, mine)


def test_a_copy_of_the_small_network():
    net = mask_small(small(), 1)
    with pk.compacted(net, X) as (inside, _):
        copied = copy.deepcopy(inside)
        buffer = io.BytesIO()
        torch.save(inside, buffer)
        want = outputs(inside, X)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
    for other in (copied, loaded):
        assert torch.equal(outputs(other, X), want)
        assert all(torch.isfinite(p).all() for p in other.parameters())


def test_nothing_is_left_of_a_model_that_is_gone():
    def run(make):
        net = make()
        optimizer = sgd(net)
        with pk.compacted(net, X, optimizer) as (inside, opt):
            train(inside, opt, batches())
        return weakref.ref(net)

    def alone():
        layer = pk.MaskedConv2d(3, 6, 3).double()
        layer.set_masks(filter=KEEP)
        return layer

    def with_hook():
        net = mask_small(small(), 1)
        net.second.register_forward_hook(lambda *_: print(end=str(net)[:0]))  # the hook has the model
        return net

    for make in (lambda: mask_small(small(), 1), alone, with_hook):
        gone = run(make)
        gc.collect()
        assert gone() is None


def test_the_model_goes_before_the_compaction():
    net = mask_small(small(), 1)
    c = Compaction(net, X)
    c.enter()
    c.leave()
    del net
    gc.collect()
    with pytest.raises(
        RuntimeError, match="compacted: model: expected the network that it was made for, which is gone"
    ):
        c.enter()


def test_two_networks_in_two_threads():
    made = [pair(), pair()]
    for masked, optimizer, _, _ in made:
        train(masked, optimizer, batches(steps=3))
    errors = []

    def run(other, its):
        try:
            with pk.plan.measure(False), pk.compacted(other, X, its) as (net, opt):
                train(net, opt, batches(steps=3))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=four[2:]) for four in made]
    for _, _, other, its in made:
        with pk.compacted(other, X, its):  # traced one after the other: torch.export is not for threads
            pass
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for four in made:
        assert_same_training(*four)
