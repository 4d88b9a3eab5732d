"""masked_conv2d where it is easy to be almost right: degenerate masks, autocast, odd calls."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

import prunekernels as pk
from cases.conv import (
    FORCED,
    GROUPED,
    KINDS,
    PLAIN,
    PLANS,
    ConvCase,
    assert_same,
    assert_zero,
    inputs,
    masks,
    only,
    run,
)
from prunekernels import reference


def full(*size, value=True):
    return torch.full(size, value)


DEGENERATE = {
    "no filter": lambda c: {"filter_mask": full(c.k, value=False)},
    "no input": lambda c: {"input_mask": full(c.c, value=False)},
    "no kernel": lambda c: {"kernel_mask": full(c.k, c.c // c.groups, value=False)},
    "nothing": lambda c: {"filter_mask": full(c.k, value=False), "input_mask": full(c.c, value=False)},
    "all live": lambda c: {
        "filter_mask": full(c.k),
        "input_mask": full(c.c),
        "kernel_mask": full(c.k, c.c // c.groups),
    },
    "first filter": lambda c: {"filter_mask": only(c.k, 0)},
    "last filter": lambda c: {"filter_mask": only(c.k, c.k - 1)},
    "last input": lambda c: {"input_mask": only(c.c, c.c - 1)},
    "one kernel": lambda c: {"kernel_mask": only(c.k * (c.c // c.groups), c.k - 1).view(c.k, -1)},
    "all but one filter": lambda c: {"filter_mask": ~only(c.k, 2)},
    "all but one kernel": lambda c: {"kernel_mask": ~only(c.k * (c.c // c.groups), 1).view(c.k, -1)},
    "live filter without live kernels": lambda c: {"kernel_mask": ~only(c.k, 1)[:, None].expand(-1, c.c // c.groups)},
    "last group has no filter": lambda c: {"filter_mask": torch.arange(c.k) < c.k - c.k // c.groups},
    "last group has no input": lambda c: {"input_mask": torch.arange(c.c) < c.c - c.c // c.groups},
    "live filters and live inputs in other groups": lambda c: {
        "filter_mask": torch.arange(c.k) < c.k // c.groups,
        "input_mask": torch.arange(c.c) >= c.c // c.groups,
    },
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("case", KINDS, ids=str)
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_masks(name, case, layout, plan):
    made = DEGENERATE[name](case)
    problem = inputs(case, layout=layout)
    assert_same(run(problem, case, plan, **made), reference.gradients(*problem, **made, **case.conv_args))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_masks_keep_the_memory_format(name, layout, plan):
    format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    y, grad_x, grad_w, _ = run(inputs(GROUPED, layout=layout), GROUPED, plan, **DEGENERATE[name](GROUPED))
    assert all(t.is_contiguous(memory_format=format) for t in (y, grad_x, grad_w))


@pytest.mark.parametrize("plan", PLANS)
def test_a_live_filter_without_live_kernels_gives_its_bias(plan):
    x, weight, bias, grad_out = inputs(PLAIN, integers=False)
    kernel_mask = ~only(6, 1)[:, None].expand(-1, 4)
    y, _, grad_w, grad_b = run((x, weight, bias, grad_out), PLAIN, plan, kernel_mask=kernel_mask)
    assert torch.equal(y[:, 1], bias[1].expand_as(y[:, 1]))
    assert_zero(grad_w[1])
    torch.testing.assert_close(grad_b[1], grad_out[:, 1].sum())


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_all_live_equals_conv2d_bit_for_bit(case, plan):
    x, weight, bias, grad_out = inputs(case, integers=False)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = F.conv2d(*leaves, **case.conv_args)
    want = (y, *torch.autograd.grad(y, leaves, grad_out))
    got = run((x, weight, bias, grad_out), case, plan, filter_mask=full(case.k), input_mask=full(case.c))
    assert all(map(torch.equal, got[:3], want[:3]))
    torch.testing.assert_close(got[3], want[3])  # one sum, in no promised order


@pytest.mark.thinned(2)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("pattern", ["none", "filter", "all"])
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_without_bias(case, pattern, scaled, plan):
    x, weight, _, grad_out = inputs(case)
    args = masks(case, pattern) | ({"grad_scale": torch.tensor([0, 0.5, 1, 2, 1, 1])} if scaled else {})
    want = reference.gradients(x, weight, None, grad_out, **args, **case.conv_args)
    assert_same(run((x, weight, None, grad_out), case, plan, **args), want)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("pattern", ["none", "all"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "x weight", "weight bias", "x bias"])
def test_only_some_gradients_are_wanted(wanted, has_bias, pattern, plan):
    x, weight, bias, grad_out = inputs(PLAIN)
    bias, made, wanted = bias if has_bias else None, masks(PLAIN, pattern), wanted.split()
    results = reference.gradients(x, weight, bias, grad_out, **made, padding=1)
    want = dict(zip(("y", "x", "weight", "bias"), results, strict=True))
    leaves = {"x": x, "weight": weight, "bias": bias}
    for name in wanted:
        if leaves[name] is not None:
            leaves[name].requires_grad_()
    with pk.plan.force(plan):
        y = pk.masked_conv2d(*leaves.values(), padding=1, **made)
        if y.requires_grad:
            y.backward(grad_out)
    got = {name: t.grad for name, t in leaves.items() if t is not None and t.grad is not None}
    assert set(got) == {name for name in wanted if leaves[name] is not None}
    assert all(torch.equal(grad.double(), want[name]) for name, grad in got.items())


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_autograd(mode, plan):
    x, weight, bias, _ = inputs(PLAIN)
    made = masks(PLAIN, "all")
    with mode(), pk.plan.force(plan):
        y = pk.masked_conv2d(x, weight.requires_grad_(), bias, padding=1, **made)
    assert not y.requires_grad and y.is_inference() == (mode is torch.inference_mode)
    assert torch.equal(y.double(), reference.masked_conv2d(x, weight.detach(), bias, padding=1, **made))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("padding", [1, "same"])
def test_3d_input(padding, plan):
    x, weight, bias, grad_out = inputs(PLAIN)
    made = masks(PLAIN, "all")
    got = run((x[0], weight, bias, grad_out[0]), ConvCase(padding=padding), plan, **made)
    assert got[0].dim() == 3
    assert_same(got, reference.gradients(x[0], weight, bias, grad_out[0], padding=1, **made))


@pytest.mark.parametrize("plan", FORCED)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, x_dtype, plan):
    x, weight, bias, grad_out = inputs(PLAIN, torch.float16)  # integers that both halves hold exactly
    leaves = [t.to(x_dtype).requires_grad_() for t in (x, weight, bias)]
    made = masks(PLAIN, "all")
    with torch.autocast("cpu", dtype=dtype), pk.plan.force(plan):
        y = pk.masked_conv2d(*leaves, padding=1, **made)
        assert y.dtype == F.conv2d(*leaves, padding=1).dtype
    grads = torch.autograd.grad(y, leaves, grad_out.to(y.dtype))
    assert all(g.dtype == x_dtype for g in grads)
    assert_same((y, *grads), reference.gradients(x, weight, bias, grad_out, padding=1, **made))


def test_autocast_off_inside():
    x, weight, _, _ = inputs(PLAIN)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert pk.masked_conv2d(x, weight, padding=1, filter_mask=only(6, 1)).dtype == torch.float32


def test_a_changed_mask_between_forward_and_backward_does_not_matter():
    x, weight, bias, grad_out = inputs(PLAIN)
    mask = only(6, 1, 2)
    want = reference.gradients(x, weight, bias, grad_out, filter_mask=mask.clone(), padding=1)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = pk.masked_conv2d(*leaves, filter_mask=mask, padding=1)
    with contextlib.suppress(RuntimeError):  # refusing is fine, another gradient is not
        mask.fill_(True)
        assert_same((y, *torch.autograd.grad(y, leaves, grad_out)), want)


def test_an_edited_weight_between_forward_and_backward_is_an_error():
    x, weight, bias, grad_out = inputs(PLAIN)
    y = pk.masked_conv2d(x.requires_grad_(), weight, bias, filter_mask=only(6, 1, 2), padding=1)
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(grad_out)


@pytest.mark.parametrize("plan", FORCED)
def test_sum_of_many_numbers_keeps_its_precision_in_bf16(plan):
    """Chunks of the batch must not be added up in bf16."""
    case = ConvCase(n=45, c=32, k=32, h=56, w=56, r=1, s=1, padding=0)
    problem = inputs(case, torch.bfloat16, integers=False)
    made = masks(case, "filter")
    want = reference.gradients(*problem, **made)
    got = run(problem, case, plan, **made)
    live = made["filter_mask"]
    error = (got[2].double() - want[2])[live].norm() / want[2][live].norm()
    assert error < 4e-3, error  # one rounding to 8 bits is about 2e-3


@pytest.mark.parametrize("plan", PLANS)
def test_masks_bias_and_scale_with_odd_strides(plan):
    x, weight, bias, grad_out = inputs(PLAIN)
    made, scale = masks(PLAIN, "all"), torch.tensor([0, 0.5, 1, 2, 1, 4])
    strided = lambda t: torch.stack([t, t.logical_not().to(t.dtype)], -1)[..., 0]  # noqa: E731
    odd = {name: strided(mask) for name, mask in made.items()} | {"grad_scale": strided(scale)}
    odd["kernel_mask"] = made["kernel_mask"].T.contiguous().T
    assert not any(t.is_contiguous() for t in odd.values())
    got = run((x, weight, strided(bias), grad_out), PLAIN, plan, **odd)
    assert_same(got, reference.gradients(x, weight, bias, grad_out, padding=1, grad_scale=scale, **made))


@pytest.mark.parametrize("plan", PLANS)
def test_inputs_are_left_alone(plan):
    problem, made = inputs(PLAIN, layout="channels_last", integers=False), masks(PLAIN, "all")
    made["grad_scale"] = torch.rand(6)
    before = [t.clone() for t in (*problem, *made.values())]
    run(problem, PLAIN, plan, **made)
    assert all(map(torch.equal, before, (*problem, *made.values())))


def test_gradients_without_any_optional_argument():
    """Neither bias nor masks nor scale: the backward pass has no optional tensor to count."""
    x, weight = torch.randn(2, 3, 5, 5, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    grads = torch.autograd.grad(pk.masked_conv2d(x, weight).sum(), (x, weight))
    expected = torch.autograd.grad(torch.nn.functional.conv2d(x, weight).sum(), (x, weight))
    torch.testing.assert_close(grads, expected)
