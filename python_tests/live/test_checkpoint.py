"""Live tensors that enter a checkpoint without reentry: what is saved there must be the same when it runs again."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import prunekernels as pk
from cases.deferred import TwoNorms
from prunekernels.live import LiveTensor
from prunekernels.live.rules import pointwise


def seen_before(f):
    """f of a live tensor whose full width has been asked for outside."""

    def run(x):
        torch.cumsum(x, 1)
        return checkpoint(f, x, use_reentrant=False)

    return run


def seen_after(f):
    def run(x):
        y = checkpoint(f, x, use_reentrant=False)
        return y.sum() + torch.cumsum(x, 1).sum()

    return run


def wide_twice(x):
    return torch.cumsum(x, 1).sum() * torch.logsumexp(x, 1).sum()


def no_checkpoint(x):
    return torch.cumsum(x, 1).sum() + torch.cumsum(x.sigmoid(), 1).sum()


def packed(x):
    with torch.autograd.graph.save_on_cpu():
        return wide_twice(x) + F.relu(torch.sigmoid(x)).sum()


PROGRAMS = {
    "relu": F.relu, "full width": lambda x: torch.cumsum(x, 1), "full width twice": wide_twice,
    "softmax": lambda x: F.softmax(x, 1), "another zero": torch.exp, "sigmoid, relu": lambda x: F.relu(x.sigmoid()),
    "relu of a filled tensor": lambda x: F.relu(x.relu() + 0.5), "whole sum": torch.sum, "permuted": lambda x: F.gelu(
        x.permute(0, 2, 3, 1)).cumsum(-1), "sort": lambda x: x.sort(1)[0], "view": lambda x: x[:, :, 1:].cumsum(1),
}  # fmt: skip
OTHERS = {
    "seen before": seen_before(wide_twice), "seen after": seen_after(wide_twice), "saved on CPU": packed,
    "none": no_checkpoint,
}  # fmt: skip


def outcome(net, run):
    """The sum of what a program makes of a norm's result, and gradients."""
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    y = net.norm(net.conv(x))
    assert isinstance(y, LiveTensor) == net.conv._flow
    total = run(y).square().sum()
    total.backward()
    return [total.detach(), x.grad, net.conv.weight.grad, net.norm.weight.grad, net.norm.bias.grad]


@pytest.mark.parametrize("name", [*PROGRAMS, *OTHERS])
def test_runs_again_as_before(name):
    run = OTHERS.get(name) or (lambda x: checkpoint(PROGRAMS[name], x, use_reentrant=False))
    torch.manual_seed(0)
    net = TwoNorms().double()
    want = outcome(copy.deepcopy(net), run)
    pointwise._value.cache_clear()  # what fills become is found out within the checkpoint
    for got, expected in zip(outcome(pk.flow(net), run), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
