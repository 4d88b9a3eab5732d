"""masked_batch_norm and its gradients by the emulated CUDA operators: the numbers of the CPU's, holes, live mode."""
# ruff: noqa: F811 (fixtures)

import copy
import types

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.batch_norms import Problem, assert_near
from cases.conv import assert_zero
from cases.emulated_ops import copies, events, launched, library  # noqa: F401
from cases.emulated_steps import emulated  # noqa: F401
from prunekernels.live import channel_list, deferred
from prunekernels.nn import batch_norm

pytestmark = pytest.mark.slow  # compiles csrc/cuda
OURS = torch.ops.prunekernels
LAYOUTS = [torch.contiguous_format, torch.channels_last]
FORWARD, BACKWARD, APPLY = "launch_batch_norm", "launch_batch_norm_backward", "launch_batch_norm_apply"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", ["compact", "wide", "all"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_the_cpu(dtype, layout, form, training, emulated, events):
    problem = Problem(dtype, layout, form=form)
    assert_near(problem.outcome(emulated, training), problem.outcome(OURS, training))
    assert launched(events) == [FORWARD, BACKWARD]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_halves_as_the_cpu(dtype, layout, adds, relu, training, emulated, events):
    problem = Problem(dtype, layout)
    got, want = (problem.deferred(ops, adds, relu, training) for ops in (emulated, OURS))
    assert_near(got, want)
    assert launched(events) == [FORWARD, APPLY, BACKWARD]


def test_a_relu_of_what_float16_rounds_to_zero(emulated):
    """The gradient stops there, as it does behind a relu of its own."""
    problem = Problem(torch.float16)
    problem.parameters = [torch.full((problem.features,), 1e-9), torch.zeros(problem.features)]
    y, _, _, _, grad_x, grad_weight, grad_bias = problem.deferred(emulated, False, True)
    for each in (y, grad_x, grad_weight, grad_bias):
        assert_zero(each)


def test_holes_of_the_second_half_are_zeros(emulated):
    problem = Problem()
    real = torch.arange(12) % 3 != 1
    want = problem.deferred(emulated, True, True)
    problem.index = torch.where(real, problem.index, -1)
    problem.x[:, ~real] = float("nan")
    y, table, _, _, grad_x, *_ = problem.deferred(emulated, True, True)
    assert_zero(y[:, ~real]), assert_zero(grad_x[:, ~real]), assert_zero(table[:, ~real])
    assert torch.equal(y[:, real], want[0][:, real]) and torch.equal(grad_x[:, real], want[4][:, real])


@pytest.mark.parametrize("size", [(6, 8, 1, 1), (1, 1, 3, 3), (0, 4, 3, 3), (2, 0, 3, 3), (3, 16, 4, 4)], ids=str)
def test_sizes(size, emulated):
    problem, training = Problem(size=size), size[0] > 0
    got, want = (problem.outcome(ops, training, affine=False) for ops in (emulated, OURS))
    assert_near(got, want)


def test_float16(emulated):
    problem, wide = Problem(torch.float16), Problem()
    for got, want in zip(problem.outcome(emulated), wide.outcome(OURS), strict=True):
        torch.testing.assert_close(got.float(), want, rtol=5e-3, atol=5e-3)


def test_the_same_bits_again(emulated):
    problem = Problem()
    assert all(map(torch.equal, problem.outcome(emulated), problem.outcome(emulated)))


@pytest.mark.parametrize("training", [True, False])
def test_holes_are_zeros_that_nothing_moves(training, emulated):
    problem = Problem()
    real = torch.arange(12) % 3 != 1
    want = problem.outcome(emulated, training)
    dropped = problem.index[~real].long()
    before = [each[dropped] for each in problem.running]
    problem.index = torch.where(real, problem.index, -1)
    y, center, invstd, mean, var, grad_x, grad_weight, grad_bias = got = problem.outcome(emulated, training)
    for values in (y, grad_x):
        assert_zero(values[:, ~real])
    for values in (center[~real], invstd[~real], grad_weight[dropped], grad_bias[dropped]):
        assert_zero(values)
    assert torch.equal(mean[dropped], before[0]) and torch.equal(var[dropped], before[1])
    for a, b in zip(got, want, strict=True):
        keep = real if a.shape[-1] == 12 else None
        if a.dim() == 4:
            assert torch.equal(a[:, real], b[:, real])
        elif keep is not None:
            assert torch.equal(a[real], b[real])
        else:
            others = torch.ones(25, dtype=torch.bool).index_fill_(0, dropped, False)
            assert torch.equal(a[others], b[others])


def test_lists_are_read_once(emulated, events):
    problem = Problem()
    problem.outcome(emulated)
    events()
    problem.outcome(emulated)
    assert copies(events) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.zeros(2, 12, 3, 3, dtype=torch.float64)}, "x: expected float32, bfloat16 or float16"),
        ({"x": torch.zeros(0, 12, 3, 3)}, "x: expected more than one value per channel when training"),
        ({"x": torch.zeros(1, 12, 1, 1)}, "x: expected more than one value per channel when training"),
        ({"index": torch.full((12,), 25, dtype=torch.int32)}, "index: expected places below 25.*got 25"),
        ({"index": torch.zeros(11, dtype=torch.int32)}, r"index: expected int32 \[12\]"),
        ({"parameters": [torch.zeros(24), None]}, r"weight: expected contiguous float32 \[25\]"),
    ],
)
def test_errors(change, said, emulated):
    problem = Problem()
    vars(problem).update(change)
    with pytest.raises((ValueError, RuntimeError), match=f"(?s)masked_batch_norm: {said}"):
        problem.outcome(emulated)


# ---- the layer


class Norm(torch.autograd.Function):
    """The operator with its gradient, as C++ attaches it for CUDA."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, index, features, training, momentum, eps):
        ops = torch.ops.prunekernels_emulated
        y, *statistics = ops.masked_batch_norm(x, weight, bias, mean, var, index, features, training, momentum, eps)
        ctx.save_for_backward(x, weight, *statistics, index)
        ctx.rest = features, training
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, *rest = ctx.saved_tensors
        grads = torch.ops.prunekernels_emulated.masked_batch_norm_backward(grad, x, weight, *rest, *ctx.rest)
        return *grads, *[None] * 7


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("flow", [True, False])
def test_layers(flow, align, training, monkeypatch, events):
    """Masked and live mode, with padded lists too: the numbers of torch's batch norm."""
    torch.manual_seed(0)
    live = torch.arange(40) % 5 != 2
    live[30:] = False
    net = nn.Sequential(nn.Conv2d(3, 40, 1), nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 6, 1))
    pk.convert(net)
    net[0].set_masks(filter=live)
    net[1].set_mask(live)
    net[3].set_masks(input=live)
    net.train(training)
    other = copy.deepcopy(net)
    x = torch.randn(2, 3, 5, 6).contiguous(memory_format=torch.channels_last)

    def outcome(net):
        y = net(x)
        y.square().sum().backward()
        return [y.detach(), *(p.grad for p in net.parameters()), *(b.clone() for b in net[1].buffers())]

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    want = outcome(net)
    monkeypatch.setitem(channel_list.ALIGN, "cpu", align)
    monkeypatch.setattr(batch_norm, "_TAKES_PADDING", ("cpu",))
    monkeypatch.setattr(deferred.Uses, "PATIENCE", 0)  # Norm has both halves
    monkeypatch.setattr(batch_norm, "ops", types.SimpleNamespace(masked_batch_norm=lambda *a: (Norm.apply(*a),)))
    events()
    got = outcome(pk.flow(other) if flow else other)
    assert {FORWARD, BACKWARD} <= set(launched(events))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
