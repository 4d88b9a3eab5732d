"""torch.compile of masked layers: one graph for all masks, with the numbers of the eager layers."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import prunekernels as pk
from cases.compiled import CHANGES, assert_same_step, network, random_masks
from cases.conv import assert_zero

KINDS = {
    "plain": {},
    "no affine": {"affine": False},
    "no running stats": {"track_running_stats": False},
    "cumulative": {"momentum": None},
    "momentum": {"momentum": 0.3, "eps": 1e-2},
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@pytest.fixture(autouse=True)
def _reset():
    torch._dynamo.reset()


def compiled_pair(net, backend="aot_eager", **args):
    """(compiled network, its eager copy, the counter of graphs)."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(copy.deepcopy(net), backend=counter, fullgraph=True, **args), net, counter


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mode", ["masked", "live"])
def test_compile_makes_one_graph_for_all_masks(mode, training):
    compiled, net, counter = compiled_pair(pk.flow(network(training), mode == "live"))
    for seed in range(CHANGES):
        for each in (compiled, net):
            random_masks(each, seed)
        assert_same_step(compiled, net, torch.randn(3, 3, 6, 6))
    assert counter.frame_count == 1


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compile_makes_one_graph_when_layers_are_first_pruned_at_different_times(training):
    compiled, net, counter = compiled_pair(network(training, depth=12, width=4))
    layers = zip(compiled._orig_mod.modules(), net.modules(), strict=True)
    masked = [pair for pair in layers if isinstance(pair[1], (pk.MaskedConv2d, pk.MaskedBatchNorm2d))]
    mask = torch.tensor([True, False, True, True])
    for pair in masked:
        for layer in pair:
            layer.set_masks(filter=mask) if isinstance(layer, pk.MaskedConv2d) else layer.set_mask(mask)
        assert_same_step(compiled, net, torch.randn(3, 3, 6, 6))
    assert len(masked) > 20 and counter.frame_count == 1


def test_compile_makes_one_graph_for_all_batches_and_masks():
    compiled, net, counter = compiled_pair(network(True), dynamic=True)
    for seed, n in enumerate((11, 7, 9, 13, 4)):  # no other size of the network
        for each in (compiled, net):
            random_masks(each, seed)
        assert_same_step(compiled, net, torch.randn(n, 3, 6, 6))
        if seed == 0:
            graphs = counter.frame_count  # dynamic=True may start over while it finds out which floats are constant
    assert counter.frame_count == graphs


def test_compile_makes_one_graph_each_for_training_and_evaluation():
    compiled, net, counter = compiled_pair(network(True))
    for seed in range(6):
        for each in (compiled, net):
            random_masks(each, seed)
            each.train(seed % 2 == 0)
        assert_same_step(compiled, net, torch.randn(3, 3, 6, 6))
    assert counter.frame_count == 2


def test_compile_makes_one_graph_for_all_scales_of_the_gradient():
    compiled, net, counter = compiled_pair(network(True))
    for seed in range(6):
        for each in (compiled, net):
            random_masks(each, seed)
            for layer in each.modules():
                if isinstance(layer, pk.MaskedConv2d):
                    layer.grad_scale = torch.linspace(0, seed, layer.out_channels)
        assert_same_step(compiled, net, torch.randn(3, 3, 6, 6))
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compile_with_inductor_makes_one_graph_for_all_masks(training):
    compiled, net, counter = compiled_pair(network(training, depth=1, width=4), "inductor")
    for seed in range(4):
        for each in (compiled, net):
            random_masks(each, seed)
        assert_same_step(compiled, net, torch.randn(3, 3, 6, 6))
    assert counter.frame_count == 1


@needs_gpu
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compile_reduce_overhead(training):
    net = network(training).cuda()
    compiled = torch.compile(copy.deepcopy(net), mode="reduce-overhead", fullgraph=True)
    for seed in range(6):
        for each in (compiled, net):
            random_masks(each, seed)
        assert_same_step(compiled, net, torch.randn(3, 3, 6, 6, device="cuda"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_compile_norm_is_the_eager_norm(kind, training):
    norm = pk.MaskedBatchNorm2d(5, **KINDS[kind]).train(training)
    with torch.no_grad():
        for name, t in [*norm.named_parameters(), *norm.named_buffers()]:
            if t.is_floating_point() and t.dim() and "mask" not in name:
                t.uniform_(0.5, 1.5)
    compiled, norm, counter = compiled_pair(norm)
    for live in ([1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 1, 0, 0, 0], [1, 1, 0, 1, 1]):
        for each in (compiled, norm):
            each.set_mask(torch.tensor(live, dtype=torch.bool))
        assert_same_step(compiled, norm, torch.randn(4, 5, 3, 3))
    assert counter.frame_count == 1


def test_compile_norm_of_nothing_live_gives_zeros():
    norm = pk.MaskedBatchNorm2d(5)
    compiled, norm, _ = compiled_pair(norm)
    for each in (compiled, norm):
        each.set_mask(torch.zeros(5, dtype=torch.bool))
    assert_same_step(compiled, norm, torch.randn(4, 5, 3, 3))
    assert_zero(compiled(torch.randn(4, 5, 3, 3)))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compile_norm_keeps_what_is_dead_apart(training):
    norm, live = pk.MaskedBatchNorm2d(5).train(training), torch.tensor([True, False, True, True, False])
    norm.set_mask(live)
    with torch.no_grad():
        for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            t.uniform_(0.5, 1.5)
            t[~live] = float("nan")
    before = {name: t.clone() for name, t in norm.named_buffers()}
    x, grad_out = torch.randn(4, 5, 3, 3), torch.randn(4, 5, 3, 3)
    x[:, ~live] = grad_out[:, ~live] = float("nan")
    x.requires_grad_()
    y = torch.compile(norm, backend="aot_eager", fullgraph=True)(x)
    y.backward(grad_out)
    for t in (y, x.grad):
        assert_zero(t[:, ~live])
    for t in (norm.weight.grad, norm.bias.grad):
        assert_zero(t[~live])
    assert all(t.isfinite().all() for t in (y, x.grad, norm.weight.grad, norm.bias.grad))
    for name in ("running_mean", "running_var"):
        now, old = getattr(norm, name), before[name]
        assert now[live].isfinite().all() and torch.equal(now[live], old[live]) is not training
        assert now[~live].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_compile_norm_dtypes(dtype):
    norm = pk.MaskedBatchNorm2d(5).to(dtype)
    compiled, norm, _ = compiled_pair(norm)
    for each in (compiled, norm):
        each.set_mask(torch.tensor([True, False, True, True, False]))
    assert_same_step(compiled, norm, torch.randn(4, 5, 3, 3, dtype=dtype))


def test_compile_norm_of_bfloat16_with_float32_parameters():
    norm, x = pk.MaskedBatchNorm2d(5), torch.randn(4, 5, 3, 3, dtype=torch.bfloat16)
    norm.set_mask(torch.tensor([True, False, True, True, False]))
    y = torch.compile(norm, backend="aot_eager", fullgraph=True)(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, norm(x))


def test_compile_norm_rejects_other_channels():
    norm = pk.MaskedBatchNorm2d(5)
    norm.set_mask(torch.tensor([True, False, True, True, False]))
    with pytest.raises(Exception, match=r"MaskedBatchNorm2d: input: expected 5 channels, got \[2, 4, 3, 3\]"):
        torch.compile(norm, backend="eager")(torch.randn(2, 4, 3, 3))


@pytest.mark.parametrize("masked", [True, False])
def test_exported_norm_is_the_eager_norm(masked):
    norm, x = pk.MaskedBatchNorm2d(5).eval(), torch.randn(2, 5, 3, 3)
    if masked:
        norm.set_mask(torch.tensor([True, False, True, True, False]))
    torch.testing.assert_close(torch.export.export(norm, (x,)).module()(x), norm(x))


@pytest.mark.parametrize("optimizer", ["MaskedSGD", "MaskedAdamW"])
def test_compile_of_a_training_step(optimizer):
    compiled, net, counter = compiled_pair(network(True))
    make = getattr(pk.optim, optimizer)
    steps = [(each, make(each.parameters(), lr=0.01)) for each in (compiled, net)]
    for each, optim in steps:
        pk.optim.bind(optim, each)
    for seed in range(5):
        x = torch.randn(3, 3, 6, 6)
        for each, optim in steps:
            random_masks(each, seed)
            optim.zero_grad()
            each(x).square().sum().backward()
            optim.step()
        for a, b in zip(compiled.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 1
