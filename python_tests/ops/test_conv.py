"""masked_conv2d against the fp64 reference over the problem list: exact with integers, within a tolerance otherwise."""

import pytest
import torch

import prunekernels as pk
from cases.conv import (
    BIG_CASES,
    CASES,
    FEW_CASES,
    FORCED,
    LAYOUTS,
    PLANS,
    ConvCase,
    assert_near,
    assert_same,
    assert_zero,
    expected,
    inputs,
    masks,
    patterns,
    run,
)
from prunekernels import reference

SCALE = torch.tensor([0, 0.5, 1, 2, 0.25, 0])


def scale_for(case):
    return SCALE.repeat(case.k // len(SCALE) + 1)[: case.k].contiguous()


def every_pattern(cases):
    return [(case, pattern) for case in cases for pattern in patterns(case)]


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("plan", "layout"), [(plan, "nchw") for plan in FORCED] + [("compact", "channels_last")])
@pytest.mark.parametrize(
    ("case", "pattern"), every_pattern(CASES[:-4]) + [(c, p) for c in BIG_CASES for p in ("kernel", "all")], ids=str
)
def test_exact(case, pattern, layout, plan):
    got = run(inputs(case, layout=layout), case, plan, **masks(case, pattern))
    assert_same(got, expected(case, pattern))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", ["sliced", "expanded"])
@pytest.mark.parametrize(("case", "pattern"), [(c, p) for c in FEW_CASES for p in ("none", "all")], ids=str)
def test_exact_with_odd_strides(case, pattern, layout, plan):
    got = run(inputs(case, layout=layout), case, plan, **masks(case, pattern))
    assert_same(got, expected(case, pattern, expanded=layout == "expanded"))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(("case", "pattern"), every_pattern(FEW_CASES), ids=str)
def test_exact_when_the_plan_is_chosen(case, pattern, layout):
    got = run(inputs(case, layout=layout), case, "auto", **masks(case, pattern))
    assert_same(got, expected(case, pattern))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("plan", FORCED)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("case", "pattern"), [(c, p) for c in FEW_CASES[::2] for p in ("all", "filter")], ids=str)
def test_exact_in_other_dtypes(case, pattern, dtype, layout, plan):
    got = run(inputs(case, dtype, layout), case, plan, **masks(case, pattern))
    assert all(t.dtype == dtype for t in got)
    want = expected(case, pattern, dtype)
    # Exact sums, rounded once where an integer needs more bits than the dtype has.
    assert_same(got, [t.to(dtype).double() for t in want])


@pytest.mark.thinned(2)
@pytest.mark.parametrize("plan", FORCED)
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("weight_grad", ["masked", "dense"])
@pytest.mark.parametrize(("case", "pattern"), [(c, p) for c in FEW_CASES for p in ("all", "filter")], ids=str)
def test_exact_weight_gradients(case, pattern, weight_grad, scaled, plan):
    problem = inputs(case, layout="channels_last" if case.k % 2 else "nchw")
    args = masks(case, pattern) | {"weight_grad": weight_grad} | ({"grad_scale": scale_for(case)} if scaled else {})
    assert_same(run(problem, case, plan, **args), reference.gradients(*problem, **case.conv_args, **args))


@pytest.mark.thinned(4)
@pytest.mark.parametrize("plan", FORCED)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", FEW_CASES[::4] + BIG_CASES[1:2], ids=str)
def test_random_numbers(case, dtype, layout, plan):
    got = run(inputs(case, dtype, layout, integers=False), case, plan, **masks(case, "all"))
    assert_near(got, expected(case, "all", dtype, expanded=layout == "expanded", integers=False))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("pattern", ["filter", "all"])
@pytest.mark.parametrize("case", FEW_CASES[::2] + BIG_CASES[1:2], ids=str)
def test_a_prepared_mask_gives_the_same_bits(case, pattern, plan):
    made = masks(case, pattern)
    prepared = pk.ConvMask(**made, out_channels=case.k, in_channels=case.c, groups=case.groups)
    problem = inputs(case, integers=False)
    with pk.plan.measure(False):  # or else "auto" may try another plan in each run
        a, b = run(problem, case, plan, **made), run(problem, case, plan, mask=prepared)
    assert all(map(torch.equal, a, b))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("case", FEW_CASES[::2] + BIG_CASES[:-1], ids=str)
def test_bitwise_repeatable(case, layout, plan):
    torch.use_deterministic_algorithms(True)  # also fills fresh memory with NaN: every result must be written
    problem = inputs(case, layout=layout, integers=False)
    a, b = (run(problem, case, plan, **masks(case, "all")) for _ in range(2))
    assert all(map(torch.equal, a, b))


@pytest.mark.parametrize("plan", FORCED)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("case", FEW_CASES[::3] + BIG_CASES[:3], ids=str)
def test_one_thread_as_good_as_two(case, layout, plan):
    problem = inputs(case, layout=layout)
    torch.set_num_threads(1)
    assert_same(run(problem, case, plan, **masks(case, "all")), expected(case, "all"))
    torch.set_num_threads(2)
    assert_same(run(problem, case, plan, **masks(case, "all")), expected(case, "all"))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("plan", FORCED)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(("case", "pattern"), [(c, p) for c in FEW_CASES[::2] for p in patterns(c)[1:]], ids=str)
def test_dead_is_exactly_plus_zero(case, pattern, layout, plan):
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN
    x, weight, bias, grad_out = inputs(case, layout=layout, integers=False)
    y, grad_x, grad_w, grad_b = run((-x.abs(), weight.abs(), -bias.abs(), grad_out), case, plan, **masks(case, pattern))
    made = masks(case, pattern)
    filters = made.get("filter_mask", torch.ones(case.k, dtype=torch.bool))
    channels = made.get("input_mask", torch.ones(case.c, dtype=torch.bool))
    assert_zero(y[:, ~filters])
    assert_zero(grad_x[:, ~channels])
    assert_zero(grad_b[~filters])
    by_kernel = channels.view(case.groups, -1).repeat_interleave(case.k // case.groups, 0)
    live = filters[:, None] & by_kernel & made.get("kernel_mask", torch.ones_like(by_kernel))
    assert_zero(grad_w[~live])
    # a channel that no live kernel reads
    unread = ~live.view(case.groups, case.k // case.groups, -1).any(1).flatten()
    assert_zero(grad_x[:, unread])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("case", FEW_CASES[::3] + BIG_CASES[1:2], ids=str)
def test_memory_formats(case, layout, plan):
    format = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}[layout]
    x, weight, bias, grad_out = inputs(case, layout=layout)
    y, grad_x, grad_w, _ = run((x, weight, bias, grad_out), case, plan, **masks(case, "all"))
    assert y.is_contiguous(memory_format=format)
    assert grad_x.is_contiguous(memory_format=format)
    assert grad_w.is_contiguous(memory_format=format)


@pytest.mark.parametrize("plan", PLANS)
def test_output_follows_the_input_not_the_weight(plan):
    case = ConvCase()
    x, weight, bias, grad_out = inputs(case)
    weight = weight.contiguous(memory_format=torch.channels_last)
    y, grad_x, _, _ = run((x, weight, bias, grad_out), case, plan, **masks(case, "filter"))
    assert y.is_contiguous() and grad_x.is_contiguous()


TINY = [
    ConvCase(n=2, c=3, k=4, h=3, w=4),
    ConvCase(n=2, c=4, k=4, h=4, w=3, stride=(1, 2), groups=2, padding=2),
    ConvCase(n=1, c=3, k=3, h=3, w=3, r=1, s=1, padding=0),
]
TINIEST = ConvCase(n=1, c=2, k=3, h=2, w=3, r=1, s=2, padding=(0, 1))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("plan", FORCED)
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("weight_grad", ["masked", "dense"])
@pytest.mark.parametrize("pattern", ["none", "filter", "all"])
@pytest.mark.parametrize("case", TINY, ids=str)
def test_gradcheck(case, pattern, weight_grad, scaled, plan):
    x, weight, bias, _ = inputs(case, torch.float64, integers=False)
    leaves = tuple(t.requires_grad_() for t in (x, weight, bias))
    args = masks(case, pattern) | case.conv_args | {"weight_grad": weight_grad}
    if scaled:
        args["grad_scale"] = scale_for(case)
    with pk.plan.force(plan):
        if weight_grad == "masked" and not scaled:  # otherwise grad_w is by intent not the derivative of the output
            assert torch.autograd.gradcheck(lambda *t: pk.masked_conv2d(*t, **args), leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda *t: pk.masked_conv2d(*t, **args), leaves, fast_mode=True)


@pytest.mark.parametrize("plan", FORCED)
@pytest.mark.parametrize("weight_grad", ["masked", "dense"])
def test_gradcheck_number_by_number(weight_grad, plan):
    x, weight, bias, _ = inputs(TINIEST, torch.float64, integers=False)
    leaves = tuple(t.requires_grad_() for t in (x, weight, bias))
    made = {"filter_mask": torch.tensor([1, 0, 1]).bool(), "kernel_mask": torch.tensor([[1, 0], [1, 1], [1, 1]]).bool()}
    args = made | TINIEST.conv_args | {"weight_grad": weight_grad}
    with pk.plan.force(plan):
        if weight_grad == "masked":
            assert torch.autograd.gradcheck(lambda *t: pk.masked_conv2d(*t, **args), leaves)
        assert torch.autograd.gradgradcheck(lambda *t: pk.masked_conv2d(*t, **args), leaves)
