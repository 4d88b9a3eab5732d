"""Gradients of soft-dead filters beside those of live ones."""

import pytest
import torch
import torch.nn.functional as F

from cases.methods import TOGETHER, batches, chain, convs, sgd, train_epoch
from prunekernels.methods import GHFP, SFP


def lengths(layer):
    return layer.weight.grad.flatten(1).norm(dim=1)


def first_step(cls=SFP, dtype=torch.float32, **options):
    """A network, its method and by layer the gradients before the first step's hooks and after them."""
    net = chain(dtype=dtype)
    optimizer = sgd(net)
    method = cls(net, optimizer, 0.5, 10, **options)
    x, y = next(batches(0, dtype))
    F.cross_entropy(net(x), y).backward()
    before = {name: layer.weight.grad.clone() for name, layer in convs(net).items()}
    optimizer.step()
    return net, method, before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_longer_than_live_ones(dtype):
    net, method, before = first_step(duty=0.5, steps_per_epoch=1, dtype=dtype, **TOGETHER)  # all steps are dense
    for name, layer in convs(net).items():
        live = method.states[name] == 0
        bound = before[name][live].flatten(1).norm(dim=1).mean()
        grown = before[name][~live].flatten(1).norm(dim=1) > bound
        assert bool(grown.any()) and float(before[name][~live].flatten(1).norm(dim=1).max()) > 10 * float(bound)
        torch.testing.assert_close(lengths(layer)[~live][grown], bound.expand(int(grown.sum())), rtol=1e-5, atol=0)
        assert torch.equal(layer.weight.grad[live], before[name][live])
        assert torch.equal(layer.weight.grad[~live][~grown], before[name][~live][~grown])
        direction = F.cosine_similarity(layer.weight.grad[~live].flatten(1), before[name][~live].flatten(1))
        moved = before[name][~live].flatten(1).norm(dim=1) > 0
        torch.testing.assert_close(direction[moved], torch.ones_like(direction[moved]))


@pytest.mark.parametrize(
    ("options", "clips"),
    [({"duty": 1.0}, False), ({"duty": 0.5}, False), ({"duty": 0.5, "clip": True}, True), ({"clip": True}, True)],
)
def test_a_soft_method_clips_where_it_is_told_to(options, clips):
    net, method, before = first_step(steps_per_epoch=1, **TOGETHER | {"clip": None} | options)
    changed = [not torch.equal(layer.weight.grad, before[name]) for name, layer in convs(net).items()]
    assert changed == [clips] * 3
    method.detach()
    grads = {name: layer.weight.grad.clone() for name, layer in convs(net).items()}
    method.optimizer.step()
    assert all(torch.equal(layer.weight.grad, grads[name]) for name, layer in convs(net).items())


def test_nothing_is_made_of_zeros():
    """No length to go by, and no gradient at all, are no reason to divide."""
    net = chain()
    optimizer = sgd(net)
    SFP(net, optimizer, 0.5, 10, clip=True)
    first, second, _ = convs(net).values()
    first.weight.grad, second.weight.grad = torch.zeros_like(first.weight), None
    optimizer.step()
    assert not bool(first.weight.grad.any()) and second.weight.grad is None


def test_hard_dead_filters_and_new_masks():
    """What became hard-dead is no longer clipped; what became soft-dead is."""
    net = chain()
    optimizer = sgd(net)
    method = GHFP(net, optimizer, 0.5, 10, clip=True)
    for epoch in range(6):
        train_epoch(net, optimizer, epoch, method)
        method.end_epoch()
    x, y = next(batches(9))
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    for name, layer in convs(net).items():
        states = method.states[name]
        assert {0, 1, 2} == set(states.tolist())
        length = lengths(layer)
        assert float(length[states == 1].max()) <= float(length[states == 0].mean()) * (1 + 1e-5)
        assert not bool(length[states == 2].any())
