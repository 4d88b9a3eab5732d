"""Weights in float32 beside activations of 16 bits, as autocast leaves them: what is live of them is cast, no more."""

import pytest
import torch
from torch._prims_common import suggest_memory_format

import prunekernels as pk
from cases.conv import KINDS, PLAIN, PLANS, ConvCase, assert_same, assert_zero, capped, inputs, isas, masks, only
from prunekernels import reference
from prunekernels.functional import conv2d_with_tables
from prunekernels.masks import make_table

NAN = float("nan")
HALVES = [torch.bfloat16, torch.float16]
# Rows around a vector of 16, and more of them than one thread takes.
ROWS = [ConvCase(c=c, k=6, r=1, s=1, padding=0) for c in (1, 15, 16, 17, 33)] + [ConvCase(n=1, c=64, k=70, h=4, w=4)]


def table_of(case, made):
    given = (made.get(name) for name in ("filter_mask", "kernel_mask", "input_mask"))
    return make_table(*given, case.k, case.c, case.groups)


def run(case, problem, made, plan="auto", *, weight_grad="masked", grad_scale=None):
    """(y, grad_x, grad_w) of the operators, whatever the dtypes."""
    x, weight, bias, grad_out = problem
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    table = table_of(case, made) if made else None
    grad_table = table if weight_grad == "masked" else table_of(case, {"input_mask": made.get("input_mask")})
    rest = (grad_scale, case.stride, case.padding, case.dilation, case.groups)
    with pk.plan.force(plan):
        y = conv2d_with_tables(*leaves, bias, table, grad_table, *rest)
        return y.detach(), *torch.autograd.grad(y, leaves, grad_out)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layouts", [(a, b) for a in ("nchw", "channels_last") for b in ("nchw", "channels_last")])
@pytest.mark.parametrize("weight_grad", ["masked", "dense"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_as_the_reference(case, dtype, weight_grad, layouts, plan):
    x, _, bias, grad_out = inputs(case, dtype, layouts[0])
    weight = inputs(case, dtype, layouts[1])[1].float()
    made = masks(case, "all")
    got = run(case, (x, weight, bias, grad_out), made, plan, weight_grad=weight_grad)
    assert (got[0].dtype, got[1].dtype, got[2].dtype) == (dtype, dtype, torch.float32)
    assert got[2].is_contiguous(memory_format=suggest_memory_format(weight))
    want = reference.gradients(x, weight, bias, grad_out, **made, **case.conv_args, weight_grad=weight_grad)
    assert_same((*got, None), (*want[:3], None))


@pytest.mark.parametrize("pattern", ["none", "filter", "kernel", "input", "all"])
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_as_cast_before(case, isa, pattern):
    """The bits are those of a weight that was cast as a whole, for numbers that bfloat16 has to round."""
    x, _, bias, grad_out = inputs(case, torch.bfloat16, "channels_last")
    weight = inputs(case, layout="channels_last", integers=False)[1]
    made = masks(case, pattern)
    with capped(isa):
        got = run(case, (x, weight, bias, grad_out), made, "model")
        want = run(case, (x, weight.bfloat16(), bias, grad_out), made, "model")
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b.to(a.dtype))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_poison_in_dead_weights(case, dtype, layout, plan):
    x, weight, bias, grad_out = inputs(case, dtype, layout)
    weight = weight.float()
    made = {"filter_mask": ~only(case.k, 0, 3), "input_mask": ~only(case.c, 1)}
    want = reference.gradients(x, weight, bias, grad_out, **made, **case.conv_args)
    weight, x, grad_out = weight.clone(), x.clone(), grad_out.clone()
    x[:, 1], grad_out[:, [0, 3]] = NAN, NAN
    live = reference.live_masks(weight, made["filter_mask"], None, made["input_mask"], case.groups)[2]
    weight[~live] = NAN
    got = run(case, (x, weight, bias, grad_out), made, plan)
    assert_same((*got, None), (*want[:3], None))
    for zero in (got[0][:, [0, 3]], got[1][:, 1], got[2][~live]):
        assert_zero(zero)


@pytest.mark.parametrize("plan", PLANS)
def test_grad_scale(plan):
    x, weight, bias, grad_out = inputs(PLAIN, torch.bfloat16, "channels_last")
    scale = torch.tensor([0.0, 1.0, 2.0, 0.5, 1.0, 0.0])
    made = masks(PLAIN, "all")
    want = reference.gradients(x, weight, bias, grad_out, **made, padding=1, grad_scale=scale)
    got = run(PLAIN, (x, weight.float(), bias, grad_out), made, plan, grad_scale=scale)
    assert_same((*got, None), (*want[:3], None))


def test_second_derivatives_have_the_dtypes_too():
    x, weight, bias, grad_out = inputs(PLAIN, torch.bfloat16, "channels_last")
    leaves = [x.requires_grad_(), weight.float().requires_grad_()]
    table = table_of(PLAIN, masks(PLAIN, "all"))
    y = conv2d_with_tables(*leaves, bias, table, table, None, 1, 1, 1, 1)
    grads = torch.autograd.grad(y, leaves, grad_out, create_graph=True)
    total = sum(g.float().square().sum() for g in grads)
    again = torch.autograd.grad(total, leaves)
    assert [g.dtype for g in again] == [torch.bfloat16, torch.float32] and all(g.isfinite().all() for g in again)


@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes_do_not_mix(weight_dtype):
    x, weight, _, _ = inputs(PLAIN, torch.bfloat16)
    table = table_of(PLAIN, masks(PLAIN, "all"))
    with pytest.raises((ValueError, RuntimeError), match=r"masked_conv2d: weight: expected .*[bB][fF]loat16"):
        conv2d_with_tables(x, weight.to(weight_dtype), None, table, table, None, 1, 1, 1, 1)


@pytest.mark.skipif(not pk.has_extension(), reason="pure torch has no kernels of two dtypes, and casts")
def test_autocast_keeps_the_weight():
    """What autograd saves of a weight is the parameter itself, not a copy in bfloat16."""
    x, weight, _, _ = inputs(PLAIN)
    saved = []
    weight.requires_grad_()
    table = table_of(PLAIN, masks(PLAIN, "all"))
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        y = conv2d_with_tables(x, weight, None, table, table, None, 1, 1, 1, 1)
    assert y.dtype == torch.bfloat16
    assert not any(t.dtype == torch.bfloat16 and t.shape == weight.shape for t in saved)
