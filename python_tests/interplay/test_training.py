"""What training loops put around a network, in each mode and over a change of masks by a method, against a judge of
plain operators that gets the same.
"""

import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import prunekernels as pk
from cases.judged import MODES, assert_same_network, batches, pair, pruned_by_a_method, take

modes = pytest.mark.parametrize("mode", MODES)


def loss_of(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


def checkpointed(reentrant):
    def step(net, optimizer, batch):
        x, labels = batch
        loss = F.cross_entropy(checkpoint(net, x.clone().requires_grad_(), use_reentrant=reentrant), labels)
        loss.backward()
        optimizer.step()

    return step


def in_segments(net, optimizer, batch):
    """Live tensors cross the borders between checkpoints."""
    F.cross_entropy(checkpoint_sequential(list(net), 3, batch[0], use_reentrant=False), batch[1]).backward()
    optimizer.step()


def accumulated(net, optimizer, batch):
    x, labels = batch
    for part in zip(x.split(2), labels.split(2), strict=True):
        (loss_of(net, part) / 2).backward()
    optimizer.step()


def clipped(net, optimizer, batch):
    loss_of(net, batch).backward()
    norm = nn.utils.clip_grad_norm_(net.parameters(), 0.05)
    assert norm > 0.05
    optimizer.step()


def scaled(net, optimizer, batch):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(net, batch)).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_value_(net.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()


STEPS = {
    "checkpoint-reentrant": checkpointed(True),
    "checkpoint": checkpointed(False),
    "checkpoint-segments": in_segments,
    "accumulation": accumulated,
    "clip": clipped,
    "scaler": scaled,
}
SCHEDULERS = {
    "step": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
    "one_cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.2, total_steps=10, cycle_momentum=False
    ),
    "plateau": lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
}


def train(mode, step, make_scheduler=None, frozen=()):
    """Three epochs with changes of masks between them; compares after each step."""
    net, judge = pair(mode)
    for i in frozen:
        net[i].requires_grad_(False), judge[i].requires_grad_(False)
    optimizers = [torch.optim.SGD(n.parameters(), 0.1) for n in (net, judge)]
    schedulers = [make_scheduler(o) for o in optimizers] if make_scheduler else []
    method = pruned_by_a_method(net, optimizers[0])
    for epoch in range(3):
        for batch in batches(seed=epoch):
            for each, optimizer in zip((net, judge), optimizers, strict=True):
                optimizer.zero_grad()
                step(each, optimizer, batch)
            method.step()
            assert_same_network(net, judge)
        for scheduler in schedulers:
            scheduler.step(*([1.0] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))
        method.end_epoch()
        take(judge, net)
    dead = [int((~net[i].filter_mask).sum()) for i in (0, 3, 6)]
    assert all(dead) and not net[1].channel_mask.all(), "the method pruned"
    return optimizers


@modes
@pytest.mark.parametrize("name", STEPS)
def test_step(name, mode):
    train(mode, STEPS[name])


def plain_step(net, optimizer, batch):
    loss_of(net, batch).backward()
    optimizer.step()


@modes
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(name, mode):
    ours, theirs = train(mode, plain_step, SCHEDULERS[name])
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"] != 0.1


@modes
@pytest.mark.parametrize("frozen", [(0,), (3, 4), (0, 1, 3, 4)], ids=str)
def test_frozen_layers(frozen, mode):
    train(mode, plain_step, frozen=frozen)


@contextmanager
def watched(net):
    """What forward and backward hooks of each layer see."""
    seen = {}
    handles = []
    for i in (0, 1, 3, 4, 6):
        handles.append(net[i].register_forward_hook(lambda m, a, y, i=i: seen.update({("y", i): y.detach().clone()})))
        handles.append(net[i].register_full_backward_hook(lambda m, a, g, i=i: seen.update({("grad", i): g[0]})))
    yield seen
    for handle in handles:
        handle.remove()


@modes
def test_hooks_see_what_plain_layers_show(mode):
    """Also hooks that come after a method has changed the masks, and go again."""

    def step(net, optimizer, batch):
        batch[0].requires_grad_()
        with watched(net) as seen[net]:
            plain_step(net, optimizer, batch)
        if len(seen) == 2:
            got, want = seen.values()
            assert got.keys() == want.keys() and len(got) == 10
            for key in want:
                torch.testing.assert_close(torch.as_tensor(got[key]), want[key], msg=lambda t, key=key: f"{key}: {t}")
            seen.clear()

    seen = {}
    train(mode, step)


@modes
@pytest.mark.parametrize("by", ["set_masks", "method"])
def test_scaler_is_not_stopped_by_a_dead_filter(by, mode):
    """A plain norm behind a filter of zeros multiplies its gradient by 316. Where that overflows, the filter is dead
    all the same, and the step is taken.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    pk.convert(net, norms=False)
    pk.flow(net, mode == "live")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    if by == "method":
        method = pk.methods.GHFP(net, optimizer, rate=0.5, epochs=1, duty=0, norms=False, skip=("2",))
        method.end_epoch()
    else:
        net[0].set_masks(filter=torch.arange(8) > 3)
    dead = ~net[0].filter_mask
    assert dead.sum() == 4
    x, grads = torch.randn(4, 3, 8, 8), []
    net[1].register_forward_pre_hook(lambda module, args: args[0].register_hook(grads.append) and None)
    net(x).square().sum().backward()
    of_dead, of_live = (grads[0][:, which].abs().max() for which in (dead, ~dead))
    assert of_dead > 20 * of_live
    want = [p.detach() - 0.1 * p.grad for p in net.parameters()]
    optimizer.zero_grad()
    scale = 2.0 ** (128 - math.floor(math.log2(of_dead)))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(net(x).square().sum()).backward()
    assert grads[1][:, ~dead].isfinite().all() and not grads[1][:, dead].isfinite().all(), "it overflowed"
    weight = net[0].weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == scale, "the step was taken"
    for p, value in zip(net.parameters(), want, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-4, atol=1e-4)
    assert torch.equal(net[0].weight[dead], weight[dead]) and net[0].weight.isfinite().all()
