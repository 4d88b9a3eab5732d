"""torch.func and forward-mode AD of masked layers and functions: the numbers of plain layers with zeroed weights."""

import copy
import functools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)  # fmt: skip

import prunekernels as pk
from cases.layers import FILTERS, HARD, INPUTS, KERNELS
from prunekernels.live import LiveList
from prunekernels.live.channel_ops import to_dense
from prunekernels.live.tensor import wrap

LIVE = torch.tensor([True, False, True, True, False, True])
CASES = {
    "filters": {"filter_mask": FILTERS},
    "kernels": {"kernel_mask": KERNELS},
    "all masks": {"filter_mask": FILTERS, "kernel_mask": KERNELS, "input_mask": INPUTS},
    "nothing live": {"filter_mask": torch.zeros(6, dtype=torch.bool)},
    "groups": {"filter_mask": FILTERS, "input_mask": INPUTS, "groups": 2},
    "same": {"filter_mask": FILTERS, "padding": "same", "dilation": 2},
    "strided": {"filter_mask": FILTERS, "input_mask": INPUTS, "stride": 2, "padding": 1},
    "no mask": {},
}


def double(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def conv_arguments(groups=1, **_):
    return double(2, 4, 5, 6), double(6, 4 // groups, 3, 3, seed=1), double(6, seed=2)


def split(filter_mask=None, kernel_mask=None, input_mask=None, **conv_args):
    masks = {"filter_mask": filter_mask, "kernel_mask": kernel_mask, "input_mask": input_mask}
    return {name: mask for name, mask in masks.items() if mask is not None}, conv_args


def zeroed(case):
    """The same function of (x, weight, bias) in plain torch."""
    masks, conv_args = split(**case)
    groups = conv_args.get("groups", 1)

    def call(x, weight, bias):
        filters, inputs = masks.get("filter_mask", torch.ones(6).bool()), masks.get("input_mask", torch.ones(4).bool())
        live = filters.view(6, 1) & inputs.view(groups, 1, -1).expand(groups, 6 // groups, -1).reshape(6, -1)
        if "kernel_mask" in masks:
            live = live & masks["kernel_mask"]
        weight = torch.where(live.view(6, -1, 1, 1), weight, 0)
        return F.conv2d(x, weight, torch.where(filters, bias, 0), **conv_args)

    return call


def masked(case, how):
    masks, conv_args = split(**case)
    if how == "masks" or not masks:
        return lambda x, weight, bias: pk.masked_conv2d(x, weight, bias, **masks, **conv_args)
    mask = pk.ConvMask(**masks, groups=conv_args.get("groups", 1))
    return lambda x, weight, bias: pk.masked_conv2d(x, weight, bias, mask=mask, **conv_args)


def scalar(call):
    return lambda *args: call(*args).sin().sum()


def row_of(call):
    return lambda x, weight, bias: call(x, weight, bias).square().sum((0, 2, 3))


TRANSFORMS = {
    "grad": lambda f, a: grad(scalar(f), (0, 1, 2))(*a),
    "grad_and_value": lambda f, a: grad_and_value(scalar(f), (0, 1, 2))(*a),
    "vjp": lambda f, a: (y := vjp(f, *a))[1](y[0].cos()),
    "jvp": lambda f, a: jvp(f, a, tuple(t.cos() for t in a)),
    "linearize": lambda f, a: linearize(f, *a)[1](*(t.cos() for t in a)),
    "jacrev": lambda f, a: jacrev(row_of(f), (0, 1, 2))(*a),
    "jacfwd": lambda f, a: jacfwd(row_of(f), (0, 1, 2))(*a),
    "hessian": lambda f, a: hessian(lambda b, w: scalar(f)(a[0], w, b), (0, 1))(a[2], a[1]),
    "grad of grad": lambda f, a: grad(lambda x: grad(scalar(f), 1)(x, *a[1:]).square().sum())(a[0]),
    "vmap of inputs": lambda f, a: vmap(f, (0, None, None))(double(3, *a[0].shape), *a[1:]),
    "vmap of weights": lambda f, a: vmap(f, (None, 0, 0))(a[0], double(3, *a[1].shape), double(3, 6)),
    "vmap of both": lambda f, a: vmap(f)(*(double(3, *t.shape) for t in a)),
    "vmap of the last dimension": lambda f, a: vmap(f, (-1, None, None))(double(*a[0].shape, 3), *a[1:]),
    "vmap of vmap": lambda f, a: vmap(vmap(f, (0, None, None)), (None, 0, 0))(
        double(3, *a[0].shape), double(2, *a[1].shape), double(2, 6)),
    "per-sample gradients": lambda f, a: vmap(grad(scalar(f), (1, 2)), (0, None, None))(*a),
    "per-sample gradients of an ensemble": lambda f, a: vmap(grad(scalar(f), (0, 1, 2)))(
        *(double(3, *t.shape) for t in a)),
    "functional.jacobian": lambda f, a: torch.autograd.functional.jacobian(row_of(f), a),
    "functional.jacobian, vectorized": lambda f, a: torch.autograd.functional.jacobian(row_of(f), a, vectorize=True),
    "functional.jacobian, forward": lambda f, a: torch.autograd.functional.jacobian(
        row_of(f), a, vectorize=True, strategy="forward-mode"),
    "functional.hvp": lambda f, a: torch.autograd.functional.hvp(scalar(f), a, a),
    "functional.vhp": lambda f, a: torch.autograd.functional.vhp(scalar(f), a, a),
    "functional.jvp": lambda f, a: torch.autograd.functional.jvp(f, a, a),
}  # fmt: skip


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("how", ["masks", "prepared"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.thinned(2)
def test_functorch_transforms_of_masked_conv2d(transform, case, how):
    args, run = conv_arguments(**CASES[case]), TRANSFORMS[transform]
    assert_same(run(masked(CASES[case], how), args), run(zeroed(CASES[case]), args))


@pytest.mark.parametrize("transform", [name for name in TRANSFORMS if not name.startswith("functional")])
def test_functorch_transforms_in_compiled_code(transform):
    torch._dynamo.reset()
    case, run = CASES["all masks"], TRANSFORMS[transform]
    if transform in ("linearize",):
        pytest.skip("torch.compile does not trace it")
    args, call = conv_arguments(), masked(case, "prepared")
    run(call, args)  # makes the table
    compiled = torch.compile(lambda *a: run(call, a), backend="aot_eager")
    assert_same(compiled(*args), run(zeroed(case), args))


def test_functorch_vmap_of_masks():
    x, weight, bias = conv_arguments()
    filters, kernels = torch.stack([FILTERS, ~FILTERS, FILTERS.flip(0)]), torch.stack([KERNELS, ~KERNELS, KERNELS])
    call = vmap(lambda f, k: pk.masked_conv2d(x, weight, bias, filter_mask=f, kernel_mask=k))
    want = [
        pk.masked_conv2d(x, weight, bias, filter_mask=f, kernel_mask=k) for f, k in zip(filters, kernels, strict=True)
    ]
    assert_same(call(filters, kernels), torch.stack(want))


DENSE = {
    "dense": {"weight_grad": "dense"},
    "scaled": {"grad_scale": torch.tensor([0.0, 1, 2, 0.5, 1, 0])},
    "dense and scaled": {"weight_grad": "dense", "grad_scale": torch.tensor([0.0, 1, 2, 0.5, 1, 0])},
}


@pytest.mark.parametrize("masks", ["filters", "kernels", "all masks", "groups", "no mask"])
@pytest.mark.parametrize("kind", DENSE)
def test_functorch_gradients_of_dead_weights(kind, masks):
    args, case = conv_arguments(**CASES[masks]), CASES[masks]
    masks, conv_args = split(**case)

    def call(*args):
        return pk.masked_conv2d(*args, **masks, **conv_args, **DENSE[kind])

    leaves = [t.clone().requires_grad_() for t in args]
    want = torch.autograd.grad(scalar(call)(*leaves), leaves)
    assert_same(grad(scalar(call), (0, 1, 2))(*args), want)
    # Reverse and forward mode agree, batched too.
    assert_same(jacfwd(row_of(call), (0, 1, 2))(*args), jacrev(row_of(call), (0, 1, 2))(*args))
    per_sample = vmap(grad(scalar(call), (1, 2)), (0, None, None))(*args)
    assert_same([t.sum(0) for t in per_sample], list(want[1:]))
    twice = [grad(lambda x: grad(scalar(call), 1)(x, *args[1:]).square().sum())(args[0])]
    leaf = args[0].clone().requires_grad_()
    weight = args[1].clone().requires_grad_()
    (first,) = torch.autograd.grad(scalar(call)(leaf, weight, args[2]), weight, create_graph=True)
    assert_same(twice, list(torch.autograd.grad(first.square().sum(), leaf)))


@pytest.mark.parametrize("weight_grad", ["masked", "dense"])
def test_functorch_keeps_nan_in_what_is_dead_apart(weight_grad):
    x, weight, bias = conv_arguments()
    weight[~FILTERS], bias[~FILTERS], x[:, ~INPUTS] = float("nan"), float("nan"), float("nan")

    def call(x, weight, bias):
        masks = {"filter_mask": FILTERS, "input_mask": INPUTS}
        return pk.masked_conv2d(x, weight, bias, **masks, weight_grad=weight_grad)

    y, pull = vjp(call, x, weight, bias)
    grads = pull(torch.ones_like(y))
    assert all(t.isfinite().all() for t in (y, *grads))
    assert not y[:, ~FILTERS].any() and not grads[0][:, ~INPUTS].any() and not grads[2][~FILTERS].any()


@pytest.mark.parametrize("case", CASES)
def test_functorch_gradcheck(case):
    masks, conv_args = split(**CASES[case])
    mask = pk.ConvMask(**masks, groups=conv_args.get("groups", 1))
    leaves = [t.requires_grad_() for t in conv_arguments(**CASES[case])]

    def call(*args):
        return pk.masked_conv2d(*args, **({"mask": mask} if masks else {}), **conv_args)

    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["gather", "scatter"])
def test_functorch_channels(name):
    index, x = torch.tensor([0, 2, 3], dtype=torch.int32), double(2, 4 if name == "gather" else 3, 3, 3)
    call = (lambda x: pk.gather_channels(x, index)) if name == "gather" else (
        lambda x: pk.scatter_channels(x, index, 4))  # fmt: skip
    matrix = torch.eye(4, dtype=torch.float64)[index.long()]
    matrix = matrix if name == "gather" else matrix.T

    def plain(x):
        return torch.einsum("ij,njhw->nihw", matrix, x)

    for run in (lambda f: grad(scalar(f))(x), lambda f: jacrev(f)(x), lambda f: jacfwd(f)(x),
                lambda f: vmap(f)(torch.stack([x, 2 * x])), lambda f: vmap(grad(scalar(f)))(x[:, None]),
                lambda f: hessian(scalar(f))(x[:1])):  # fmt: skip
        assert_same(run(call), run(plain))


# ---- layers ----


def network(mode="masked", training=False, seed=0):
    """A masked network in one of the modes, in float64."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(6), nn.ReLU(inplace=True)]
    net = nn.Sequential(*layers, nn.Conv2d(6, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)).double()
    with torch.no_grad():
        net[1].running_mean.uniform_(-1, 1), net[1].running_var.uniform_(0.5, 1.5), net[1].bias.uniform_(-1, 1)
    pk.convert(net)
    net[0].set_masks(filter=FILTERS, kernel=KERNELS, input=INPUTS)
    net[1].set_mask(LIVE)
    net[3].set_masks(input=LIVE, hard=torch.tensor([True, True, False, True]))
    return pk.flow(net, mode == "live").train(training)


def plain(net):
    """The network of plain layers with zeroed weights, that takes the parameters of the masked one."""
    live = {"0.weight": net[0].to_conv().weight != 0, "0.bias": FILTERS, "1.weight": LIVE, "1.bias": LIVE,
            "3.weight": net[3].to_conv().weight != 0, "3.bias": net[3].hard_mask}  # fmt: skip
    other = copy.deepcopy(net)
    pk.restore(other)

    def call(parameters, x):
        zero = {name: torch.where(live[name], p, 0) if name in live else p for name, p in parameters.items()}
        return functional_call(other, zero, (x,))

    return call


def parameters_of(net):
    return {name: p.detach() for name, p in net.named_parameters()}


NETWORK_TRANSFORMS = {
    "call": lambda f, p, x: f(p, x),
    "grad": lambda f, p, x: grad(scalar(f), (0, 1))(p, x),
    "jacrev": lambda f, p, x: jacrev(f)(p, x),
    "jacfwd": lambda f, p, x: jacfwd(f, 1)(p, x),
    "jvp": lambda f, p, x: jvp(f, (p, x), (p, x)),
    "hessian": lambda f, p, x: hessian(lambda w: scalar(f)(p | {"1.weight": w}, x))(p["1.weight"]),
    "vmap of inputs": lambda f, p, x: vmap(f, (None, 0))(p, torch.stack([x, x.cos()])),
    "per-sample gradients": lambda f, p, x: vmap(grad(lambda p, x: scalar(f)(p, x[None])), (None, 0))(p, x),
}


@pytest.mark.parametrize("mode", ["masked", "live"])
@pytest.mark.parametrize("transform", NETWORK_TRANSFORMS)
def test_functorch_transforms_of_a_network(transform, mode):
    net, x, run = network(mode), double(2, 4, 5, 6), NETWORK_TRANSFORMS[transform]
    parameters = parameters_of(net)
    got = run(lambda p, x: functional_call(net, p, (x,)), parameters, x)
    assert_same(got, run(plain(net), parameters, x))


@pytest.mark.parametrize("mode", ["masked", "live"])
def test_functorch_grad_of_a_training_step_moves_the_statistics_it_is_given(mode):
    net, x = network(mode, training=True), double(2, 4, 5, 6)
    eager = copy.deepcopy(net)
    scalar(eager)(x).backward()
    want = {name: p.grad for name, p in eager.named_parameters()}
    buffers = {name: b.clone() for name, b in net.named_buffers()}

    def loss(parameters, buffers):
        y = functional_call(net, (parameters, buffers), (x,))
        return y.sin().sum(), {name: b.detach() for name, b in buffers.items()}

    grads, moved = grad(loss, has_aux=True)(parameters_of(net), buffers)
    assert_same(grads, want)
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert_same(moved[name], dict(eager.named_buffers())[name])


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, pk.MaskedBatchNorm2d])
def test_functorch_vmap_refuses_shared_statistics_as_torch_does(norm):
    with pytest.raises(RuntimeError, match="were not batched"):
        vmap(norm(4))(torch.randn(3, 2, 4, 5, 5))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mode", ["masked", "live"])
def test_functorch_ensembles(mode, training):
    nets, x = [network(mode, training, seed) for seed in range(3)], double(2, 4, 5, 6)
    nets[1][0].set_masks(filter=torch.tensor([False, True, True, False, True, True]))  # equal masks are not needed
    nets[2][1].set_mask("all")
    base = copy.deepcopy(nets[0]).to("meta")
    parameters, buffers = stack_module_state(nets)
    buffers = {name: b.clone() for name, b in buffers.items()}

    def call(parameters, buffers, x):
        return functional_call(base, (parameters, buffers), (x,))

    got = vmap(call, (0, 0, None))(parameters, buffers, x)
    assert_same(got, torch.stack([net(x) for net in nets]))
    for name in ("1.running_mean", "1.running_var"):
        assert_same(buffers[name], torch.stack([dict(net.named_buffers())[name] for net in nets]))

    grads = vmap(grad(lambda p, b, x: scalar(call)(p, b, x)), (0, 0, None))(parameters, buffers, x)
    for i, net in enumerate(nets):
        want = torch.autograd.grad(scalar(net)(x), list(net.parameters()))
        assert_same([g[i] for g in grads.values()], list(want))


@pytest.mark.parametrize("mode", ["masked", "live"])
def test_functional_call_of_other_masks_and_back(mode):
    nets, x = [network(mode), network(mode)], double(2, 4, 5, 6)
    nets[1][0].set_masks(filter=torch.tensor([False, True, True, False, True, True]), kernel="all")
    nets[1][1].set_mask("all")
    want, base = [net(x) for net in nets], copy.deepcopy(nets[0])
    assert not torch.equal(*want)
    for i in (0, 1, 1, 0, 1):
        state = {name: t.clone() for name, t in (*nets[i].named_parameters(), *nets[i].named_buffers())}
        assert_same(functional_call(base, state, (x,)), want[i])
        assert_same(base(x), want[0])
        assert_same(functional_call(base, {name: t.clone() for name, t in state.items()}, (x,)), want[i])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("args", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_functorch_norm(args, training):
    norm = pk.MaskedBatchNorm2d(6, **args).double().train(training)
    norm.set_mask(LIVE)
    other = nn.BatchNorm2d(6, **args).double().train(training)
    x = double(2, 6, 3, 3)
    state = {name: b for name, b in norm.named_buffers() if "mask" not in name}

    def call(module, factor):
        names = [name for name, _ in module.named_buffers() if name in state]
        return lambda x: functional_call(module, {name: state[name].clone() for name in names}, (x,)) * factor

    zero = LIVE.double().view(1, -1, 1, 1)
    for run in (lambda f: grad(scalar(f))(x), lambda f: jacrev(f)(x), lambda f: jvp(f, (x,), (x.cos(),)),
                lambda f: hessian(scalar(f))(x[:, :, :2, :2])):  # fmt: skip
        assert_same(run(call(norm, 1)), run(call(other, zero)))


@pytest.mark.parametrize("mode", ["masked", "live"])
def test_functorch_forward_ad(mode):
    net, x, tangent = network(mode), double(2, 4, 5, 6), double(2, 4, 5, 6, seed=5)
    want = jvp(lambda x: plain(net)(parameters_of(net), x), (x,), (tangent,))
    with forward_ad.dual_level():
        assert_same(tuple(forward_ad.unpack_dual(net(forward_ad.make_dual(x, tangent)))), want)


LIVE_OPERATIONS = {
    "add": lambda a, b, w: (a + b) * w,
    "add a plain one": lambda a, b, w: (a + w).square(),
    "mul": lambda a, b, w: a * b * w,
    "relu": lambda a, b, w: a.relu() * w,
    "cat": lambda a, b, w: torch.cat([a, b], 1)[:, 3:7] * w,
    "pool": lambda a, b, w: F.max_pool2d(a, 2) * w[..., :2, :2],
    "mean": lambda a, b, w: a.mean((2, 3)) * w[..., 0, 0],
    "where": lambda a, b, w: torch.where(a > 0, a, w),
    "masked_conv2d": lambda a, b, w: pk.masked_conv2d(a, w, filter_mask=torch.tensor([True, False])),
    "gather": lambda a, b, w: pk.gather_channels(a, torch.tensor([0, 2], dtype=torch.int32)) * w[:, :2],
}


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
@pytest.mark.parametrize("name", LIVE_OPERATIONS)
def test_functorch_of_live_tensors_made_outside(name, transform, requires_grad):
    lists = [LiveList.of_mask(torch.tensor(mask, dtype=torch.bool)) for mask in ([1, 0, 1, 1], [0, 1, 1, 0])]
    a, b = (wrap(double(2, each.count, 4, 4).requires_grad_(requires_grad), each) for each in lists)
    dense = [to_dense(x.compact, x.live) for x in (a, b)]
    w = double(2, 4, 4, 4, seed=3)
    operation = LIVE_OPERATIONS[name]

    def run(*operands):
        def call(w):
            return operation(*operands, w).sum()

        return {"grad": lambda: grad(call)(w), "jvp": lambda: jvp(call, (w,), (w,)),
                "vmap": lambda: vmap(call)(torch.stack([w, 2 * w]))}[transform]()  # fmt: skip

    assert_same(run(a, b), run(*dense))
    # What a live tensor and its list keep belongs to no transform.
    kept = [t for each in lists for t in each._derived.values() if isinstance(t, torch.Tensor)]
    kept += [x._dense for x in (a, b) if x._dense is not None]
    assert not any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in kept)
    assert_same(a + b, dense[0] + dense[1])
    if requires_grad:
        assert_same(*(torch.autograd.grad((x * x).sum(), a.compact)[0] for x in (a, dense[0])))


@pytest.mark.parametrize("mode", ["masked", "live"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_functorch_of_a_whole_network_by_autograd_functional(dtype, mode):
    net, x = network(mode).to(dtype), double(2, 4, 5, 6).to(dtype)
    other = functools.partial(plain(net), parameters_of(net))
    tolerance = {} if dtype == torch.float64 else {"atol": 1e-4, "rtol": 1e-3}
    for run in (
        lambda f: torch.autograd.functional.jacobian(f, x, vectorize=True),
        lambda f: torch.autograd.functional.jacobian(f, x, vectorize=True, create_graph=True),
        lambda f: torch.autograd.functional.hessian(scalar(f), x, vectorize=True),
        lambda f: torch.autograd.functional.hvp(scalar(f), x, x),
    ):
        torch.testing.assert_close(run(net), run(other), **tolerance)


def test_functorch_vmap_of_a_conv_mask_says_what_to_do():
    args = conv_arguments()

    def call(filter_mask):
        return pk.masked_conv2d(*args, mask=pk.ConvMask(filter_mask=filter_mask))

    with pytest.raises(ValueError, match="ConvMask: filter_mask: expected a mask that vmap does not batch"):
        vmap(call)(torch.stack([FILTERS, ~FILTERS]))


def test_functorch_hard_mask():
    layer = pk.MaskedConv2d(4, 6, 3).double()
    layer.set_masks(filter=FILTERS, hard=HARD)
    layer.weight_grad = "dense"
    x, weight = double(2, 4, 5, 5), layer.weight.detach()
    scalar(layer)(x).backward()
    assert_same(grad(lambda w: scalar(lambda x: functional_call(layer, {"weight": w}, (x,)))(x))(weight),
                layer.weight.grad)  # fmt: skip
