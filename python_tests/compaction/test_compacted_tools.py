"""The small network is a plain module to torch's tools: while it trains, and after it was left."""

import copy

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.compacted import CLOSE, assert_same_training, batches, bind, loss_of, mask_small, small, small_images, train
from prunekernels.compaction.compaction import Compaction

X = small_images()


def sgd(net):
    return torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=0.1)


def left():
    """A network and its compacted form after a block, in eval mode."""
    net = mask_small(small(), 1)
    c = Compaction(net, X, sgd(net))
    inside, opt = c.enter()
    train(inside, opt, batches())
    c.leave()
    return net.eval(), inside.eval()


def test_torch_func_after_leaving():
    net, inside = left()
    weights = {name: p.detach() for name, p in inside.named_parameters()}
    buffers = dict(inside.named_buffers())

    def loss(weights, x):
        return torch.func.functional_call(inside, (weights, buffers), (x,)).square().mean()

    grads = torch.func.grad(loss)(weights, X)
    inside.zero_grad()
    loss_of(inside(X)).backward()
    for name, p in inside.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, **CLOSE)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, X[:, None])
    torch.testing.assert_close(each["last.bias"].mean(0), grads["last.bias"], **CLOSE)
    torch.testing.assert_close(inside(X), net(X), **CLOSE)


def test_export_after_leaving():
    net, inside = left()
    program = torch.export.export(inside, (X,))
    torch.testing.assert_close(program.module()(X), net(X), **CLOSE)
    assert not any("prunekernels" in str(node.target) for node in program.graph.nodes)


def test_scripts_and_traces_after_leaving():
    net, inside = left()
    torch.testing.assert_close(torch.jit.trace(inside, X)(X), net(X), **CLOSE)
    torch.testing.assert_close(torch.fx.symbolic_trace(inside)(X), net(X), **CLOSE)


def test_averages_of_the_small_network():
    net = mask_small(small(), 1)
    with pk.compacted(net, X, sgd(net)) as (inside, opt):
        average = torch.optim.swa_utils.AveragedModel(inside)
        train(inside, opt, batches())
        average.update_parameters(inside)
        torch.testing.assert_close(average.module.second.weight, inside.second.weight)
        assert average.module.second.weight is not inside.second.weight


def test_gradients_of_inputs():
    """Gradients reach the input as in masked mode."""
    net = mask_small(small(), 1)
    x = X.clone().requires_grad_()
    want = torch.autograd.grad(loss_of(copy.deepcopy(net)(x)), x)[0]
    with pk.compacted(net, X) as (inside, _):
        got = torch.autograd.grad(loss_of(inside(x)), [x, inside.first[0].weight])
    torch.testing.assert_close(got[0], want, **CLOSE)
    assert got[1].shape == inside.first[0].weight.shape


def test_gradients_of_frozen_zeros():
    """Zero for torch.autograd.grad as well."""
    net = small()
    net.first[0].set_masks(filter=torch.tensor([1, 0, 1, 1, 0, 1]).bool())
    with pk.compacted(net, X) as (inside, _):
        (grad,) = torch.autograd.grad(loss_of(inside(X)), [inside.first[0].weight])
        assert not grad[1].any() and not grad[4].any() and grad[0].any()


@pytest.mark.slow
def test_compiled_nets():
    """One after the other, for two sets of masks; and the first one again."""
    torch._dynamo.reset()
    masked, other = small(), small()
    optimizer, its = sgd(masked), sgd(other)
    bind(masked, optimizer, "dead"), bind(other, its, "dead")
    c, compiled = Compaction(other, X, its), {}
    for seed in (1, 2, 1):
        mask_small(masked, seed), mask_small(other, seed)
        train(masked, optimizer, batches(seed=seed))
        net, opt = c.enter()
        if c.cut not in compiled:
            compiled[c.cut] = torch.compile(net, backend="aot_eager")
        train(compiled[c.cut], opt, batches(seed=seed))
        c.leave()
        assert_same_training(masked, optimizer, other, its)
    assert len(compiled) == 2
    torch._dynamo.reset()


def test_data_parallel_names():
    """A wrapper that holds the network sees the same names at each entering."""
    net = mask_small(small(), 1)
    c = Compaction(net, X)
    inside, _ = c.enter()
    wrapper = nn.DataParallel(inside)
    names = [name for name, _ in wrapper.named_parameters()]
    c.leave()
    mask_small(net, 2)
    c.enter()
    assert [name for name, _ in wrapper.named_parameters()] == names
    torch.testing.assert_close(wrapper.module(X), inside(X))
    c.leave()
