"""Averages of weights (EMA, SWA) of a masked network: masks are copied or refused, never averaged."""

import copy
import types

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_multi_avg_fn

import prunekernels as pk
from cases.averages import (
    AVERAGES,
    ByKeptStateDict,
    ByLerpOfStateDict,
    ByStateDict,
    TorchAverage,
    TorchEma,
    TorchEmaOfBuffers,
    masked_net,
    swap,
)  # fmt: skip
from cases.layers import bools

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
KEEP = bools(1, 0, 1, 1, 0, 1, 1, 0)
FOLLOW_BY_THEMSELVES = (TorchAverage, TorchEma)
AVERAGED = r"expected 0 or 1, got 0\.\d+, as averages of different masks have.*followers.*copy_masks"


def masks(net):
    named = ((name, m) for name, m in net.named_modules() if hasattr(m, "_mask_names"))
    return {f"{name}.{key}": getattr(m, key).clone() for name, m in named for key in m._mask_names}


def prune(net, keep=KEEP):
    net[0].set_masks(filter=keep)
    if isinstance(net[1], pk.MaskedBatchNorm2d):
        net[1].set_mask(keep)
    net[3].set_masks(input=keep, kernel=torch.arange(48).view(6, 8) % 5 != 0)


def step(net, optimizer, seed=0):
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    net.train()(x).square().mean().backward()
    optimizer.step()


def assert_same_masks(net, average):
    a, b = masks(net), masks(average)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(mask.all() for mask in a.values())


def assert_means_the_same_when_plain(net):
    """What the network computes is what a plain one computes with its state dict, and what shrink makes of it."""
    want = net.eval()(X)
    plain = copy.deepcopy(net)
    pk.restore(plain, bake=True)  # a group norm with dead channels goes on normalizing the live ones
    fixed = {f"{name}.{key}" for name, m in plain.named_modules() if hasattr(m, "order") for key in ("order", "place")}
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    left_out = plain.load_state_dict(net.state_dict(), strict=False)
    assert set(left_out.missing_keys) == fixed and all(key.endswith("_mask") for key in left_out.unexpected_keys)
    torch.testing.assert_close(plain.eval()(X), want)
    small = pk.shrink(net, X)
    torch.testing.assert_close(small(X), want, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize("make", AVERAGES)
@pytest.mark.parametrize("duty", [0.0, 0.5])
def test_ema_follows_a_method(make, duty):
    net = masked_net()
    optimizer, average = torch.optim.SGD(net.parameters(), 0.05, 0.9, weight_decay=0.01), make(net)
    method = pk.methods.GHFP(
        net, optimizer, rate=0.5, epochs=3, duty=duty, steps_per_epoch=4, example_input=X, followers=[average.holder]
    )
    for epoch in range(3):
        for i in range(4):
            step(net, optimizer, 4 * epoch + i)
            method.step()
            average.update(net)
            assert all(map(torch.equal, masks(net).values(), masks(average.network).values()))
        method.end_epoch()
        with method.masked():
            assert_same_masks(net, average.network)
        assert all(map(torch.equal, masks(net).values(), masks(average.network).values()))
    average.update(net)
    assert_same_masks(net, average.network)
    assert_means_the_same_when_plain(average.network)


def expected_ema(history, decay=0.9):
    value = history[0]
    for new in history[1:]:
        value = decay * value + (1 - decay) * new
    return value


@pytest.mark.parametrize("make", [c for c in AVERAGES if c is not TorchAverage])
@pytest.mark.parametrize("nonzero", [False, True], ids=["zeros", "stored values"])
def test_ema_of_live_weights_is_the_usual_one(make, nonzero):
    """Masks that stay as they are, over dead weights that are zero or not, change nothing in what is live."""
    net = masked_net()
    prune(net)
    if not nonzero:
        for layer in (net[0], net[1], net[3]):
            layer.zero_dead()
    optimizer, average = torch.optim.SGD(net.parameters(), 0.05), make(net)
    binding = pk.optim.bind(optimizer, net, freeze="dead")
    history = [net[0].weight[KEEP].detach().clone()] * (not isinstance(average, TorchAverage))
    for i in range(5):
        step(net, optimizer, i)
        average.update(net)
        history.append(net[0].weight[KEEP].detach().clone())
    binding.remove()
    torch.testing.assert_close(average.network.eval()[0](X)[:, KEEP], torch.nn.functional.conv2d(
        X, expected_ema(history), average.network[0].bias[KEEP], padding=1), rtol=1e-5, atol=1e-5)  # fmt: skip
    torch.testing.assert_close(average.network[0].weight[KEEP], expected_ema(history))
    assert_same_masks(net, average.network)
    assert_means_the_same_when_plain(average.network)


@pytest.mark.parametrize("make", AVERAGES)
def test_ema_without_followers_follows_or_says_so(make):
    net = masked_net()
    average = make(net)
    average.update(net)
    average.update(net)
    prune(net)
    with torch.no_grad():
        if make in FOLLOW_BY_THEMSELVES:
            average.update(net)
            assert_same_masks(net, average.network)
            assert_means_the_same_when_plain(average.network)
            return
        average.update(net)
        with pytest.raises(ValueError, match=AVERAGED):
            average.network(X)
        with pytest.raises(ValueError, match=AVERAGED):
            average.network.state_dict()
        with pytest.raises(ValueError, match=AVERAGED):
            copy.deepcopy(average.network)
        pk.copy_masks(net, average.holder)
        assert_same_masks(net, average.network)
        average.update(net)
        assert_means_the_same_when_plain(average.network)


@pytest.mark.parametrize("decay", [0.1, 0.37, 0.5, 0.9, 0.99, 0.999, 0.9997, 0.9999, 0.99998])
@pytest.mark.parametrize(
    "update",
    [
        lambda e, m, d: torch._foreach_lerp_([e], [m], 1 - d),
        lambda e, m, d: e.copy_(d * e + (1.0 - d) * m),
        lambda e, m, d: e.mul_(d).add_(m, alpha=1 - d),
        lambda e, m, d: get_ema_multi_avg_fn(d)([e], [m], 1),
        lambda e, m, d: e.copy_(get_ema_avg_fn(d)(e, m, 1)),
        lambda e, m, d: get_swa_multi_avg_fn()([e], [m], torch.tensor(1 / d)),
    ],
)
def test_ema_of_equal_masks_is_exact_and_of_others_shows(update, decay):
    layer, average = pk.MaskedConv2d(4, 8, 3), pk.MaskedConv2d(4, 8, 3)
    for each in (layer, average):
        each.set_masks(filter=KEEP)
    mine, theirs = average._buffers["filter_mask"], layer._buffers["filter_mask"]
    for _ in range(300):
        update(mine, theirs, decay)
    assert torch.equal(average.filter_mask, KEEP)
    layer.set_masks(filter=~KEEP)
    update(mine, theirs, decay)
    with pytest.raises(ValueError, match="averages of different masks"):
        average(torch.zeros(1, 4, 5, 5))


def test_ema_and_swa_of_buffers_where_no_buffer_counts():
    """torch's own average refuses integer buffers, such as the counter of a batch norm; masks are none."""
    net = masked_net(norms=False)
    prune(net)
    average = AveragedModel(net, use_buffers=True)
    for _ in range(3):
        average.update_parameters(net)
    assert torch.equal(average.module[0].filter_mask, KEEP)
    assert {buffer.dtype for buffer in net.buffers()} == {torch.float32}


def test_ema_update_bn():
    net = masked_net()
    average = AveragedModel(net)
    prune(net)
    average.update_parameters(net)
    torch.optim.swa_utils.update_bn([X, X], average)
    assert_same_masks(net, average.module)
    assert_means_the_same_when_plain(average.module)


@pytest.mark.parametrize("live", [False, True], ids=["masked mode", "live mode"])
def test_ema_swapped_with_the_network_past_version_counters(live):
    """The order of Lightning: eval, swap, validation, swap back, train."""
    net = masked_net()
    average = copy.deepcopy(net)
    prune(average)
    pk.flow(net, live)
    want, want_pruned = net.eval()(X), average.eval()(X)
    net.train()(X)
    net.load_state_dict(masked_net().state_dict())  # the statistics of before
    net.eval()
    swap(average, net)
    with pytest.warns(UserWarning, match="masks of a network were replaced through .data"):
        torch.testing.assert_close(net(X), want_pruned)
    assert torch.equal(net[0].filter_mask, KEEP)
    swap(average, net)
    net.train()
    net.eval()
    with pytest.warns(UserWarning, match="masks of a network were replaced through .data"):
        torch.testing.assert_close(net(X), want)
    assert net[0].filter_mask.all()


@pytest.mark.parametrize("each_step", [True, False])
def test_a_broadcast_is_noticed_whatever_its_versions(monkeypatch, each_step):
    """DistributedDataParallel broadcasts past the version counters: always when it is made, if asked in each step."""
    net, first = masked_net(), masked_net()
    net.train()(X)
    prune(first)
    ddp = types.SimpleNamespace(broadcast_buffers=each_step, module=net)
    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", ddp)
    swap(first, net)
    net(X)
    assert torch.equal(net[0].filter_mask, KEEP) and net[0].density == KEEP.float().mean()
    if each_step:
        swap(first, net)
        net(X)
        assert net[0].filter_mask.all()


def test_ema_swap_of_averaged_masks_is_refused():
    net = masked_net()
    net.train()(X)
    average = TorchEmaOfBuffers(net)
    average.update(net)
    prune(net)
    average.update(net)
    net.eval()
    swap(average.network, net)
    with pytest.raises(ValueError, match=AVERAGED):
        net(X)


# ---- copy_masks


def test_copy_masks_zeroes_what_dies_and_takes_over_what_comes_back():
    net, other = masked_net(seed=0), masked_net(seed=1)
    other[0].set_masks(filter=~KEEP)
    before = other[0].weight.detach().clone()
    net[0].set_masks(filter=KEEP)
    pk.copy_masks(net, other)
    assert torch.equal(other[0].filter_mask, KEEP)
    assert not other[0].weight[~KEEP].any() and not other[0].bias[~KEEP].any()
    assert torch.equal(other[0].weight[KEEP], net[0].weight[KEEP])
    assert not torch.equal(before[KEEP], net[0].weight[KEEP])
    assert torch.equal(other[3].weight, masked_net(seed=1)[3].weight)


@pytest.mark.parametrize(
    ("wrap", "inside"),
    [
        (lambda net: net, lambda wrapped: wrapped),
        (AveragedModel, lambda wrapped: wrapped.module),
        (nn.DataParallel, lambda wrapped: wrapped.module),
        (lambda net: torch.compile(net, backend="eager"), lambda wrapped: wrapped._orig_mod),
        (ByStateDict, lambda wrapped: wrapped.module),
        (ByKeptStateDict, lambda wrapped: wrapped.ema),
        (lambda net: lambda: net, lambda wrapped: wrapped()),
        (lambda net: types.SimpleNamespace(_average_model=AveragedModel(net)), lambda w: w._average_model.module),
    ],
)
def test_copy_masks_finds_the_network(wrap, inside):
    net, wrapped = masked_net(), wrap(masked_net())
    prune(net)
    pk.copy_masks(wrap(net), wrapped)
    assert_same_masks(net, inside(wrapped))


def test_copy_masks_to_nothing_yet():
    pk.copy_masks(masked_net(), lambda: None)


def test_copy_masks_refuses_another_network():
    net = masked_net()
    plain = copy.deepcopy(net)
    pk.restore(plain)
    wider = masked_net()
    wider[6] = pk.MaskedConv2d(6, 9, 1)
    prune(net)
    with pytest.raises(ValueError, match=r"(?s)copy_masks: source: expected masked layers.*got none"):
        pk.copy_masks(plain, net)
    with pytest.raises(ValueError, match=r"(?s)copy_masks: target: 0: expected a MaskedConv2d.*pk.convert.*got Conv2d"):
        pk.copy_masks(net, plain)
    with pytest.raises(
        ValueError, match=r"(?s)copy_masks: target: 6: expected MaskedConv2d\(6, 4.*got MaskedConv2d\(6, 9"
    ):
        pk.copy_masks(net, wider)
    assert wider[0].filter_mask.all()  # an error changes nothing
    with pytest.raises(ValueError, match=r"copy_masks: target: 4: expected a Masked.*got nothing"):
        pk.copy_masks(net, net[:4])
    with pytest.raises(ValueError, match=r"copy_masks: target: 4: expected no masked layer there"):
        pk.copy_masks(net[:4], net)
    with pytest.raises(ValueError, match=r"copy_masks: target: expected a network, or what holds one, got int"):
        pk.copy_masks(net, 3)


# ---- followers


def test_ema_followers_follow_a_loaded_state():
    def made():
        net = masked_net()
        average = TorchEmaOfBuffers(net)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        return (
            net,
            average,
            pk.methods.SRFP(net, optimizer, rate=0.5, epochs=2, example_input=X, followers=[average.holder]),
        )

    net, average, method = made()
    step(net, method.optimizer)
    method.step()
    method.end_epoch()
    method.end_epoch()
    state = method.state_dict()
    net, average, method = made()
    method.load_state_dict(state)
    assert_same_masks(net, average.network)
    pruned = masks(net)
    assert method.followers == [average.holder] and not all(mask.all() for mask in pruned.values())


@pytest.mark.parametrize("bad", [masked_net()[:3], nn.Conv2d(3, 3, 3)])
def test_ema_followers_must_match(bad):
    net = masked_net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with pytest.raises(ValueError, match="GHFP: followers: target: .*expected a Masked"):
        pk.methods.GHFP(net, optimizer, followers=[bad])
    with pytest.raises(ValueError, match="GHFP: followers: expected a list, got AveragedModel"):
        pk.methods.GHFP(net, optimizer, followers=AveragedModel(net))
    assert not optimizer._optimizer_step_pre_hooks


def test_ema_followers_of_kernels():
    net = masked_net()
    average = ByLerpOfStateDict(net)
    data = [(X, torch.arange(4) % 3)]
    method = pk.methods.CoarsePruning(
        net, torch.optim.SGD(net.parameters(), 0.1), rate=0.3, kernel_rate=0.5, epochs=4, data=data, masks=2,
        example_input=X, followers=[average],
    )  # fmt: skip
    for _ in range(4):
        method.end_epoch()
    assert not net[3].kernel_mask.all()
    assert_same_masks(net, average.module)
