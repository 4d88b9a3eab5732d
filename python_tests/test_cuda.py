"""The operators and the layer on a real GPU: the shared problem list through every plan, and what only hardware has:
streams, graphs, tf32, several devices, tensors of more than 2^31 elements.

Our own kernels are exact on integers. cuDNN may use Winograd's algorithm, which is not: there a tolerance, and zeros.
"""

import gc

import pytest
import torch
from conv_cases import (
    CASES,
    FEW_CASES,
    FORCED,
    GROUPED,
    KINDS,
    LARGEST,
    LAYOUTS,
    PLAIN,
    PLANS,
    TOLERANCE,
    ConvCase,
    assert_same,
    assert_zero,
    expected,
    inputs,
    masks,
    only,
    patterns,
    run,
)

import prunekernels as pk
from prunekernels import reference
from prunekernels.functional import pad_string
from prunekernels.plan import DIRECTIONS

WHY_NOT = (
    "torch finds no CUDA device"
    if not torch.cuda.is_available()
    else "the extension is not in use"
    if not pk.has_extension()
    else "the extension is built without CUDA"
    if not pk.build_info()["cuda"]
    else ""
)
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

DEVICE = "cuda"
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# tf32 keeps 11 bits of a factor: integers exactly, other numbers to 1 in 2000.
TF32_TOLERANCE = {"rtol": 2e-3, "atol": 3e-2}
WIDE = ConvCase(n=3, c=48, k=72, h=9, w=11)  # several tiles of the tensor core kernels, with tails


@pytest.fixture(autouse=True)
def tf32():
    """Off unless a test says otherwise; choices follow the model unless a test measures."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), pk.plan.measure(False):
        yield


def there(value):
    """Tensors, in whatever holds them, on the GPU."""
    if isinstance(value, torch.Tensor):
        moved = value.to(DEVICE)
        return moved.as_strided(value.size(), value.stride()) if moved.stride() != value.stride() else moved
    if isinstance(value, dict):
        return {name: there(item) for name, item in value.items()}
    return tuple(map(there, value)) if isinstance(value, (tuple, list)) else value


def here(tensors):
    return [None if t is None else t.cpu() for t in tensors]


def chosen(case, dtype, layout, plan, made):
    """What each direction runs under this plan."""
    prepared = pk.ConvMask(**there(made), out_channels=case.k, in_channels=case.c, groups=case.groups)
    x, padding = torch.empty(case.n, case.c, case.h, case.w, device="meta"), case.padding
    stride, dilation = two(case.stride), two(case.dilation)
    if isinstance(padding, str):
        x, padding = pad_string("", x, padding, (case.r, case.s), stride, dilation)
    weight_size = (case.k, case.c // case.groups, case.r, case.s)
    args = {"stride": stride, "padding": two(padding), "dilation": dilation, "groups": case.groups, "dtype": dtype}
    with pk.plan.force(plan):
        return [
            pk.plan.choose(d, x.shape, weight_size, prepared, memory_format=FORMATS[layout], **args) for d in DIRECTIONS
        ]


def two(value):
    return list(value) if isinstance(value, (tuple, list)) else [value, value]


def assert_right(got, want, plans, dtype, case, made):
    """Of integers: the bits of the reference from our own kernels, near it from cuDNN, zeros where it has dead ones."""
    for name, a, b, plan in zip(("y", "grad_x", "grad_w", "grad_b"), here(got), want, [*plans, "dense"], strict=True):
        if a is None:
            continue
        assert a.dtype == dtype
        if plan in ("direct", "sparse"):
            assert_same([a] + [None] * 3, [b.to(dtype).double()] + [None] * 3)
        else:
            told = lambda text, name=name, plan=plan: f"{name} ({plan}): {text}"  # noqa: E731
            torch.testing.assert_close(a.double(), b.double(), **TOLERANCE[dtype], msg=told)
    assert_dead_is_zero(here(got), case, made)


def assert_dead_is_zero(got, case, made):
    filters = made.get("filter_mask", torch.ones(case.k, dtype=torch.bool))
    channels = made.get("input_mask", torch.ones(case.c, dtype=torch.bool))
    weight = torch.empty(case.k, case.c // case.groups, 1, 1)
    three = [made.get(name) for name in ("filter_mask", "kernel_mask", "input_mask")]
    live = reference.live_masks(weight, *three, case.groups)[2]
    y, grad_x, grad_w, grad_b = got
    assert_zero(y[:, ~filters])
    assert_zero(grad_x[:, ~channels])
    assert_zero(grad_w[~live])
    if grad_b is not None:
        assert_zero(grad_b[~filters])


# ---- numbers


PROBLEMS = [(case, pattern) for case in CASES for pattern in (patterns(case) if case in FEW_CASES[::2] else ("all",))]


@pytest.mark.parametrize("plan", FORCED)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("case", "pattern"), [*PROBLEMS, (WIDE, "filter"), (WIDE, "kernel")], ids=str)
def test_float32(case, pattern, layout, plan):
    made = masks(case, pattern)
    got = run(there(inputs(case, layout=layout)), case, plan, **there(made))
    plans = chosen(case, F32, layout, plan, made)
    assert_right(got, expected(case, pattern), plans, F32, case, made)


@pytest.mark.parametrize("plan", FORCED)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", ["tf32", F64, BF16, F16], ids=str)
@pytest.mark.parametrize(
    ("case", "pattern"), [(c, p) for c in [*FEW_CASES[::3], WIDE] for p in ("filter", "all")], ids=str
)
def test_other_types(case, pattern, dtype, layout, plan):
    made, tf32 = masks(case, pattern), dtype == "tf32"
    dtype = F32 if tf32 else dtype
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
        got = run(there(inputs(case, dtype, layout)), case, plan, **there(made))
        plans = chosen(case, dtype, layout, plan, made)
    assert_right(got, expected(case, pattern, dtype), plans, dtype, case, made)


@pytest.mark.parametrize("plan", FORCED)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["tf32", F32, BF16, F16], ids=str)
@pytest.mark.parametrize("case", [WIDE, GROUPED], ids=str)
def test_random_numbers(case, dtype, layout, plan):
    tf32 = dtype == "tf32"
    dtype = F32 if tf32 else dtype
    want = expected(case, "all", dtype, expanded=layout == "expanded", integers=False)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
        got = here(run(there(inputs(case, dtype, layout, integers=False)), case, plan, **there(masks(case, "all"))))
    tolerance = TF32_TOLERANCE if tf32 else TOLERANCE[dtype]
    for name, a, b in zip(("y", "grad_x", "grad_w", "grad_b"), got, want, strict=True):
        scale = {"rtol": tolerance["rtol"], "atol": tolerance["atol"] * max(1.0, float(b.std()) / 4)}
        told = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        torch.testing.assert_close(a.double(), b.double(), **scale, msg=told)


def test_tensor_core_kernels_run_where_they_should():
    """Else every test above might have compared cuDNN with itself."""
    wide = masks(WIDE, "all")
    assert chosen(WIDE, BF16, "channels_last", "direct", wide) == ["direct"] * 3
    assert chosen(WIDE, F32, "channels_last", "sparse", masks(WIDE, "kernel")) == ["sparse"] * 3
    assert chosen(WIDE, F32, "nchw", "sparse", wide) == ["sparse"] * 3


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", [WIDE, GROUPED], ids=str)
def test_measured(case, dtype, layout):
    pk.plan.clear()
    made = masks(case, "all")
    with pk.plan.measure(True):
        got = run(there(inputs(case, dtype, layout)), case, "auto", **there(made))
        rows = pk.plan.table()
        run(there(inputs(case, dtype, layout)), case, "auto", **there(made))
        assert pk.plan.table() == rows
        plans = chosen(case, dtype, layout, "auto", made)
    assert_right(got, expected(case, "all", dtype), plans, dtype, case, made)
    assert {row["device"] for row in rows} == {f"cuda:{torch.cuda.current_device()}"}
    assert {row["direction"]: row["plan"] for row in rows} == dict(zip(DIRECTIONS, plans, strict=True))
    assert all(set(row["ms"]) >= {"dense", row["plan"]} and min(row["ms"].values()) > 0 for row in rows)


# ---- the contract


def degenerate(case):
    per_group = case.c // case.groups
    return {
        "nothing live": {"filter_mask": torch.zeros(case.k, dtype=torch.bool)},
        "no kernel live": {"kernel_mask": torch.zeros(case.k, per_group, dtype=torch.bool)},
        "everything live": {"filter_mask": torch.ones(case.k, dtype=torch.bool)},
        "one filter": {"filter_mask": only(case.k, case.k - 1)},
        "one channel": {"input_mask": only(case.c, case.c - 1)},
        "a constant filter": {"kernel_mask": ~only(case.k, 1)[:, None].expand(-1, per_group)},
    }


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", degenerate(PLAIN))
@pytest.mark.parametrize("case", [GROUPED, WIDE], ids=str)
def test_degenerate_masks(case, name, layout, plan):
    made, problem = degenerate(case)[name], inputs(case, layout=layout)
    want = reference.gradients(*problem, **made, **case.conv_args)
    got = run(there(problem), case, plan, **there(made))
    assert_right(got, want, ["dense"] * 3, F32, case, made)
    assert all(t.is_contiguous(memory_format=FORMATS[layout]) for t in got[:3])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("dtype", "poison"), [(F32, float("nan")), (BF16, float("nan")), (F32, float("inf"))], ids=str)
@pytest.mark.parametrize("weight_grad", ["masked", "dense"])
@pytest.mark.parametrize("case", [GROUPED, KINDS[-1], WIDE], ids=str)
def test_poison_in_dead_numbers(case, weight_grad, dtype, poison, layout, plan):
    x, weight, bias, grad_out = inputs(case, dtype, layout)
    made = masks(case, "all")
    args = made | {"weight_grad": weight_grad} | case.conv_args
    want = reference.gradients(x, weight, bias, grad_out, **args)
    filters, channels = made["filter_mask"], made["input_mask"]
    x[:, ~channels] = poison
    weight[~reference.live_masks(weight, filters, made["kernel_mask"], channels, case.groups)[2]] = poison
    bias[~filters] = poison
    if weight_grad == "masked":  # else dead filters do learn from it, whatever it is
        grad_out[:, ~filters] = poison
    got = here(run(there((x, weight, bias, grad_out)), case, plan, **there(made), weight_grad=weight_grad))
    for name, a, b in zip(("y", "grad_x", "grad_w", "grad_b"), got, want, strict=True):
        told = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        torch.testing.assert_close(a.double(), b.double(), **TOLERANCE[dtype], msg=told)
    if weight_grad == "masked":
        assert_dead_is_zero(got, case, made)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("weight_grad", ["masked", "dense"])
@pytest.mark.parametrize("case", [PLAIN, WIDE], ids=str)
def test_scaled_weight_gradients(case, weight_grad, layout, plan):
    x, weight, _, grad_out = inputs(case, layout=layout)
    scale = torch.tensor([0, 0.5, 1, 2]).repeat(case.k)[: case.k]
    args = masks(case, "all") | {"weight_grad": weight_grad, "grad_scale": scale}
    want = reference.gradients(x, weight, None, grad_out, **args, **case.conv_args)
    got = here(run(there((x, weight, None, grad_out)), case, plan, **there(args)))
    torch.testing.assert_close(got[2].double(), want[2], rtol=1e-4, atol=1e-3)
    assert_zero(got[2][scale == 0])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_bitwise_repeatable(dtype, layout, plan):
    torch.use_deterministic_algorithms(True)  # also fills fresh memory with NaN: every result must be written
    problem, made = there(inputs(WIDE, dtype, layout, integers=False)), there(masks(WIDE, "all"))
    a, b = (run(problem, WIDE, plan, **made) for _ in range(2))
    assert all(map(torch.equal, a, b))
    assert all(t.isfinite().all() for t in a)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("live", [0, 1, 16, 24, 31, 63, 64])
def test_channels(live, dtype, layout):
    index = torch.randperm(64)[:live].sort().values.int() if live != 16 else torch.arange(8, 24, dtype=torch.int32)
    x = torch.randn(3, 64, 5, 7).to(dtype).contiguous(memory_format=FORMATS[layout])
    compact = pk.gather_channels(there(x), there(index))
    assert torch.equal(compact.cpu(), x[:, index.long()])
    full = pk.scatter_channels(compact, there(index), 64)
    assert torch.equal(full.cpu(), torch.zeros_like(x).index_copy(1, index.long(), x[:, index.long()]))
    if live:  # the strides of no channels say nothing of a layout
        assert all(t.is_contiguous(memory_format=FORMATS[layout]) for t in (compact, full))


def test_errors_name_operator_argument_and_device():
    x, weight, bias, _ = there(inputs(PLAIN))
    with pytest.raises((ValueError, RuntimeError), match=r"(?s)gather_channels: index: expected strictly.*got 9"):
        pk.gather_channels(x, there(torch.tensor([1, 9], dtype=torch.int32)))
    table = pk.ConvMask(only(6, 1), in_channels=4).table(6, 4, 1)
    geometry = ([1, 1], [1, 1], [1, 1], 1, "dense")
    for bad, said in ((table, "cuda"), (torch.zeros(100, dtype=torch.int32, device=DEVICE), "conv_mask")):
        with pytest.raises((ValueError, RuntimeError), match=rf"(?s)masked_conv2d: mask: expected.*{said}.*got"):
            torch.ops.prunekernels.masked_conv2d(x, weight, bias, bad, None, None, *geometry)
    with pytest.raises((ValueError, RuntimeError), match=r"(?s)masked_conv2d: weight: expected.*got"):
        torch.ops.prunekernels.masked_conv2d(x, weight.cpu(), None, None, None, None, *geometry)


@pytest.mark.parametrize("plan", FORCED)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_autocast(dtype, plan):
    x, weight, bias, grad_out = inputs(PLAIN, F16)
    leaves = [t.float().to(DEVICE).requires_grad_() for t in (x, weight, bias)]
    made = masks(PLAIN, "all")
    with torch.autocast(DEVICE, dtype=dtype), pk.plan.force(plan):
        y = pk.masked_conv2d(*leaves, padding=1, **there(made))
    assert y.dtype == dtype
    grads = torch.autograd.grad(y, leaves, grad_out.to(DEVICE, dtype))
    assert all(g.dtype == F32 for g in grads)
    for a, b in zip(here((y, *grads)), reference.gradients(x, weight, bias, grad_out, padding=1, **made), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-2)


# ---- steps: nothing waits, everything captures


def network(plan="model", dtype=F32, layout="channels_last"):
    """Two masked layers of integers, one after the other; ReLU between."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(pk.MaskedConv2d(16, 24, 3, padding=1), torch.nn.ReLU(), pk.MaskedConv2d(24, 40, 1))
    model.to(DEVICE, dtype, memory_format=FORMATS[layout])
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-1, 2, p.shape))
    set_masks(model, 0)
    return model


def set_masks(model, seed):
    gen = torch.Generator().manual_seed(seed)
    live = torch.rand(24, generator=gen) < 0.6
    live[seed % 24] = True
    model[0].set_masks(filter=live.to(DEVICE))
    model[2].set_masks(input=live.to(DEVICE), filter=(torch.rand(40, generator=gen) < 0.5).to(DEVICE))


def step(model, x, plan):
    """Forward and backward; the gradients stand in .grad afterwards."""
    for p in model.parameters():
        p.grad = None
    with pk.plan.force(plan):
        y = model(x)
        y.float().square().sum().backward()
    return y.detach()


def results(model, y):
    return [y.clone(), *(p.grad.clone() for p in model.parameters())]


def data(seed, dtype=F32, layout="channels_last"):
    x = torch.randint(-2, 3, (4, 16, 7, 9), generator=torch.Generator().manual_seed(seed))
    return x.to(DEVICE, dtype).contiguous(memory_format=FORMATS[layout])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_step_does_not_wait(dtype, layout, plan):
    model, x = network(dtype=dtype, layout=layout), data(0, dtype, layout)
    with pk.plan.measure(True):
        step(model, x, plan)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(model, x, plan)
        finally:
            torch.cuda.set_sync_debug_mode(before)


def captured(model, x, plan):
    """A graph of a step on x, and the tensors in which it leaves its results."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(model, x, plan)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    for p in model.parameters():
        p.grad = None
    with torch.cuda.graph(graph):
        y = step(model, x, plan)
    return graph, [y, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_graph(dtype, layout, plan):
    model, x = network(dtype=dtype, layout=layout), data(0, dtype, layout)
    with pk.plan.measure(True):
        graph, outputs = captured(model, x, plan)
        kept = [t.clone() for t in outputs]
        for seed in (1, 2):
            x.copy_(data(seed, dtype, layout))
            graph.replay()
            got = [t.clone() for t in outputs]
            want = results(model, step(model, data(seed, dtype, layout), plan))
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b)
    del kept


@pytest.mark.parametrize("plan", FORCED)
@pytest.mark.parametrize("layout", FORMATS)
def test_a_graph_keeps_the_masks_of_its_capture(layout, plan):
    """Even if they are changed, their tensors freed and the memory used again."""
    model, x = network(layout=layout), data(0, layout=layout)
    graph, outputs = captured(model, x, plan)
    graph.replay()
    want = [t.clone() for t in outputs]
    for seed in range(1, 4):
        set_masks(model, seed)
        step(model, data(seed, layout=layout), plan)
    del model
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    garbage = [torch.full((size,), 0x7F7F7F7F, dtype=torch.int32, device=DEVICE) for size in (64, 256, 1024) * 300]
    graph.replay()
    assert all(map(torch.equal, outputs, want))
    del garbage, graph
    torch.cuda.synchronize()


def test_an_unknown_mask_is_refused_while_capturing():
    x, weight, bias, _ = there(inputs(PLAIN))
    mask = pk.ConvMask(there(only(6, 1, 2)), in_channels=4)
    graph = torch.cuda.CUDAGraph()
    pk.masked_conv2d(x, weight, bias, padding=1, filter_mask=there(only(6, 1)))  # cuDNN's own start
    with pytest.raises((ValueError, RuntimeError), match="(?s)masked_conv2d: mask: expected.*capture.*got"):
        with torch.cuda.graph(graph):
            pk.masked_conv2d(x, weight, bias, padding=1, mask=mask)
    y = pk.masked_conv2d(x, weight, bias, padding=1, mask=mask)  # and afterwards all is well
    want = reference.masked_conv2d(x.cpu(), weight.cpu(), bias.cpu(), padding=1, filter_mask=only(6, 1, 2))
    torch.testing.assert_close(y.cpu().double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plan", FORCED)
@pytest.mark.parametrize("layout", FORMATS)
def test_streams(layout, plan):
    """A mask first met on one stream serves on others, whatever is in flight, and may die while they still read it."""
    problem, made = inputs(WIDE, layout=layout), masks(WIDE, "all")
    want = expected(WIDE, "all")
    there_problem = there(problem)
    torch.cuda.synchronize()
    got = []
    for _ in range(3):
        prepared = pk.ConvMask(**there(made), out_channels=WIDE.k, in_channels=WIDE.c)
        torch.cuda.synchronize()
        for stream in (torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.current_stream()):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(1_000_000)  # the kernels run after the host has gone on
                got.append(run(there_problem, WIDE, plan, mask=prepared))
        del prepared
        pk.masked_conv2d(*there_problem[:3], filter_mask=there(only(WIDE.k, 3)), padding=1)  # lets go of dead masks
    torch.cuda.synchronize()
    for each in got:
        assert_right(each, want, ["dense"] * 3, F32, WIDE, made)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("plan", PLANS)
def test_the_other_device(plan):
    """Tensors that are not on the current device."""
    last = f"cuda:{torch.cuda.device_count() - 1}"
    problem, made = inputs(WIDE, layout="channels_last"), masks(WIDE, "all")
    moved = [t.to(last) for t in problem]
    got = run(moved, WIDE, plan, **{name: mask.to(last) for name, mask in made.items()})
    assert torch.cuda.current_device() == 0 and {str(t.device) for t in got} == {last}
    assert_right(got, expected(WIDE, "all"), ["dense"] * 3, F32, WIDE, made)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", FORMATS)
def test_training_with_masks_that_change(layout, plan):
    """The same steps on the CPU, in float64."""
    gpu = network(layout=layout)
    cpu = torch.nn.Sequential(pk.MaskedConv2d(16, 24, 3, padding=1), torch.nn.ReLU(), pk.MaskedConv2d(24, 40, 1))
    cpu.double().load_state_dict(gpu.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-5) for m in (gpu, cpu)]
    for seed in range(4):
        set_masks(gpu, seed)
        for a, b in zip(gpu, cpu, strict=True):
            if isinstance(a, pk.MaskedConv2d):
                b.set_masks(filter=a.filter_mask.cpu(), input=a.input_mask.cpu())
        for _ in range(2):
            y = step(gpu, data(seed, layout=layout), plan)
            want = step(cpu, data(seed).cpu().double(), "dense")
            torch.testing.assert_close(y.cpu().double(), want, rtol=1e-3, atol=1e-3)
            for optimizer in optimizers:
                optimizer.step()
    for a, b in zip(gpu.parameters(), cpu.parameters(), strict=True):
        torch.testing.assert_close(a.detach().cpu().double(), b.detach(), rtol=1e-3, atol=1e-4)
    assert all(name in FORCED for layer in (gpu[0], gpu[2]) for name in layer.plan)


# ---- size


@pytest.mark.parametrize("plan", ["dense", "compact", "direct"])
def test_more_than_two_to_the_31_elements(plan):
    """The last image, where 32-bit offsets would have wrapped, equals that image alone."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free GPU memory")
    case = ConvCase(n=33, c=64, k=64, h=1024, w=1024, r=1, s=1, padding=0)
    assert case.n * case.c * case.h * case.w > 2**31
    made, gen = there(masks(case, "all")), torch.Generator(DEVICE).manual_seed(0)

    def draw(*size):
        x = torch.empty(size, dtype=BF16, device=DEVICE)
        return x.random_(-LARGEST[BF16], LARGEST[BF16] + 1, generator=gen)

    x, grad_out = draw(33, 1024, 1024, 64).permute(0, 3, 1, 2), draw(33, 1024, 1024, 64).permute(0, 3, 1, 2)
    weight = draw(64, 64, 1, 1)
    y, grad_x, grad_w, _ = run((x, weight, None, grad_out), case, plan, **made)
    last = run((x[-1:], weight, None, grad_out[-1:]), case, plan, **made)
    assert torch.equal(y[-1:], last[0])
    assert torch.equal(grad_x[-1:], last[1])
    assert grad_w.isfinite().all()
