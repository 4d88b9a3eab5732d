"""The border between a network and its compacted form: errors, odd values, what is shared, what is written back."""

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.compacted import (
    CLOSE,
    assert_same_training,
    batches,
    bind,
    dead_entries,
    loss_of,
    mask_small,
    small,
    small_images,
    tensors_of,
    train,
)
from cases.networks import conv_norm
from prunekernels.compaction.compaction import Compaction

X = small_images()
KEEP = torch.tensor([1, 0, 1, 1, 0, 1]).bool()


@pytest.fixture(autouse=True)
def _model_decides():
    with pk.plan.measure(False):
        yield


def sgd(net, **options):
    return torch.optim.SGD(net.parameters(), **({"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1} | options))


def pair():
    """The same masked network twice, with bound optimizers."""
    made = []
    for _ in range(2):
        net = mask_small(small(), 1)
        optimizer = sgd(net)
        bind(net, optimizer, "dead")
        made += [net, optimizer]
    return made


def outputs(net, x=X):
    with torch.no_grad():
        return copy.deepcopy(net).eval()(x)


# ---- errors


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
    torch.testing.assert_close(outputs(inside), outputs(net))
    c.leave()


def test_a_network_without_masked_layers():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).double()
    with pk.compacted(net, X) as (inside, _):
        assert torch.equal(inside(X), net(X))


# ---- values


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
        inside = outputs(net)
        net.eval()
    assert_same_training(masked, optimizer, other, its)
    torch.testing.assert_close(outputs(other), inside, **CLOSE)
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


# ---- copies


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
        outputs(during)
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
        want = outputs(inside)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
    for other in (copied, loaded):
        assert torch.equal(outputs(other), want)
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


# ---- what is shared


def test_what_masks_leave_whole_is_shared():
    net = mask_small(small(), 1)
    with pk.compacted(net, X, sgd(net)) as (inside, opt):
        assert inside.last is net.last
        assert inside.last.weight is net.last.weight
        own = {id(p) for p in inside.parameters()} - {id(p) for p in net.parameters()}
        names = {name for name, p in inside.named_parameters() if id(p) in own}
        assert names == {
            "first.0.weight", "first.1.weight", "first.1.bias", "second.weight", "second.bias", "hidden.weight"
        }  # fmt: skip
        assert sum(p.numel() for p in inside.parameters()) < sum(p.numel() for p in net.parameters())
        assert any(p is net.last.weight for p in opt.param_groups[0]["params"])


def test_nothing_dead_is_all_shared():
    masked, optimizer, other, its = pair()
    for net in (masked, other):
        net.first[0].set_masks(filter="all"), net.first[1].set_mask("all"), net.second.set_masks(filter="all")
    train(masked, optimizer, batches())
    with pk.compacted(other, X, its) as (net, opt):
        for (name, a), b in zip(net.named_parameters(), other.parameters(), strict=True):
            assert a is b, name
        for a, b in zip(net.buffers(), (b for n, b in other.named_buffers() if "mask" not in n), strict=True):
            assert a is b
        assert not any(isinstance(m, (pk.MaskedConv2d, pk.MaskedBatchNorm2d)) for m in net.modules())
        train(net, opt, batches())
    assert_same_training(masked, optimizer, other, its, exact=True)


def test_masks_that_come_back_find_their_tensors():
    net = small()
    c = Compaction(net, X, sgd(net))
    seen = {}
    for seed in (1, 2, 1, 2, 2):
        mask_small(net, seed)
        inside, opt = c.enter()
        assert (inside, opt) == (c.net, c.opt)
        trained = [p for group in opt.param_groups for p in group["params"]]
        known = seen.setdefault(seed, (c.cut, list(inside.parameters()), trained))
        assert known[0] is c.cut
        assert all(a is b for a, b in zip(known[1], inside.parameters(), strict=True))
        assert all(a is b for a, b in zip(known[2], trained, strict=True))
        train(inside, opt, batches())
        c.leave()
    assert seen[1][0] is not seen[2][0]


def test_few_sets_of_masks_are_kept():
    net = small()
    c, cuts = Compaction(net, X), []
    for i in range(15):
        net.second.set_masks(filter=torch.tensor([i >> k & 1 for k in range(5)]).bool())
        c.enter()
        cuts.append(weakref.ref(c.cut))
        c.leave()
    gc.collect()
    assert sum(cut() is not None for cut in cuts) <= 6


def test_reuse_gathers_only_what_was_written_to():
    net = mask_small(small(), 1)
    c = Compaction(net, X, sgd(net))
    inside, opt = c.enter()
    train(inside, opt, batches())
    c.leave()
    versions = [p._version for p in inside.parameters()]
    states = [s._version for p in inside.parameters() for s in opt.state[p].values()]
    c.enter(reuse=True)
    assert [p._version for p in inside.parameters()] == versions
    assert [s._version for p in inside.parameters() for s in opt.state[p].values()] == states
    train(inside, opt, batches(seed=1))
    c.leave()
    with torch.no_grad():
        net.second.weight.mul_(2)
    c.enter(reuse=True)
    live = net.second.filter_mask
    torch.testing.assert_close(inside.second.weight, net.second.weight[live][:, net.first[0].filter_mask])
    c.leave()


@pytest.mark.parametrize("kind", ["sgd", "masked_sgd", "adamw"])
def test_reuse_equals_gathering_anew(kind):
    """Also with steps in masked mode between, by whatever kernels."""
    made = {
        "sgd": lambda net: torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, foreach=True),
        "masked_sgd": lambda net: pk.optim.MaskedSGD(net.parameters(), 0.05, momentum=0.9),
        "adamw": lambda net: torch.optim.AdamW(net.parameters(), 0.01, fused=True),
    }[kind]
    found = []
    for reuse in (False, True):
        net = mask_small(small(), 1)
        optimizer = made(net)
        c = Compaction(net, X, optimizer)
        for seed in range(4):
            inside, opt = c.enter(reuse=reuse)
            train(inside, opt, batches(seed=seed))
            c.leave()
            if seed % 2:
                train(net, optimizer, batches(seed=10 + seed))
        found.append(tensors_of(net, optimizer))
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name


def test_write_back_goes_on():
    masked, optimizer, other, its = pair()
    c = Compaction(other, X, its)
    net, opt = c.enter()
    for seed in range(3):
        train(masked, optimizer, batches(seed=seed))
        train(net, opt, batches(seed=seed))
        c.write_back()
        assert c.entered
        assert_same_training(masked, optimizer, other, its)
    c.leave()
    assert_same_training(masked, optimizer, other, its)


def test_masks_changed():
    net = mask_small(small(), 1)
    c = Compaction(net, X)
    assert c.cut is None and c.masks_changed
    c.enter()
    assert not c.masks_changed
    c.leave()
    assert not c.masks_changed
    net.eval(), net(X), net.train()
    assert not c.masks_changed
    net.first[1].channel_mask[0] = False
    assert c.masks_changed


def test_rows_and_widen():
    net = mask_small(small(), 1)
    c = Compaction(net, X)
    inside, _ = c.enter()
    live = net.second.filter_mask
    assert c.rows("second").tolist() == live.nonzero().flatten().tolist()
    assert c.rows("last") is None
    wide = c.widen("second.weight", torch.ones_like(inside.second.weight))
    assert torch.equal(wide, (live[:, None] & net.first[0].filter_mask).double()[:, :, None, None].expand_as(wide))
    assert torch.equal(c.widen("last.weight", net.last.weight), net.last.weight)
    loss_of(inside(X)).backward()
    loss_of(net(X)).backward()
    for name, p in inside.named_parameters():
        grad = dict(net.named_parameters())[name].grad
        if p.grad is not None and p is not dict(net.named_parameters())[name]:
            torch.testing.assert_close(c.widen(name, p.grad), grad, **CLOSE)
    c.leave()


def test_rows_with_frozen_zeros():
    net = small()
    net.first[0].set_masks(filter=KEEP)  # the norm is live, so its channels are constants
    c = Compaction(net, X)
    inside, _ = c.enter()
    assert inside.first[0].out_channels == 6
    assert c.rows("first.0").tolist() == [0, -1, 2, 3, -1, 5]
    assert not inside.first[0].weight[~KEEP].any()
    c.leave()


# ---- structures


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.fc(F.relu(self.b(F.relu(self.a(F.relu(self.stem(x)))))).mean((2, 3)))


def test_tied_weights():
    torch.manual_seed(0)
    masked = Tied().double()
    pk.convert(masked)
    other = copy.deepcopy(masked)
    optimizer, its = sgd(masked, momentum=0, weight_decay=0), sgd(other, momentum=0, weight_decay=0)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for keep in ([1, 0, 1, 1], [1, 1, 0, 1]):
        for net in (masked, other):
            net.a.set_masks(filter=torch.tensor(keep).bool())
            net.b.set_masks(filter=torch.tensor(keep).bool())
        train(masked, optimizer, batches((2, 3, 6, 6)))
        with pk.compacted(other, x, its) as (net, opt):
            assert net.a.weight is net.b.weight
            torch.testing.assert_close(outputs(net, x), outputs(other, x))
            train(net, opt, batches((2, 3, 6, 6)))
        assert_same_training(masked, None, other, None)
    other.b.set_masks(filter="all")  # one tensor cannot have two sets of zeros
    with pytest.raises(ValueError, match="compacted: a and b: expected the same masks on layers that share parameters"):
        with pk.compacted(other, x, its):
            raise AssertionError("entered")
    other.a.set_masks(filter="all")
    with pk.compacted(other, x, its):
        pass


class Aliases(nn.Module):
    """Its forward reaches layers by a plain list and by a second name too."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.fc = conv_norm(3, 6), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 2)
        self.again = self.body
        self.heads = [self.fc]
        self.stages = [(self.body, self.stem)]

    def forward(self, x):
        x = self.stages[0][1](x)
        x = F.relu(self.stages[0][0](x)) + self.again(x)
        return self.heads[0](x.mean((2, 3)))


def test_layers_under_several_names():
    torch.manual_seed(0)
    masked = Aliases().double()
    pk.convert(masked)
    # convert replaces layers by name: the lists are made anew, as a user would have to
    masked.heads, masked.stages = [masked.fc], [(masked.body, masked.stem)]
    for keep in (KEEP, torch.ones(6).bool()):
        masked.stem[0].set_masks(filter=keep)
        masked.stem[1].set_mask(keep)
        masked.body.set_masks(filter=keep)
        other = copy.deepcopy(masked)
        optimizer, its = sgd(masked), sgd(other)
        bind(masked, optimizer, "dead"), bind(other, its, "dead")
        train(masked, optimizer, batches())
        with pk.compacted(other, X, its) as (net, opt):
            assert net.again is net.body
            train(net, opt, batches())
        assert_same_training(masked, optimizer, other, its)


@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm"])
def test_weights_that_are_computed(how):
    """Such a layer keeps its width, and says so; the others are small."""
    parametrized = getattr(nn.utils.parametrizations, how)
    torch.manual_seed(0)
    net = nn.Sequential(conv_norm(3, 6), parametrized(nn.Conv2d(6, 6, 3)), nn.ReLU(), nn.Conv2d(6, 4, 1)).double()
    masked = pk.convert(net) and net
    masked[1].set_masks(filter=KEEP)
    masked[3].set_masks(filter=torch.tensor([1, 0, 1, 1]).bool())
    masked[0][0].set_masks(filter=KEEP)
    masked[0][1].set_mask(KEEP)
    other = copy.deepcopy(masked)
    optimizer, its = sgd(masked), sgd(other)
    bind(masked, optimizer, "dead"), bind(other, its, "dead")
    train(masked, optimizer, batches((2, 3, 6, 6)))
    c = Compaction(other, torch.randn(2, 3, 6, 6, dtype=torch.float64), its)
    inside, opt = c.enter()
    assert c.wide == {"1": "it computes its weight"}
    assert inside[3].out_channels == 4 and isinstance(inside[1], pk.MaskedConv2d)
    train(inside, opt, batches((2, 3, 6, 6)))
    c.leave()
    assert_same_training(masked, optimizer, other, its)


class Counting(nn.Module):
    """Counts its runs in a number and in a buffer, and keeps an average of what it sees in another buffer."""

    def __init__(self):
        super().__init__()
        self.body, self.fc, self.runs = conv_norm(3, 6), nn.Linear(6, 2), 0
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x):
        x = self.fc(self.body(x).mean((2, 3)))
        if self.training:
            self.runs += 1
            self.seen += 1
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x


def test_state_of_the_users_own():
    torch.manual_seed(0)
    masked = Counting().double()
    pk.convert(masked)
    masked.body[0].set_masks(filter=KEEP)
    masked.body[1].set_mask(KEEP)
    other = copy.deepcopy(masked)
    optimizer, its = sgd(masked), sgd(other)
    bind(masked, optimizer, "dead"), bind(other, its, "dead")
    for seed in range(2):
        train(masked, optimizer, batches(seed=seed))
        with pk.compacted(other, X, its) as (net, opt):
            train(net, opt, batches(seed=seed))
        assert other.runs == masked.runs == 2 * (seed + 1)
        assert_same_training(masked, optimizer, other, its)
