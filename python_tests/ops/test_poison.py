"""NaN, infinities, subnormals and negative zeros in places that masked_conv2d must not read."""

import dataclasses

import pytest
import torch

from cases.conv import (
    GROUPED,
    KINDS,
    PLAIN,
    PLANS,
    ConvCase,
    assert_same,
    assert_zero,
    capped,
    inputs,
    isas,
    masks,
    only,
    run,
)
from prunekernels import reference

WIDE = ConvCase(n=3, c=12, k=6, h=5, w=19, groups=2)
# More weights than pixels: the dense plan masks dead channels of its operand rather than weights.
HEAVY = [ConvCase(n=2, c=8, k=12, h=2, w=3), ConvCase(n=2, c=8, k=12, h=2, w=3, groups=2)]
# A product of matrices; and one whose weight's gradient shows that the output's is finite.
ONE_PIXEL = ConvCase(n=5, c=8, k=12, h=1, w=1, r=1, s=1, padding=0)
HEAVY += [ONE_PIXEL, ConvCase(n=5, c=8, k=6, h=3, w=4, r=1, s=1, padding=0)]
NAN, INF = float("nan"), float("inf")


@pytest.mark.thinned(3)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("weight_grad", ["masked", "dense"])
@pytest.mark.parametrize("poison", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("case", KINDS + HEAVY, ids=str)
def test_poison_in_dead_numbers(case, poison, weight_grad, layout, plan):
    x, weight, bias, grad_out = inputs(case, layout=layout)
    filters, channels = ~only(case.k, 0, 3), ~only(case.c, 1)
    dead = {"filter_mask": filters, "kernel_mask": masks(case, "kernel")["kernel_mask"], "input_mask": channels}
    want = reference.gradients(x, weight, bias, grad_out, **dead, **case.conv_args, weight_grad=weight_grad)

    x, weight, bias = x.clone(), weight.clone(), bias.clone()
    x[:, ~channels] = poison
    weight[~reference.live_masks(weight, **dead, groups=case.groups)[2]] = poison
    bias[~filters] = poison
    assert_same(run((x, weight, bias, grad_out), case, plan, **dead, weight_grad=weight_grad), want)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dead", ["filters", "inputs", "both"])
@pytest.mark.parametrize("case", [PLAIN, *HEAVY], ids=str)
def test_poison_in_weights_of_dead_filters_and_channels(case, dead, layout, plan):
    made = {"filter_mask": ~only(case.k, 0, 3), "input_mask": ~only(case.c, 1)}
    made = {name: mask for name, mask in made.items() if dead == "both" or name.startswith(dead[:-1])}
    x, weight, bias, grad_out = inputs(case, layout=layout)
    want = reference.gradients(x, weight, bias, grad_out, **made, **case.conv_args)
    weight[~reference.live_masks(weight, made.get("filter_mask"), None, made.get("input_mask"), case.groups)[2]] = NAN
    assert_same(run((x, weight, bias, grad_out), case, plan, **made), want)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("weight_grad", ["masked", "dense", "scaled"])
@pytest.mark.parametrize("case", KINDS + HEAVY, ids=str)
def test_poison_in_grad_out_of_dead_filters(case, weight_grad, layout, plan):
    x, weight, bias, grad_out = inputs(case, layout=layout)
    filters = ~only(case.k, 0, 3)
    args = {"filter_mask": filters, "weight_grad": "masked" if weight_grad == "masked" else "dense"}
    if weight_grad == "scaled":
        args["grad_scale"] = filters.float() * 2  # the dead filters do not learn
    want = reference.gradients(x, weight, bias, grad_out, **args, **case.conv_args)
    grad_out = grad_out.clone()
    grad_out[:, ~filters] = NAN
    y, grad_x, grad_w, grad_b = run((x, weight, bias, grad_out), case, plan, **args)
    if weight_grad == "dense":  # dead filters do learn from their grad_out here, whatever it is
        assert grad_w[~filters].isnan().any()
        want = (*want[:2], torch.where(filters[:, None, None, None], want[2], 0), want[3])
        grad_w = torch.where(filters[:, None, None, None], grad_w, 0)
    assert_same((y, grad_x, grad_w, grad_b), want)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("at", [(0, 0, 0), (2, 4, 18), (1, 2, 9)], ids=str)
@pytest.mark.parametrize("dead", ["inputs", "filters", "both"])
@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("poison", [NAN, INF], ids=str)
def test_one_poisoned_number(poison, group, dead, at, layout, plan):
    """It sits in one group only, and in a corner; the other group need not have any dead filter or channel."""
    x, weight, bias, grad_out = inputs(WIDE, layout=layout)
    made = {"filter_mask": ~only(6, 3 * group + 1), "input_mask": ~only(12, 6 * group + 4)}
    made = {name: mask for name, mask in made.items() if dead == "both" or name.startswith(dead[:-1])}
    want = reference.gradients(x, weight, bias, grad_out, **made, **WIDE.conv_args)
    n, h, w = at
    if "input_mask" in made:
        x[n, 6 * group + 4, h, w] = poison
    if "filter_mask" in made:
        grad_out[n, 3 * group + 1, h, w] = poison
    assert_same(run((x, weight, bias, grad_out), WIDE, plan, **made), want)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_poison_in_other_dtypes(dtype, plan):
    x, weight, bias, grad_out = inputs(GROUPED, dtype)
    made = {"filter_mask": ~only(6, 0, 4), "input_mask": ~only(4, 1)}
    want = reference.gradients(x, weight, bias, grad_out, **made, **GROUPED.conv_args)
    x[1, 1, 2, 3], grad_out[2, 4, 5, 6], weight[0], bias[4] = NAN, INF, INF, NAN
    assert_same(run((x, weight, bias, grad_out), GROUPED, plan, **made), want)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("case", [PLAIN, *HEAVY], ids=str)
@pytest.mark.parametrize("place", ["x", "weight", "bias"])
def test_poison_in_live_numbers_is_not_hidden(place, case, layout, plan):
    x, weight, bias, grad_out = inputs(case, layout=layout)
    dead = {"filter_mask": ~only(case.k, 0), "input_mask": ~only(case.c, 1)}
    {"x": x[:, 0], "weight": weight[1, 0], "bias": bias[1:2]}[place].fill_(NAN)
    y = run((x, weight, bias, grad_out), case, plan, **dead)[0]
    assert y[:, 1].isnan().all()
    assert_zero(y[:, 0])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("case", [PLAIN, *HEAVY], ids=str)
def test_poison_in_grad_out_of_live_filters_is_not_hidden(case, layout, plan):
    x, weight, bias, grad_out = inputs(case, layout=layout)
    dead = {"filter_mask": ~only(case.k, 0), "input_mask": ~only(case.c, 1)}
    grad_out[:, 1] = NAN
    _, grad_x, grad_w, grad_b = run((x, weight, bias, grad_out), case, plan, **dead)
    assert all(grad.isnan().all() for grad in (grad_x[:, 0], grad_w[1, 0], grad_b[1]))
    for zero in (grad_x[:, 1], grad_w[0], grad_b[0]):
        assert_zero(zero)


# The dense plan looks at the fewest results whose windows have all that is read.
WINDOWS = [
    ConvCase(n=1, h=7, w=5),
    ConvCase(n=1, h=5, w=7, padding=0),
    ConvCase(n=1, h=6, w=8, padding=3),
    ConvCase(n=1, h=8, w=7, stride=2),
    ConvCase(n=1, h=8, w=8, stride=3, padding=0),
    ConvCase(n=1, h=7, w=7, stride=(1, 2), r=1, s=1, padding=0),
    ConvCase(n=1, h=9, w=8, dilation=2, padding=2),
    ConvCase(n=1, h=9, w=9, dilation=(3, 1), stride=2, padding=(3, 0)),
    ConvCase(n=1, h=7, w=9, r=5, s=2, padding=(2, 1)),
    ConvCase(n=1, h=6, w=6, c=4, k=4, groups=4),
]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dead", ["inputs", "both"])
@pytest.mark.parametrize("case", WINDOWS, ids=str)
def test_poison_in_any_pixel(case, dead, layout):
    """In a dead channel, and in a live one, of the input and of the output's gradient."""
    filters, channels = ~only(case.k, *((0, 3) if dead == "both" else ())), ~only(case.c, 1)
    made = {"filter_mask": filters, "input_mask": channels}

    def pixels(tensor):
        return [(c, *at) for at in torch.ones(tensor.shape[2:]).nonzero().tolist() for c in (1, 2)]

    def wrong(poisoned, place):
        problem = list(inputs(case, layout=layout))
        problem[poisoned][(0, *place)] = NAN
        want = reference.gradients(*problem, **made, **case.conv_args)[:2]  # a vendor's grad_w may skip the padding
        got = run(tuple(problem), case, "dense", **made)
        return not all(torch.equal(got[i].double().nan_to_num(99), want[i].nan_to_num(99)) for i in range(2))

    x, _, _, grad_out = inputs(case)
    assert not [place for place in pixels(x) if wrong(0, place)]
    assert not [place for place in pixels(grad_out) if wrong(3, place)]


@pytest.mark.parametrize("case", [PLAIN, *HEAVY], ids=str)
def test_a_weight_of_another_layout_stays_as_it_is(case):
    _, weight, bias, _ = inputs(case)
    x, grad_out = (t.contiguous(memory_format=torch.channels_last) for t in inputs(case)[::3])
    before, made = weight.clone(), {"filter_mask": ~only(case.k, 0, 3), "input_mask": ~only(case.c, 1)}
    problem = x, weight, bias, grad_out
    assert_same(run(problem, case, "dense", **made), reference.gradients(*problem, **made, **case.conv_args))
    assert torch.equal(weight, before)


# Vectors of neighbouring pixels, or of as many images.
in_planes = pytest.mark.parametrize(("isa", "n"), [(isa, n) for isa in isas() for n in (2, 7, 14)])
SHAPES = [
    ConvCase(c=7, k=8, h=5, w=11),
    ConvCase(c=7, k=8, h=5, w=11, r=1, s=1, padding=0),
    ConvCase(c=7, k=8, h=6, w=11, stride=2),
    ConvCase(c=8, k=8, h=5, w=5, r=2, groups=2, padding=3),
]


@pytest.mark.thinned(2)
@in_planes
@pytest.mark.parametrize("plan", ["direct", "sparse"])
@pytest.mark.parametrize("weight_grad", ["masked", "dense"])
@pytest.mark.parametrize("poison", [NAN, INF], ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_poison_between_live_planes(case, poison, weight_grad, plan, isa, n):
    """Every dead channel, filter and kernel: before, between and behind the live ones."""
    case = dataclasses.replace(case, n=n)
    x, weight, bias, grad_out = inputs(case)
    dead = {"filter_mask": ~only(case.k, 0, 3, 7), "input_mask": ~only(case.c, 0, 4, 6)}
    dead["kernel_mask"] = masks(case, "kernel")["kernel_mask"]
    want = reference.gradients(x, weight, bias, grad_out, **dead, **case.conv_args, weight_grad=weight_grad)
    x[:, ~dead["input_mask"]] = poison
    weight[~reference.live_masks(weight, **dead, groups=case.groups)[2]] = poison
    bias[~dead["filter_mask"]] = poison
    if weight_grad == "masked":  # otherwise dead filters learn from it
        grad_out[:, ~dead["filter_mask"]] = poison
    with capped(isa):
        assert_same(run((x, weight, bias, grad_out), case, plan, **dead, weight_grad=weight_grad), want)


@in_planes
@pytest.mark.parametrize("plan", ["direct", "sparse"])
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_subnormals_are_zeros_and_only_here(case, plan, isa, n):
    """Products of decaying weights are flushed; torch's own arithmetic goes on with subnormals as before."""
    case = dataclasses.replace(case, n=n)
    x, weight, _, grad_out = inputs(case)
    tiny = torch.tensor([1e-39])
    with capped(isa):
        made = masks(case, "all")
        y, grad_x, _, _ = run((x, weight * tiny, None, grad_out), case, plan, **made)
        grad_w = run((x * tiny, weight, None, grad_out), case, plan, **made)[2]
    for zero in (y, grad_x, grad_w):
        assert not zero.count_nonzero()
    assert (tiny * 0.5).count_nonzero() == 1


@pytest.mark.parametrize("plan", PLANS)
def test_subnormal_dead_numbers_leave_nothing(plan):
    x, weight, bias, grad_out = inputs(PLAIN, integers=False)
    x[:, 1], weight[2], bias[2], grad_out[:, 2] = 1e-41, 1e-41, 1e-41, 1e-41
    dead = {"filter_mask": ~only(6, 2), "input_mask": ~only(4, 1)}
    y, grad_x, grad_w, grad_b = run((x, weight, bias, grad_out), PLAIN, plan, **dead)
    for zero in (y[:, 2], grad_x[:, 1], grad_w[2], grad_w[:, 1], grad_b[2]):
        assert_zero(zero)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_negative_zeros_in_dead_weights_leave_no_sign(case, layout, dtype, plan):
    x, weight, bias, grad_out = inputs(case, dtype, layout)
    filters, channels = ~only(case.k, 1, 3, 4), ~only(case.c, 0, 2)
    live = reference.live_masks(weight, filters, None, channels, case.groups)[2]
    weight[~live] = -0.0
    bias[~filters] = -0.0
    problem = (x.abs() + 1, weight, bias, grad_out.abs() + 1)
    y, grad_x, grad_w, grad_b = run(problem, case, plan, filter_mask=filters, input_mask=channels)
    for zero in (y[:, ~filters], grad_x[:, ~channels], grad_w[~live], grad_b[~filters]):
        assert_zero(zero)
