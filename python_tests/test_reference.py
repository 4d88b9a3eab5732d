"""The reference itself: against nested loops, against the formula under autograd, and by gradcheck."""

import pytest
import torch
import torch.nn.functional as F

from cases.conv import CASES, ConvCase, assert_same, assert_zero, inputs, masks, patterns
from prunekernels import reference

SMALL = [case for case in CASES if case.n * case.c * case.k * case.h * case.w * case.r * case.s < 60000]
SCALES = torch.tensor([0, 0.5, 1, 2, 0, 0.25])


def scale_for(case):
    return SCALES.repeat(case.k // len(SCALES) + 1)[: case.k]


@pytest.mark.thinned(4)
@pytest.mark.parametrize("grad", ["masked", "dense", "masked-scaled", "dense-scaled"])
@pytest.mark.parametrize(("case", "pattern"), [(c, p) for c in SMALL[::3] for p in patterns(c)[1:]], ids=str)
def test_equals_loops(case, pattern, grad):
    x, weight, bias, grad_out = inputs(case, torch.float64)
    args = masks(case, pattern) | case.conv_args | {"weight_grad": grad.partition("-")[0]}
    if "scaled" in grad:
        args["grad_scale"] = scale_for(case)
    want = reference.masked_conv2d_loops(x, weight, bias, grad_out, **args)
    assert_same(reference.gradients(x, weight, bias, grad_out, **args), want)


@pytest.mark.parametrize("case", SMALL[1::2], ids=str)
def test_unmasked_equals_loops(case):
    x, weight, _, grad_out = inputs(case, torch.float64)
    want = reference.masked_conv2d_loops(x, weight, None, grad_out, **case.conv_args)
    assert_same(reference.gradients(x, weight, None, grad_out, **case.conv_args), want)


@pytest.mark.parametrize(("case", "pattern"), [(c, p) for c in CASES[::4] for p in patterns(c)], ids=str)
def test_equals_formula_under_autograd(case, pattern):
    x, weight, bias, grad_out = inputs(case, torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    filters, channels, live = reference.live_masks(weight, *map(masks(case, pattern).get, MASK_NAMES), case.groups)
    zero = torch.zeros((), dtype=torch.float64)
    y = F.conv2d(
        torch.where(channels[:, None, None], x, zero),
        torch.where(live[:, :, None, None], weight, zero),
        torch.where(filters, bias, zero),
        **case.conv_args,
    )
    want = (y, *torch.autograd.grad(y, leaves, torch.where(filters[:, None, None], grad_out, zero)))
    assert_same(reference.gradients(x, weight, bias, grad_out, **masks(case, pattern), **case.conv_args), want)


MASK_NAMES = ("filter_mask", "kernel_mask", "input_mask")
TINY = ConvCase(n=2, c=4, k=4, h=3, w=4, stride=(1, 2), groups=2)


@pytest.mark.parametrize("weight_grad", ["masked", "dense"])
def test_second_derivatives(weight_grad):
    x, weight, bias, _ = inputs(TINY, torch.float64, integers=False)
    args = masks(TINY, "all") | TINY.conv_args | {"weight_grad": weight_grad}
    leaves = tuple(t.requires_grad_() for t in (x, weight, bias))
    if weight_grad == "masked":  # the dense gradient of a masked weight is by intent not the derivative of the output
        assert torch.autograd.gradcheck(lambda *t: reference.masked_conv2d(*t, **args), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: reference.masked_conv2d(*t, **args), leaves)


def test_dead_numbers_are_never_read():
    case = ConvCase(c=4, k=6, padding=0)
    dead = {"filter_mask": torch.arange(6) != 2, "input_mask": torch.arange(4) != 1}
    dead["kernel_mask"] = torch.ones(6, 4, dtype=torch.bool)
    dead["kernel_mask"][4, 3] = False
    x, weight, bias, grad_out = inputs(case, torch.float64)
    want = reference.gradients(x, weight, bias, grad_out, **dead)
    x[:, 1], weight[2], weight[:, 1], weight[4, 3], bias[2], grad_out[:, 2] = (float("nan"),) * 6
    got = reference.gradients(x, weight, bias, grad_out, **dead)
    assert_same(got, want)
    y, grad_x, grad_w, grad_b = got
    for zero in (y[:, 2], grad_x[:, 1], grad_w[2], grad_w[:, 1], grad_w[4, 3], grad_b[2]):
        assert_zero(zero)


def test_takes_3d_input_and_a_mask_object():
    class Masks:
        filter_mask, kernel_mask, input_mask = torch.tensor([True, False, True]), None, None

    x, weight = torch.randn(2, 5, 5), torch.randn(3, 2, 3, 3)
    y = reference.masked_conv2d(x, weight, mask=Masks, padding="same")
    assert y.dtype == torch.float64 and y.shape == (3, 5, 5)
    assert torch.equal(y, reference.masked_conv2d(x[None], weight, filter_mask=Masks.filter_mask, padding=1)[0])


@pytest.mark.parametrize("bad", [{"weight_grad": "x"}, {"padding": "same", "stride": 2}], ids=str)
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match="reference.masked_conv2d.*expected.*got"):
        reference.masked_conv2d(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3), **bad)
