"""The copy of the weight with zeros in its dead entries, which the dense plan hands from forward to backward."""

import dataclasses

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import prunekernels as pk
from cases.conv import GROUPED, KINDS, PLAIN, PLANS, POINTWISE, ConvCase, assert_same, assert_zero, inputs, masks, only
from prunekernels import reference

WIDE = ConvCase(n=3, c=4, k=6, h=9, w=8)  # more pixels than weights: the weight is masked, not the operand
NAN = float("nan")
needs_extension = pytest.mark.skipif(not pk.has_extension(), reason="the fallback makes no copy")


def forward(case, plan="dense", layout="nchw", made=None):
    """The operands, of which x and weight want gradients, and y, from a weight with numbers in its dead entries."""
    x, weight, _, grad_out = inputs(case, layout=layout)
    made = masks(case, "all") if made is None else made
    x.requires_grad_(), weight.requires_grad_()
    with pk.plan.force(plan):
        return x, weight, grad_out, pk.masked_conv2d(x, weight, **made, **case.conv_args)


def wanted(case, made=None):
    x, weight, _, grad_out = inputs(case)
    return reference.gradients(x, weight, None, grad_out, **(made or masks(case, "all")), **case.conv_args)[1:3]


def grads(x, weight, grad_out, y, plan="dense", **how):
    with pk.plan.force(plan):
        return torch.autograd.grad(y, (x, weight), grad_out, **how)


@pytest.mark.parametrize("backward", PLANS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("case", [*KINDS, WIDE], ids=str)
def test_each_plan_of_the_backward_pass_reads_it(case, layout, backward):
    got = grads(*forward(case, layout=layout), plan=backward)
    assert_same((None, *got, None), (None, *wanted(case), None))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", [*KINDS, WIDE], ids=str)
def test_dead_weights_that_change_before_the_backward_pass(case, plan):
    x, weight, grad_out, y = forward(case, plan)
    weight.data[~reference.live_masks(weight, **masks(case, "all"), groups=case.groups)[2]] = NAN
    got = grads(x, weight, grad_out, y, plan)
    assert_same((None, *got, None), (None, *wanted(case), None))


@needs_extension
@pytest.mark.parametrize("case", [PLAIN, GROUPED, POINTWISE, WIDE], ids=str)
def test_the_copy_serves_the_backward_pass(case):
    """Live weights that .data changes behind autograd's back after the forward pass: the copy has the old ones."""
    x, weight, grad_out, y = forward(case)
    weight.data += 100
    assert_same((None, *grads(x, weight, grad_out, y), None), (None, *wanted(case), None))


@pytest.mark.parametrize("case", [PLAIN, WIDE], ids=str)
def test_a_graph_that_is_kept_keeps_the_copy(case):
    problem = forward(case)
    first, second = grads(*problem, retain_graph=True), grads(*problem, retain_graph=True)
    for got in (first, second, grads(*problem)):
        assert_same((None, *got, None), (None, *wanted(case), None))
    with pytest.raises(RuntimeError, match="second time"):
        grads(*problem)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("case", [PLAIN, WIDE], ids=str)
def test_second_derivatives_reach_the_weight(case, layout):
    def penalty(conv, x, weight, grad_out):
        y = conv(x, weight, **masks(case, "all"), **case.conv_args)
        first = torch.autograd.grad(y, (x, weight), grad_out, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight))

    x, weight, _, grad_out = inputs(case, layout=layout)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    with pk.plan.force("dense"):
        got = penalty(pk.masked_conv2d, x, weight, grad_out)
    want = penalty(reference.masked_conv2d, *(t.detach().double().requires_grad_() for t in (x, weight)), grad_out)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b)


@pytest.mark.parametrize("case", [PLAIN, WIDE], ids=str)
def test_checkpoints_may_choose_another_plan(case):
    """Recomputation counts what is saved: the copy is not among it."""
    x, weight, _, grad_out = inputs(case)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    plans = iter(["compact", "dense"])

    def layer(x):
        with pk.plan.force(next(plans)):
            return pk.masked_conv2d(x, weight, **masks(case, "all"), **case.conv_args)

    y = checkpoint(layer, x, use_reentrant=False)
    assert_same((None, *torch.autograd.grad(y, (x, weight), grad_out), None), (None, *wanted(case), None))


@needs_extension
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_a_weight_in_float32_of_activations_in_fewer_bits(layout):
    case = dataclasses.replace(WIDE, n=2)
    made = {"filter_mask": ~only(6, 0, 3), "input_mask": ~only(4, 1)}
    x, weight, _, grad_out = inputs(case, torch.bfloat16, layout)
    want = reference.gradients(x, weight, None, grad_out, **made, **case.conv_args)
    weight = weight.float()
    live = reference.live_masks(weight, made["filter_mask"], None, made["input_mask"], 1)[2]
    weight[~live] = NAN
    x, weight = x.requires_grad_(), weight.requires_grad_()
    with pk.plan.force("dense"), torch.autocast("cpu", torch.bfloat16):
        y = pk.masked_conv2d(x, weight, **made, **case.conv_args)
    got = grads(x, weight, grad_out, y)
    assert_same((y.detach(), *got, None), (*want[:3], None))
    for zero in (y[:, [0, 3]], got[0][:, 1], got[1][~live]):
        assert_zero(zero)
