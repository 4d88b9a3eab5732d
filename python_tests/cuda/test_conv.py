"""The operators and the layer on a real GPU: the shared problem list through every plan, and what only hardware has:
tf32, tensors of more than 2^31 elements. Streams, graphs and steps: test_steps.py.

Our own kernels are exact on integers. cuDNN may use Winograd's algorithm, which is not: there a tolerance, and zeros.
"""

import ctypes

import pytest
import torch

import prunekernels as pk
from cases import tiles
from cases.conv import (
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
    assert_zero,
    expected,
    inputs,
    masks,
    only,
    patterns,
    run,
)
from cases.cuda import (  # noqa: F401
    BF16,
    DEVICE,
    F16,
    F32,
    F64,
    FORMATS,
    TF32_TOLERANCE,
    WHY_NOT,
    WIDE,
    assert_dead_is_zero,
    assert_right,
    chosen,
    here,
    there,
    usual_settings,
)
from prunekernels import reference
from prunekernels.live import LiveList
from prunekernels.ops import extension
from prunekernels.plan import DIRECTIONS

if WHY_NOT:
    pytest.skip(WHY_NOT, allow_module_level=True)

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


@tiles.TESTED
@pytest.mark.parametrize("dtype", tiles.DTYPES)
@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("name", tiles.CASES)
def test_every_tile(name, vectors, dtype, plan, tile, grad_tile, splits):
    """On a GPU of many multiprocessors, the problems above get the smallest tile."""
    if tile == "w128n128" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    library = ctypes.CDLL(extension._C.__file__)
    tiles.check(library, name, vectors, dtype, plan, tile, grad_tile, splits, there)


@tiles.CUTS
@pytest.mark.parametrize("case", tiles.SPARSE_CASES, ids=str)
def test_every_cut_of_sparse_kernels(case, multiprocessors):
    tiles.check_cut(ctypes.CDLL(extension._C.__file__), case, multiprocessors, there)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", [WIDE, GROUPED], ids=str)
def test_measured(case, dtype, layout):
    pk.plan.clear()
    made = masks(case, "all")
    with pk.plan.measure(True):
        pk.plan.settle(lambda: run(there(inputs(case, dtype, layout)), case, "auto", **there(made)))
        got = run(there(inputs(case, dtype, layout)), case, "auto", **there(made))
        rows = pk.plan.table()
        run(there(inputs(case, dtype, layout)), case, "auto", **there(made))
        assert pk.plan.table() == rows
        plans = chosen(case, dtype, layout, "auto", made)
    assert_right(got, expected(case, "all", dtype), plans, dtype, case, made)
    assert {row["device"] for row in rows} == {f"cuda:{torch.cuda.current_device()}"}
    assert {row["direction"]: row["plan"] for row in rows} == dict(zip(DIRECTIONS, plans, strict=True))
    assert all(row["settled"] and row["plan"] in row["ms"] and min(row["ms"].values()) > 0 for row in rows)


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


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize(("live", "to"), [(64, 31), (31, 64), (24, 24), (1, 63), (63, 1), (0, 9), (9, 0)])
def test_channels_between_lists(live, to, dtype, layout):
    """regroup_channels and join_channels: the numbers of the CPU."""
    a, b = (LiveList.of(torch.randperm(64)[:count].sort().values.numpy(), 64) for count in (live, to))
    x, z = (torch.randint(-4, 5, (3, each.count, 5, 7)).to(dtype).to(memory_format=FORMATS[layout]) for each in (a, b))

    def run(device):
        move = a.remap(b, torch.device(device))
        union = [each.remap(a.union(b), torch.device(device)) for each in (a, b)]
        lists = [list_ for pair in zip(*union, strict=True) for list_ in pair]
        here, other = x.to(device), z.to(device)
        ops = torch.ops.prunekernels
        return ops.regroup_channels(here, *move), ops.join_channels(here, other, *lists, -0.5)

    for got, want in zip(run(DEVICE), run("cpu"), strict=True):
        assert torch.equal(got.cpu(), want) and got.stride() == want.stride()


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_packed_weights(dtype, layout, kernel):
    """pack_weight and unpack_grad_weight: the numbers of the CPU."""
    filters, inputs = torch.rand(72) < 0.5, torch.rand(48) < 0.5
    table = torch.ops.prunekernels.conv_mask(filters, None, inputs, 72, 48, 1)
    counts = int(filters.sum()), int(inputs.sum())
    weight = torch.randn(72, 48, kernel, kernel).to(dtype).to(memory_format=FORMATS[layout])

    def run(device):
        packed = torch.ops.prunekernels.pack_weight(weight.to(device), table.to(device), *counts)
        return packed, *(
            torch.ops.prunekernels.unpack_grad_weight(packed, table.to(device), 72, 48, last) for last in (False, True)
        )

    for got, want in zip(run(DEVICE), run("cpu"), strict=True):
        assert torch.equal(got.cpu(), want) and got.stride() == want.stride()


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


# ---- what the forward pass packs for the backward pass


@pytest.mark.parametrize("plan", FORCED)
def test_packed_weights_are_never_stale(plan):
    x, weight, _, grad_out = there(inputs(WIDE, BF16, "channels_last"))
    x.requires_grad_(), weight.requires_grad_()
    made, other = there(masks(WIDE, "all")), there(masks(WIDE, "filter"))

    def forward(masked):
        return pk.masked_conv2d(x, weight, padding=1, **masked)

    def gradient(y, **more):
        return torch.autograd.grad(y, x, grad_out, **more)[0]

    with pk.plan.force(plan):
        y, y_other = forward(made), forward(other)  # the same weight under two masks
        first, first_other = gradient(y, retain_graph=True), gradient(y_other)
        assert torch.equal(gradient(y), first)  # again
        assert torch.equal(gradient(forward(other)), first_other)
        y = forward(made)
        with torch.no_grad():
            weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradient(y)
        assert torch.equal(gradient(forward(made)), 2 * first)


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
