"""Memory that is kept between calls: whose it is, what survives in it, and that nothing stale is read from it."""

import gc
import io
import os
import pathlib
import subprocess
import sys

import pytest
import torch

import prunekernels as pk
from cases.conv import ConvCase, assert_same, assert_zero, capped, expected, inputs, isas, masks, only, run
from harness.memory import peak_mb
from prunekernels import reference

if not pk.has_extension():
    pytest.skip("torch's own allocator serves the fallback", allow_module_level=True)

PLANS = ("compact", "direct", "sparse")
BIG = ConvCase(n=2, c=8, k=16, h=184, w=184, r=1, s=1, padding=0)  # 4.1 MB of output
DEAD = only(16, 0, 3, 15)
every_plan = pytest.mark.parametrize("plan", PLANS)


def forward(plan, case=BIG, dead=DEAD, fill=None):
    x, weight, bias, _ = inputs(case)
    if fill is not None:
        x.fill_(fill)
    with pk.plan.force(plan), torch.no_grad():
        return pk.masked_conv2d(x, weight, bias, filter_mask=~dead, **case.conv_args)


@every_plan
def test_a_block_is_used_again(plan):
    y = forward(plan)
    assert y.nbytes >= 4 << 20
    at = y.data_ptr()
    del y
    assert forward(plan).data_ptr() == at


@every_plan
def test_two_live_results_share_nothing(plan):
    results = [forward(plan, fill=value) for value in (1, 2, 3)]
    again = [forward(plan, fill=value) for value in (1, 2, 3)]
    places = sorted((y.data_ptr(), y.data_ptr() + y.nbytes) for y in results + again)
    assert all(end <= start for (_, end), (start, _) in zip(places, places[1:], strict=False))
    assert all(map(torch.equal, results, again))


@pytest.mark.thinned(3)
@every_plan
@pytest.mark.parametrize("view", [lambda y: y[1, 4:9], lambda y: y.numpy(), lambda y: y.untyped_storage()])
def test_a_view_keeps_its_block(view, plan):
    y = forward(plan, fill=1)
    at, view, want = y.data_ptr(), view(y), y.clone()
    bits = bytes(memoryview(want.numpy()).cast("B"))
    del y
    gc.collect()
    other = forward(plan, fill=2)
    assert other.data_ptr() != at
    if isinstance(view, torch.Tensor):
        assert torch.equal(view, want[1, 4:9])
    elif isinstance(view, torch.UntypedStorage):
        assert torch.equal(torch.empty(0).set_(view), want.flatten())
    else:
        assert view.tobytes() == bits


@every_plan
def test_a_step_leaves_the_one_before_alone(plan):
    problem = inputs(BIG)
    first = run(problem, BIG, plan, filter_mask=~DEAD)
    copies = [t.clone() for t in first]
    run(tuple(t + 1 for t in problem), BIG, plan, filter_mask=~DEAD)
    assert all(map(torch.equal, first, copies))


@every_plan
def test_results_are_ordinary_tensors(plan):
    y = forward(plan)
    want = y.clone()
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    assert torch.equal(torch.load(file), want)

    y.resize_(3, 16, 184, 184)
    assert torch.equal(y[:2], want)
    y.resize_(want.shape)
    y.untyped_storage().resize_(0)
    assert y.untyped_storage().nbytes() == 0

    shared = forward(plan).share_memory_()
    assert shared.is_shared() and torch.equal(shared, want)
    assert torch.equal(forward(plan), want)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize(("megabytes", "kept"), [("0", False), ("1", False), ("64", True), ("", True)])
def test_limit(megabytes, kept):
    """What is beyond the limit goes back at once: the resident memory says whether it did."""
    code = f"""
import torch, prunekernels as pk
x, weight, dead = torch.randn(2, 8, 512, 512), torch.randn(16, 8, 1, 1), torch.arange(16) < 12
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def step():
    with pk.plan.force("direct"), torch.no_grad():
        return pk.masked_conv2d(x, weight, filter_mask=dead)
step()
y = step()
held = resident()
y_bytes = y.nbytes
del y
left = resident()
assert (held - left < y_bytes // 2) == {kept}, (held, left)
"""
    environment = os.environ | {
        "PRUNEKERNELS_KEEP_MB": megabytes,
        "PYTHONPATH": str(pathlib.Path(pk.__file__).resolve().parents[1]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@every_plan
def test_every_number_of_a_kept_block_is_written(plan):
    """The filters that are dead now left NaN in it."""
    poisoned = forward(plan, fill=float("nan"))
    assert poisoned[:, 1].isnan().all()
    at = poisoned.data_ptr()
    del poisoned
    live = only(16, 0, 3, 15)
    y = forward(plan, dead=~live)
    assert y.data_ptr() == at
    assert_zero(y[:, ~live])
    x, weight, bias, _ = inputs(BIG)
    assert torch.equal(y.double(), reference.masked_conv2d(x, weight, bias, filter_mask=live, **BIG.conv_args))


STALE = [
    ConvCase(n=2, c=6, k=7, h=9, w=11),
    ConvCase(n=2, c=6, k=7, h=9, w=11, stride=2),
    ConvCase(n=2, c=6, k=7, h=9, w=11, r=1, s=1, stride=3, padding=0),
    ConvCase(n=2, c=6, k=6, h=9, w=11, groups=3, dilation=2, padding=3),
    ConvCase(n=2, c=6, k=7, h=9, w=11, r=5, s=2, stride=(2, 3), padding=(4, 1)),
]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("n", [2, 7, 14])
@pytest.mark.parametrize("plan", ["direct", "sparse"])
@pytest.mark.parametrize("case", STALE, ids=str)
def test_nothing_stale_in_a_workspace(case, plan, n, isa):
    """A larger problem, all NaN, leaves its workspaces to the one after it."""
    torch.use_deterministic_algorithms(True)  # the results, too, lie in memory that is NaN
    nan = ConvCase(n=n, c=10, k=12, h=15, w=17)
    case = ConvCase(**(vars(case) | {"n": n}))
    with capped(isa):
        poison = [torch.full_like(t, float("nan")) for t in inputs(nan)]
        assert all(t.isnan().any() for t in run(poison, nan, plan, filter_mask=~only(12, 3)))
        got = run(inputs(case), case, plan, **masks(case, "all"))
    assert_same(got, expected(case, "all"))


GUARDED = """
import ctypes, mmap, sys
import torch
from cases.conv import ConvCase, capped, expected, assert_same, inputs, isas, masks, run

libc = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE

def guarded(tensor, side):
    # The numbers lie between two protected pages, right before the last or right behind the first.
    pages = -(-tensor.nbytes // PAGE)
    region = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    for page in (0, pages + 1):
        assert libc.mprotect(ctypes.c_void_p(start + page * PAGE), ctypes.c_size_t(PAGE), 0) == 0
    at = PAGE if side == "first" else (pages + 1) * PAGE - tensor.nbytes
    numbers = torch.frombuffer(region, dtype=tensor.dtype, count=tensor.numel(), offset=at)
    return numbers.view(tensor.shape).copy_(tensor)

for isa in isas():
    for n in (2, 7, 14):
        for sizes in (
            {},
            {"r": 1, "s": 1, "padding": 0},
            {"r": 1, "s": 1, "padding": 0, "stride": 2},
            {"stride": 2, "padding": 0},
            {"r": 3, "s": 1, "padding": (1, 0)},
            {"padding": 2, "stride": (1, 3)},
            {"h": 12, "w": 1},
        ):
            case = ConvCase(n=n, c=5, k=6, **sizes)
            for plan in ("direct", "sparse"):
                for side in ("first", "last"):
                    told = f"{isa} {case} {plan} {side}"
                    print(told, file=sys.stderr)
                    made = masks(case, "kernel")
                    with capped(isa):
                        got = run([guarded(t, side) for t in inputs(case)], case, plan, **made)
                    assert_same(got, expected(case, "kernel"))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="mmap and mprotect")
def test_nothing_is_read_before_or_behind_an_operand():
    tests = str(pathlib.Path(__file__).parents[1])
    root = str(pathlib.Path(pk.__file__).resolve().parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, tests])}
    done = subprocess.run([sys.executable, "-c", GUARDED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("dead", [only(16), only(16, 3)], ids=["nothing", "a filter"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_sizes_of_a_gradient_take_no_memory(layout, dead):
    case = ConvCase(n=2, c=16, k=16, h=64, w=64, r=1, s=1, padding=0)
    x, weight, _, grad_out = inputs(case, layout=layout)
    table = pk.ConvMask(filter_mask=~dead, in_channels=16).table(16, 16, 1)
    sizes = (layout == "channels_last", [1, 1], [0, 0], [1, 1])

    def ours():
        return torch.ops.prunekernels.masked_conv2d_grad_input(grad_out, weight, table, x.shape, *sizes, 1, "dense")

    def plain():
        args = (*sizes[1:], False, [0, 0], 1, [True, False, False])
        return torch.ops.aten.convolution_backward(grad_out, x, weight, None, *args)

    assert peak_mb(ours) < peak_mb(plain) + 0.1 * x.nbytes / 1e6
