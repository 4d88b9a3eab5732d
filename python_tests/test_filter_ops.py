"""mask_grad_, filter_norms, channel_mean and cluster_mean_ equal plain torch to the bit, on integers."""

import contextlib

import pytest
import torch

import prunekernels as pk
from cases.conv import assert_zero, capped, isas
from cases.steps import OPS, chosen, table
from prunekernels.filter_ops import channel_mean, cluster_mean_, filter_norms, mask_grad_

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "sliced")
SIZES = ((6, 5, 3, 3), (8, 33, 3, 3), (40, 64, 1, 1), (10, 130, 1, 3))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
layouts = pytest.mark.parametrize("layout", LAYOUTS)
sizes = pytest.mark.parametrize("size", SIZES, ids=str)
instruction_sets = pytest.mark.parametrize("isa", [None, *isas()])


def at_most(isa):
    return capped(isa) if isa else contextlib.nullcontext()


def integers(size, dtype=torch.float32, layout="contiguous", most=3):
    x = torch.randint(-most, most + 1, size).to(dtype)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    return torch.cat([x, x], 1)[:, : size[1]] if layout == "sliced" else x


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def kernels(size):
    mask = chosen(*size[:2], share=0.6)
    mask[0], mask[1] = True, False  # a row with nothing dead, a row with everything dead
    return mask


# ---- mask_grad_ -----------------------------------------------------------------------------------------------------


@pytest.mark.thinned(2)
@instruction_sets
@dtypes
@layouts
@sizes
def test_mask_grad_does_it_all(size, layout, dtype, isa):
    grad, weight, K = integers(size, dtype, layout), integers(size, dtype), size[0]
    mask, scale, sums = (
        kernels(size),
        torch.randint(0, 3, (K,)).float(),
        [torch.ones(K, dtype=wide(dtype)) for _ in "123"],
    )
    live = (mask & (scale != 0)[:, None])[:, :, None, None].expand_as(grad)
    expected = torch.where(live, grad * scale.to(dtype).view(-1, 1, 1, 1), 0)
    g, w = expected.to(wide(dtype)).reshape(K, -1), torch.where(live, weight, 0).to(wide(dtype)).reshape(K, -1)
    accumulated = integers(size, wide(dtype), "channels_last")
    then = accumulated + expected.to(wide(dtype))
    grad, weight = (torch.where(live, t, torch.nan) if layout == "contiguous" else t for t in (grad, weight))
    names = dict(zip(("abs_sums", "square_sums", "product_sums"), ([s] for s in sums), strict=True))
    with at_most(isa):
        mask_grad_(
            [grad], [mask], grad_scales=[scale], weights=[weight], accumulated=[accumulated], add_to_sums=True, **names
        )
    assert torch.equal(grad, expected) and torch.equal(accumulated, then)
    assert_zero(grad[~live])
    for got, terms in zip(sums, (g.abs(), g * g, w * g), strict=True):
        assert torch.equal(got, 1 + terms.sum(1))


@dtypes
@layouts
@pytest.mark.parametrize("mask", ["filters", "kernels", "all", "none"])
def test_mask_grad_only_masks(mask, layout, dtype):
    size = (6, 5, 3, 3)
    grad = integers(size, dtype, layout)
    live = {"filters": chosen(6), "kernels": kernels(size), "all": torch.zeros(6) > 0, "none": torch.ones(6) > 0}[mask]
    elements = live.view(*live.shape, *[1] * (4 - live.dim())).expand(size)
    expected = torch.where(elements, grad, 0)
    grad[~elements] = torch.nan
    mask_grad_([grad], [live])
    assert torch.equal(grad, expected)
    assert_zero(grad[~elements])


def test_mask_grad_of_many_layers():
    """Tensors large enough to be split among threads, beside vectors and tensors without a mask."""
    grads = [integers(size) for size in ((100, 50, 3, 3), (100,), (7, 3), (64, 100, 1, 1))]
    masks = [chosen(100), chosen(100), None, pk.ConvMask(chosen(64), input_mask=chosen(100))]
    lives = [masks[0][:, None, None, None], masks[1], torch.tensor(True)]
    lives.append((masks[3].filter_mask[:, None] & masks[3].input_mask)[:, :, None, None])
    expected = [torch.where(live, grad, 0) for live, grad in zip(lives, grads, strict=True)]
    sums = [torch.zeros(100), torch.zeros(100), torch.empty(0), torch.zeros(64)]
    for _ in range(2):  # the second time replaces the sums
        mask_grad_(grads, masks, abs_sums=sums)
    for grad, then, total in zip(grads, expected, sums, strict=True):
        assert torch.equal(grad, then)
        assert not total.numel() or torch.equal(total, then.reshape(len(then), -1).abs().sum(1))


def test_sums_of_rows_without_elements():
    sums = torch.full((3,), 7.0)
    mask_grad_([torch.zeros(3, 0)], abs_sums=[sums], add_to_sums=True)
    assert sums.tolist() == [7.0] * 3
    mask_grad_([torch.zeros(3, 0)], abs_sums=[sums])
    assert sums.tolist() == [0.0] * 3


def test_accumulating_16_bits_does_not_round():
    grad, accumulated = torch.full((1, 1, 1, 1), 1.0, dtype=torch.bfloat16), torch.full((1, 1, 1, 1), 4096.0)
    mask_grad_([grad], accumulated=[accumulated])
    assert accumulated.item() == 4097


def test_a_mask_grad_counts_as_an_edit():
    x = torch.ones(2, 2, requires_grad=True)
    grad = torch.ones(2, 2)
    y = (x * grad).sum()
    mask_grad_([grad], [torch.tensor([True, False])])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# ---- norms ----------------------------------------------------------------------------------------------------------


@pytest.mark.thinned(2)
@instruction_sets
@dtypes
@layouts
@sizes
@pytest.mark.parametrize("per_kernel", [False, True])
def test_norms(per_kernel, size, layout, dtype, isa):
    weight, mask = integers(size, dtype, layout), kernels(size)
    live = mask[:, :, None, None].expand(size)
    rows = torch.where(live, weight, 0).to(wide(dtype)).reshape(*size[: 1 + per_kernel], -1)
    if layout != "sliced":
        weight[~live] = torch.nan
    with at_most(isa):
        (l1,) = filter_norms([weight], [mask], p=1, per_kernel=per_kernel)
        (l2,) = filter_norms([weight], [mask], per_kernel=per_kernel)
    assert torch.equal(l1, rows.abs().sum(-1))
    torch.testing.assert_close(l2, rows.square().sum(-1).sqrt())


def test_norms_of_several_without_masks():
    weights = [integers((5, 3, 3, 3)), integers((4,)), integers((2, 0))]
    norms = filter_norms(weights, p=1)
    assert [n.tolist() for n in norms] == [w.reshape(len(w), -1).abs().sum(1).tolist() for w in weights]
    assert filter_norms([]) == channel_mean([]) == []
    mask_grad_([])
    cluster_mean_([], [])


# ---- channel_mean ---------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(4, 3, 4, 8), (2, 16, 1, 1), (8, 17, 2, 4), (2, 33, 8, 4), (1, 1, 4, 4)], ids=str)
def test_channel_mean(size, layout, relu, dtype):
    x = integers(size, dtype, layout)
    (mean,) = channel_mean([x], relu=relu)
    values = x.double().clamp(min=0) if relu else x.double()
    assert mean.dtype == torch.float32 and torch.equal(mean, values.mean((0, 2, 3)).float())


def test_channel_mean_of_other_ranks_and_of_nothing():
    xs = [integers((8, 3)), integers((4, 5, 2)), torch.zeros(0, 3, 2, 2), torch.zeros(2, 3, 0, 2)]
    means = channel_mean(xs)
    assert torch.equal(means[0], xs[0].mean(0)) and torch.equal(means[1], xs[1].mean((0, 2)))
    assert_zero(torch.stack(means[2:]))


def test_channel_mean_keeps_nan():
    x = torch.zeros(1, 2, 2, 2)
    x[0, 1, 0, 0] = torch.nan
    assert channel_mean([x], relu=True)[0].isnan().tolist() == [False, True]


# ---- cluster_mean_ --------------------------------------------------------------------------------------------------

CLUSTERS = torch.tensor([0, 3, 0, -1, 3, 0, 7, 0], dtype=torch.int32)  # 0: four rows, 3: two, 7: one
MEMBERS = ([0, 2, 5, 7], [1, 4])


@dtypes
@layouts
@pytest.mark.parametrize("pull", [False, True])
@pytest.mark.parametrize("size", [(8, 5, 3, 3), (8, 300, 1, 1)], ids=str)
def test_cluster_mean(size, pull, layout, dtype):
    grad, weight = integers(size, dtype, layout), integers(size, dtype)
    expected = grad.clone()
    for members in MEMBERS:
        g, w = grad[members].to(wide(dtype)), weight[members].to(wide(dtype))
        expected[members] = (g.mean(0) + (0.5 * (w - w.mean(0)) if pull else torch.zeros_like(w))).to(dtype)
    cluster_mean_([grad], [CLUSTERS], **({"weights": [weight], "strength": 0.5} if pull else {}))
    assert torch.equal(grad, expected)


def test_cluster_mean_of_many_layers():
    grads = [integers((300, 64, 3, 3)), integers((300,)), integers((4, 2))]
    clusters = [(torch.arange(300) % 7).int(), (torch.arange(300) % 7).int(), torch.full((4,), -1, dtype=torch.int32)]
    expected = [grad.clone() for grad in grads]
    for grad in expected[:2]:
        for c in range(7):
            grad[c::7] = grad[c::7].mean(0, keepdim=True)
    cluster_mean_(grads, clusters)
    for got, then in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, then)
    assert torch.equal(grads[0][0], grads[0][7]) and torch.equal(grads[2], expected[2])


def test_deviation_shrinks_by_the_pull():
    """C-SGD: a step of size lr with this gradient and weight decay shrinks it by 1 - lr (decay + strength)."""
    weight, lr, decay, strength = torch.randn(8, 4, 3, 3, dtype=torch.float64), 0.1, 0.01, 3.0
    before, grad = weight.clone(), torch.randn(8, 4, 3, 3, dtype=torch.float64)
    cluster_mean_([grad], [CLUSTERS], weights=[weight], strength=strength)
    weight -= lr * (grad + decay * weight)
    for members in MEMBERS:
        deviations = [w[members] - w[members].mean(0) for w in (before, weight)]
        torch.testing.assert_close(deviations[1], deviations[0] * (1 - lr * (decay + strength)))


# ---- errors ---------------------------------------------------------------------------------------------------------

W = torch.ones(4, 3, 1, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mask_grad_([W], []), "mask_grad_: masks: expected 1 masks, got 0"),
        (lambda: mask_grad_([W], [torch.ones(4)]), r"mask_grad_: masks: expected bool \[4\] or \[4, 3\]"),
        (
            lambda: mask_grad_([W], [torch.ones(3) > 0]),
            r"mask_grad_: masks: expected bool \[4\] .* got torch.bool \[3\]",
        ),
        (lambda: mask_grad_([W], [table(torch.ones(5) > 0, channels=3)]), "mask_grad_: masks: expected a table for a"),
        (lambda: mask_grad_([W], grad_scales=[torch.ones(3)]), r"mask_grad_: grad_scale: expected float32 \[4\]"),
        (lambda: mask_grad_([W], abs_sums=[torch.ones(3)]), r"mask_grad_: abs_sums: expected \S+ \[4\], contiguous"),
        (lambda: mask_grad_([W], abs_sums=[W[:, 0, 0, 0].int()]), "mask_grad_: abs_sums: expected"),
        (lambda: mask_grad_([W], square_sums=[]), None),
        (lambda: mask_grad_([W], product_sums=[torch.ones(4)]), "mask_grad_: weights: expected 1 tensors, got 0"),
        (lambda: mask_grad_([W], accumulated=[W.double()]), "mask_grad_: accumulated: expected"),
        (lambda: mask_grad_([W, W.double()]), "mask_grad_: grads: expected"),
        (lambda: mask_grad_([W.int()]), "mask_grad_: grads: expected float32, float64, bfloat16 or float16"),
        (lambda: mask_grad_([W.sum()]), "mask_grad_: grads: expected tensors of at least one dimension"),
        (lambda: filter_norms([W], p=3), "filter_norms: p: expected 1 or 2, got 3"),
        (
            lambda: filter_norms([W[:, 0, 0, 0]], per_kernel=True),
            "filter_norms: weights: expected two or more dimensions",
        ),
        (lambda: channel_mean([torch.ones(3)]), r"channel_mean: xs: expected tensors \[N, C, ...\], got \[3\]"),
        (lambda: cluster_mean_([W], []), "cluster_mean_: clusters: expected 1 tensors, got 0"),
        (lambda: cluster_mean_([W], [torch.zeros(4)]), r"cluster_mean_: clusters: expected int32 \[4\] on the CPU"),
        (
            lambda: cluster_mean_([W], [CLUSTERS[:4]], weights=[W, W]),
            "cluster_mean_: weights: expected 1 tensors, got 2",
        ),
    ],
)
def test_errors(call, message):
    if message is None:
        return call()
    with pytest.raises(ValueError, match=message):
        call()


def test_operators_are_the_ones_tested():
    assert {"mask_grad_", "filter_norms", "channel_mean", "cluster_mean_"} <= set(dir(OPS))
