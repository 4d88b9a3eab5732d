"""What both networks share, what is reused, and how the modules of a user hang together."""

import copy
import gc
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
    loss_of,
    mask_small,
    outputs,
    pair,
    sgd,
    small,
    small_images,
    tensors_of,
    train,
)
from cases.networks import conv_norm
from prunekernels.compaction.compaction import Compaction

X = small_images()
KEEP = torch.tensor([1, 0, 1, 1, 0, 1]).bool()


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
