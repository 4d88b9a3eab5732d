"""Convolutions of one pixel, which the dense plan computes as products of matrices."""

import pytest
import torch

import prunekernels as pk
from cases.conv import LAYOUTS, ConvCase, assert_near, assert_same, inputs, only, run
from prunekernels import reference

CASES = [
    ConvCase(n=n, c=c, k=k, h=1, w=1, r=1, s=1, padding=0, stride=stride)
    for n, c, k, stride in [(1, 5, 3, 1), (3, 8, 12, 1), (2, 1, 4, 2), (4, 6, 1, 1), (9, 33, 17, 1)]
]
# One pixel or one tap, but no product.
OTHERS = [
    ConvCase(n=3, h=1, w=1, r=1, s=1, padding=1, stride=3),  # reads padding alone
    ConvCase(n=3, h=1, w=1, r=1, s=1, padding=0, groups=2),
    ConvCase(n=3, h=1, w=1),
    ConvCase(n=3, h=2, w=1, r=1, s=1, padding=0, stride=2),
]


def made(case):
    filters = ~only(case.k, 0) if case.k > 1 else None
    return {"filter_mask": filters, "input_mask": ~only(case.c, case.c - 1) if case.c > 1 else None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES + OTHERS, ids=str)
def test_numbers(case, layout, dtype):
    x, weight, bias, grad_out = inputs(case, dtype, layout)
    for b in (bias, None):
        want = reference.gradients(x, weight, b, grad_out, **made(case), **case.conv_args)
        assert_same(run((x, weight, b, grad_out), case, "dense", **made(case)), want)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_results_have_the_layout_of_the_input(case, layout):
    x, weight, _, grad_out = inputs(case)
    x = torch.empty_like(x, memory_format=layout).copy_(x).requires_grad_()
    with pk.plan.force("dense"):
        y = pk.masked_conv2d(x, weight, **made(case), **case.conv_args)
    (grad_x,) = torch.autograd.grad(y, x, grad_out)
    for result in (y, grad_x):
        size = result.shape
        assert result.stride() == torch.empty(size, memory_format=layout).stride()


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_fewer_bits_for_products_mean_no_fewer_for_convolutions(precision):
    case = CASES[-1]
    problem = inputs(case, integers=False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        got = run(problem, case, "dense", **made(case))
    finally:
        torch.set_float32_matmul_precision(before)
    assert_near(got, reference.gradients(*problem, **made(case), **case.conv_args))
