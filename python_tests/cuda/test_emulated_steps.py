"""The operators of a training step by the emulated CUDA operators: the numbers and layouts of the CPU's, what is
launched, and the optimizers over them.
"""
# ruff: noqa: F811 (fixtures)

import pytest
import torch

import prunekernels as pk
from cases.emulated_ops import events, launched, library  # noqa: F401
from cases.emulated_steps import (  # noqa: F401
    BF16,
    CLUSTERS,
    F16,
    F32,
    F64,
    MASKS,
    SGD,
    assert_like_the_cpu,
    draw,
    emulated,
    ids,
    parameters,
    sums,
)
from cases.steps import SAMPLES
from prunekernels import optim
from prunekernels.ops import fallback_steps

pytestmark = pytest.mark.slow  # compiles csrc/cuda

LAYOUTS = ["contiguous", "channels_last", "sliced", "mixed"]
layouts = pytest.mark.parametrize("layout", LAYOUTS)
dtypes = pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
masks = pytest.mark.parametrize("mask", MASKS)


def test_every_schema_has_an_implementation(library):
    for operator in fallback_steps.OPERATORS:
        name = f"prunekernels_emulated::{operator.__name__}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"), name


@pytest.mark.thinned(4)
@pytest.mark.parametrize("numbers", SGD)
@layouts
@masks
@dtypes
def test_sgd(dtype, mask, layout, numbers, emulated, events):
    def make():
        weights, grads, momenta, tables = parameters(mask, dtype, layout, 3)
        changes = (sums(8, 0, 4), sums(0, 0, 4)) if layout != "sliced" else ([], [])
        return weights, grads, momenta if SGD[numbers][1] else [], tables, *changes, *SGD[numbers]

    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype in (BF16, F16) and numbers != "plain" else None
    assert_like_the_cpu(emulated, "masked_sgd_", make, tolerance)
    assert launched(events) == (["launch_optim_sgd"] if dtype != F64 else [])


@pytest.mark.thinned(2)
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.3, 0.5)], ids=str)
@layouts
@masks
@dtypes
def test_adamw(dtype, mask, layout, betas, emulated, events):
    def make():
        weights, grads, averages, squares, tables = parameters(mask, dtype, layout, 4)
        squares = [t.abs_() for t in squares]
        steps = [torch.tensor(t, dtype=F32 if t < 9 else F64) for t in (0.0, 3.0, 1000.0)]
        eps = 1e-3 if dtype == F16 else 1e-8  # the CPU's steps round to the parameter's type in between, as torch's do
        return weights, grads, averages, squares, steps, tables, [], sums(8, 0, 4), 0.1, *betas, eps, 0.01

    near = {F64: 1e-12, F32: 1e-5}.get(dtype, 2e-2)
    assert_like_the_cpu(emulated, "masked_adamw_", make, {"rtol": near, "atol": near})
    assert launched(events) == (["launch_optim_adamw"] if dtype != F64 else [])


@pytest.mark.thinned(2)
@pytest.mark.parametrize("add_to_sums", [False, True])
@layouts
@masks
@dtypes
def test_mask_grad(dtype, mask, layout, add_to_sums, emulated, events):
    wide = F64 if dtype == F64 else F32

    def make():
        weights, grads, tables = parameters(mask, dtype, layout, 2)
        accumulated = [draw(8, 33, 3, 3, dtype=wide, layout="channels_last"), torch.empty(0), draw(4, 50, dtype=wide)]
        scales = [torch.arange(8) % 3 * 0.5, None, torch.ones(4)]
        asked = [sums(*lengths, dtype=wide) for lengths in ((8, 8, 4), (0, 8, 4), (8, 0, 4))]
        return grads, tables, scales, weights, accumulated, *asked, add_to_sums

    assert_like_the_cpu(emulated, "mask_grad_", make)
    assert launched(events) == (["launch_mask_grad"] if dtype != F64 else [])


@layouts
@dtypes
def test_mask_grad_that_only_masks(dtype, layout, emulated):
    def make():
        _, grads, tables = parameters("kernels", dtype, layout, 2)
        return grads, tables, [], [], [], [], [], [], False

    assert_like_the_cpu(emulated, "mask_grad_", make)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("per_kernel", [False, True])
@layouts
@masks
@dtypes
def test_norms(dtype, mask, layout, per_kernel, emulated, events):
    def make():
        _, weights, tables = parameters(mask, dtype, layout, 2)
        chosen = [0, 2] if per_kernel else [0, 1, 2]
        return [weights[i] for i in chosen], [tables[i] for i in chosen], per_kernel

    assert_like_the_cpu(emulated, "filter_norms", make)
    kernel = "launch_kernel_norms" if per_kernel else "launch_filter_norms"
    assert launched(events) == ([kernel] if dtype != F64 else [])


ACTIVATIONS = [(4, 3, 4, 8), (2, 16, 1, 1), (8, 17, 2, 4), (2, 33, 8, 4), (64, 5), (4, 5, 2), (2, 3, 2, 2, 2),
               (0, 3, 2, 2), (2, 3, 0, 2), (2, 0, 3, 3)]  # fmt: skip


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS[:3])
@dtypes
def test_channel_mean(dtype, layout, relu, emulated, events):
    def make():
        xs = [draw(*size, dtype=dtype, layout=layout, seed=i) for i, size in enumerate(ACTIVATIONS)]
        xs[2][0, 1, 0, 0] = torch.nan
        return xs, relu

    assert_like_the_cpu(emulated, "channel_mean", make, {"rtol": 1e-6, "atol": 1e-6})
    left_to_torch = sum(0 not in size for size in ACTIVATIONS) if dtype == F64 else 0
    assert launched(events) == ["launch_channel_stats"] * (len(ACTIVATIONS) - left_to_torch)


@pytest.mark.parametrize("pull", [False, True])
@layouts
@dtypes
def test_cluster_mean(dtype, layout, pull, emulated, events):
    def make():
        weights, grads, _ = parameters("nothing", dtype, layout, 2)
        return grads, CLUSTERS, weights if pull else [], 0.5

    assert_like_the_cpu(emulated, "cluster_mean_", make, {"rtol": 1e-6, "atol": 1e-6} if dtype in (F32, F64) else None)
    assert launched(events) == (["launch_cluster_mean"] if dtype != F64 else [])


SAMPLED = [(name, i) for name, make in SAMPLES.items() for i in range(len(list(make())))]


@pytest.mark.parametrize(("name", "at"), SAMPLED)
def test_samples(name, at, emulated):
    def make():
        torch.manual_seed(at)
        return list(SAMPLES[name]())[at]

    assert_like_the_cpu(emulated, name, make, {"rtol": 2e-2, "atol": 2e-2})


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_nothing_in_it(dtype, emulated):
    """Parameters without elements, rows without elements, scalars."""
    shapes = ((0,), (3, 0), (0, 4, 3, 3), ())

    def optimizer():
        weights, grads, momenta = ([torch.ones(shape, dtype=dtype) for shape in shapes] for _ in range(3))
        return weights, grads, momenta, [None] * 4, sums(0, 3, 0, 0), [], 0.5, 0.5, 0.0, 0.5, False, False

    def gradients():
        grads = [torch.ones(shape, dtype=dtype) for shape in shapes[:3]]
        return grads, [], [], [], [], sums(0, 3, 0, dtype=dtype), sums(0, 3, 0, dtype=dtype), [], False

    assert_like_the_cpu(emulated, "masked_sgd_", optimizer)
    assert_like_the_cpu(emulated, "mask_grad_", gradients)
    assert_like_the_cpu(emulated, "filter_norms", lambda: (gradients()[0], [], False))
    assert_like_the_cpu(emulated, "cluster_mean_", lambda: ([torch.ones(3, 0, dtype=dtype)], [ids(0, 0, 0)], [], 0.0))


# ---- as training calls them


OPTIMIZERS = {
    "sgd": lambda params, freeze: optim.MaskedSGD(params, 0.1, 0.9, weight_decay=0.01, nesterov=True, freeze=freeze),
    "adamw": lambda params, freeze: optim.MaskedAdamW(params, 0.01, freeze=freeze),
}


def train(kind, freeze):
    torch.manual_seed(1)
    net = torch.nn.Sequential(
        pk.MaskedConv2d(3, 8, 3, bias=False), pk.MaskedBatchNorm2d(8), torch.nn.ReLU(), pk.MaskedConv2d(8, 6, 3)
    ).to(memory_format=torch.channels_last)
    optimizer = OPTIMIZERS[kind](net.parameters(), freeze)
    optim.bind(optimizer, net)
    optimizer.track_updates([net[0].weight])
    seen = []
    for seed in range(3):
        live = torch.rand(8, generator=torch.Generator().manual_seed(seed)) < 0.6
        net[0].set_masks(filter=live, hard=live | (torch.arange(8) > 3))
        net[1].set_mask(live)
        net[3].set_masks(input=live)
        for _ in range(2):
            optimizer.zero_grad()
            net(torch.randn(2, 3, 7, 7)).square().mean().backward()
            weights = [net[0].weight, net[3].weight]
            pk.filter_ops.mask_grad_([w.grad for w in weights], [live, None])
            optimizer.step()
            seen += [t.clone() for t in optimizer.updates[net[0].weight]]
        seen += pk.filter_ops.filter_norms([w.detach() for w in weights], [net[0].filter_mask, None])
    return seen + [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("freeze", ["hard", "dead"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_with_masks_that_change(kind, freeze, request):
    """First with the CPU's own operators."""
    want = train(kind, freeze)
    events = request.getfixturevalue("events")
    got, told = train(kind, freeze), events()
    assert told.count(f"launch_optim_{kind}") == 6 and "launch_filter_norms" in told
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
