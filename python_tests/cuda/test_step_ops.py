"""The operators of a training step on a real GPU, beside those of the CPU, and the optimizers beside torch's."""

import pytest
import torch

import prunekernels as pk
from cases.batch_norms import Problem, assert_near
from cases.cuda import BF16, DEVICE, F16, F32, F64, WHY_NOT, here, network, no_waiting, set_masks, there  # noqa: F401
from cases.emulated_steps import CLUSTERS, MASKS, SGD, parameters, sums
from cases.steps import SAMPLES, give_grads
from prunekernels import optim

if WHY_NOT:
    pytest.skip(WHY_NOT, allow_module_level=True)

OPS = torch.ops.prunekernels
ON_THE_CPU = {"masked_adamw_": 4, "cluster_mean_": 1}  # which argument stays there: steps, clusters
SAMPLED = [(name, i) for name, make in SAMPLES.items() for i in range(len(list(make())))]
LAYOUTS = ["contiguous", "channels_last", "sliced", "mixed"]
masks = pytest.mark.parametrize("mask", MASKS)
layouts = pytest.mark.parametrize("layout", LAYOUTS)
dtypes = pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)


def moved(name, arguments):
    return [a if i == ON_THE_CPU.get(name) else there(a) for i, a in enumerate(arguments)]


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in tensors_in(item)] if isinstance(value, (list, tuple)) else []


def assert_like_the_cpu(name, make, tolerance):
    arguments, on_gpu = make(), moved(name, make())
    returned, got = getattr(OPS, name)(*arguments), getattr(OPS, name)(*on_gpu)
    for a, b in zip(here(tensors_in([on_gpu, got])), tensors_in([arguments, returned]), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, equal_nan=True, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "at"), SAMPLED)
def test_samples(name, at):
    def make():
        torch.manual_seed(at)
        return list(SAMPLES[name]())[at]

    assert_like_the_cpu(name, make, 2e-2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", ["compact", "wide", "all"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("size", [(3, 12, 5, 7), (32, 64, 56, 56), (64, 72, 8, 8), (8, 2048, 7, 7)], ids=str)
def test_batch_norm(size, dtype, layout, form, training):
    """The same bits again, and the numbers of the CPU."""
    want = Problem(dtype, layout, size, form).outcome(OPS, training)
    problem = Problem(dtype, layout, size, form).to(DEVICE)
    got, again = (problem.outcome(OPS, training) for _ in range(2))
    assert all(map(torch.equal, got, again))
    assert_near(here(got), want)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("size", [(3, 12, 5, 7), (32, 64, 56, 56), (64, 72, 8, 8)], ids=str)
def test_batch_norm_in_halves(size, dtype, adds, relu):
    """With a sum and a relu: the same bits again, and the numbers of the CPU."""
    want = Problem(dtype, torch.channels_last, size).deferred(OPS, adds, relu)
    problem = Problem(dtype, torch.channels_last, size).to(DEVICE)
    got, again = (problem.deferred(OPS, adds, relu) for _ in range(2))
    assert all(map(torch.equal, got, again))
    assert_near(here(got), want)


def test_batch_norm_differentiates_twice():
    """With padding in the list, too."""

    def gradients(device):
        problem = Problem().to(device)
        x, weight = problem.x.requires_grad_(), problem.parameters[0].requires_grad_()
        index = (
            torch.where(torch.arange(12, device=device) < 9, problem.index, -1) if device == DEVICE else problem.index
        )
        rest = (weight, None, None, None, index, problem.features, True, 0.1, 1e-5)
        y = OPS.masked_batch_norm(x, *rest)[0]
        first = torch.autograd.grad((y * problem.grad)[:, :9].sum(), [x, weight], create_graph=True)
        second = torch.autograd.grad(first[0][:, :9].square().sum(), [x, weight])
        return [*first, *second]

    for got, want in zip(here(gradients(DEVICE)), gradients("cpu"), strict=True):
        part = (slice(None), slice(0, 9)) if got.dim() == 4 else slice(None)
        torch.testing.assert_close(got[part], want[part], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("numbers", SGD)
@layouts
@masks
@dtypes
def test_sgd(dtype, mask, layout, numbers):
    """Integers: exact but for what 16 bits round."""

    def make():
        weights, grads, momenta, tables = parameters(mask, dtype, layout, 3)
        return weights, grads, momenta, tables, sums(8, 0, 4), [], *SGD[numbers]

    assert_like_the_cpu("masked_sgd_", make, 0 if dtype in (F32, F64) else 1e-2)


@layouts
@masks
@dtypes
def test_mask_grad_and_norms(dtype, mask, layout):
    wide = F64 if dtype == F64 else F32

    def gradients():
        weights, grads, tables = parameters(mask, dtype, layout, 2)
        scales = [torch.arange(8) % 3 * 0.5, None, torch.ones(4)]
        asked = [sums(*lengths, dtype=wide) for lengths in ((8, 8, 4), (0, 8, 4), (8, 0, 4))]
        return grads, tables, scales, weights, [torch.ones(g.shape, dtype=wide) for g in grads], *asked, True

    def weights(per_kernel):
        weights, tables = parameters(mask, dtype, layout, 1)
        return weights[::2], tables[::2], per_kernel

    assert_like_the_cpu("mask_grad_", gradients, 0)
    for per_kernel in (False, True):
        assert_like_the_cpu("filter_norms", lambda per_kernel=per_kernel: weights(per_kernel), 0)


@pytest.mark.parametrize("pull", [False, True])
@layouts
@dtypes
def test_cluster_mean(dtype, layout, pull):
    def make():
        weights, grads, _ = parameters("nothing", dtype, layout, 2)
        return grads, CLUSTERS, weights if pull else [], 0.5

    assert_like_the_cpu("cluster_mean_", make, {BF16: 1e-2, F16: 2e-3}.get(dtype, 1e-6))


# ---- the optimizers


SETTINGS = {
    "sgd": ({"lr": 0.1}, torch.optim.SGD, optim.MaskedSGD),
    "momentum": (
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
        torch.optim.SGD,
        optim.MaskedSGD,
    ),
    "dampening": ({"lr": 0.1, "momentum": 0.9, "dampening": 0.1}, torch.optim.SGD, optim.MaskedSGD),
    "adamw": ({"lr": 0.01}, torch.optim.AdamW, optim.MaskedAdamW),
    "small betas": ({"lr": 0.01, "betas": (0.3, 0.5), "eps": 1e-3}, torch.optim.AdamW, optim.MaskedAdamW),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_same_bits_as_torch(setting):
    """Where nothing is dead, as torch.optim steps tensor by tensor on the same device."""
    numbers, theirs, ours = SETTINGS[setting]
    pairs = []
    for make, more in ((theirs, {"foreach": False}), (ours, {})):
        torch.manual_seed(2)
        params = [torch.nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in ((16, 3, 3, 3), (16,), (50, 77))]
        optimizer = make(params, **numbers, **more)
        for seed in range(4):
            torch.manual_seed(seed)
            give_grads(params)
            optimizer.step()
        pairs.append([*params, *(s for state in optimizer.state.values() for s in state.values())])
    for a, b in zip(*pairs, strict=True):
        assert torch.equal(a, b)


def test_goes_on_from_a_fused_adamw():
    """Whose step counts are on the GPU."""
    params = [torch.nn.Parameter(torch.ones(4, 3, device=DEVICE))]
    theirs = torch.optim.AdamW(params, fused=True)
    give_grads(params)
    theirs.step()
    ours = optim.MaskedAdamW(params)
    ours.load_state_dict(theirs.state_dict())
    ours.step()
    assert ours.state[params[0]]["step"].is_cpu and float(ours.state[params[0]]["step"]) == 2


def bound(model, **numbers):
    optimizer = optim.MaskedSGD(model.parameters(), 1e-5, 0.9, freeze="dead", **numbers)
    optim.bind(optimizer, model)
    return optimizer


def train(model, optimizer, x):
    optimizer.zero_grad()
    model(x).float().square().sum().backward()
    pk.filter_ops.mask_grad_([model[0].weight.grad], [model[0]._mask_table])
    optimizer.step()


def images():
    return torch.randint(-2, 3, (4, 16, 7, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE, F32)


def test_a_step_does_not_wait():
    model, x = network(), images()
    optimizer = bound(model)
    with pk.plan.force("direct"):
        for seed in range(2):
            set_masks(model, seed)
            train(model, optimizer, x)
            with no_waiting():
                train(model, optimizer, x)


def test_dead_weights_stay():
    model, x = network(), images()
    optimizer = bound(model, weight_decay=0.1)
    before = model[0].weight.detach().clone()
    for _ in range(2):
        train(model, optimizer, x)
    live = model[0].filter_mask
    assert torch.equal(model[0].weight[~live], before[~live]) and not torch.equal(model[0].weight[live], before[live])


def test_sgd_in_a_graph():
    """A replay is a step."""
    weights, grads, momenta, tables = map(there, parameters("kernels", F32, "contiguous", 3))
    copies = [[t.clone() for t in each] for each in (weights, momenta)]
    numbers = SGD["momentum"]
    OPS.masked_sgd_([t.clone() for t in weights], grads, [t.clone() for t in momenta], tables, [], [], *numbers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        OPS.masked_sgd_(weights, grads, momenta, tables, [], [], *numbers)
    for _ in range(3):
        graph.replay()
        OPS.masked_sgd_(copies[0], grads, copies[1], tables, [], [], *numbers)
    for got, want in zip([*weights, *momenta], [*copies[0], *copies[1]], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_adamw_is_not_captured():
    weight, graph = torch.ones(3, 4, device=DEVICE), torch.cuda.CUDAGraph()
    lists = [[weight.clone()] for _ in range(4)]
    with pytest.raises((ValueError, RuntimeError), match="(?s)masked_adamw_: steps: expected.*capture"):
        with torch.cuda.graph(graph):
            OPS.masked_adamw_(*lists, [torch.zeros(())], [None], [], [], 0.1, 0.9, 0.99, 1e-8, 0.0)


@pytest.mark.parametrize("name", ["masked_sgd_", "mask_grad_", "cluster_mean_"])
def test_devices_are_not_mixed(name):
    here_, there_ = torch.ones(4, 3, 1, 1), torch.ones(4, 3, 1, 1, device=DEVICE)
    calls = {
        "masked_sgd_": lambda: OPS.masked_sgd_([there_], [here_], [], [None], [], [], *SGD["plain"]),
        "mask_grad_": lambda: OPS.mask_grad_([there_, here_], [], [], [], [], [], [], [], False),
        "cluster_mean_": lambda: OPS.cluster_mean_([there_], [torch.zeros(4, dtype=torch.int32)], [here_], 0.0),
    }
    with pytest.raises(ValueError, match=f"{name}: (grads|weights): expected cuda:0, got cpu"):
        calls[name]()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_other_device():
    last = f"cuda:{torch.cuda.device_count() - 1}"
    weights, grads, momenta, tables = parameters("kernels", F32, "contiguous", 3)
    lists = [[None if t is None else t.to(last) for t in each] for each in (weights, grads, momenta, tables)]
    OPS.masked_sgd_(*lists, [], [], *SGD["momentum"])
    OPS.masked_sgd_(weights, grads, momenta, tables, [], [], *SGD["momentum"])
    assert torch.cuda.current_device() == 0
    for a, b in zip(lists[0], weights, strict=True):
        assert torch.equal(a.cpu(), b)
