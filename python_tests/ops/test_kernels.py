"""Every CPU row of the kernel table: each instruction set of this CPU gives the bits of the scalar kernels."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

import prunekernels as pk
from cases.conv import ConvCase, assert_same, assert_zero, capped, expected, inputs, isas, masks, only, run
from prunekernels import reference
from prunekernels.filter_ops import mask_grad_

if not pk.has_extension():
    pytest.skip("the compiled extension is not there, so there is no kernel table", allow_module_level=True)

from prunekernels import _C

ROWS = [row for row in _C.kernels() if row["device"] == "cpu"]
CUDA_ROWS = [row for row in _C.kernels() if row["device"] == "cuda"]
BEST = pk.build_info()["isa"]
ISAS = isas()
DTYPES = {
    "b16": [torch.bfloat16, torch.float16],
    "b32": [torch.float32],
    "b64": [torch.float64],
    "f32": [torch.float32],
    "bf16": [torch.bfloat16],
}


def test_table_has_names_and_a_scalar_row_for_everything():
    assert len({row["name"] for row in ROWS}) == len(ROWS) >= 6
    assert all({"name", "operation", "device", "element", "isa"} <= set(row) for row in ROWS)
    assert all(row["compiled"] for row in ROWS)
    pairs = {(row["operation"], row["element"]) for row in ROWS}
    assert pairs == {(row["operation"], row["element"]) for row in ROWS if row["isa"] == "scalar"}


def test_cuda_rows_say_whether_they_are_there():
    assert len({row["name"] for row in CUDA_ROWS}) == len(CUDA_ROWS) >= 20
    assert all({"name", "operation", "element", "arch"} <= set(row) for row in CUDA_ROWS)
    assert {row["compiled"] for row in CUDA_ROWS} == {bool(pk.build_info()["cuda"])}


@pytest.mark.parametrize("isa", ISAS)
def test_cap(isa):
    with capped(isa):
        assert pk.build_info()["isa"] == isa
    assert pk.build_info()["isa"] == BEST


def test_unknown_cap():
    with pytest.raises(ValueError, match="expected scalar.*got sse9"):
        _C.cap_isa("sse9")
    assert pk.build_info()["isa"] == BEST


# Of those that work on one list of channels; norms: test_batch_norm.py, casts: test_weight_dtypes.py.
RUNNABLE = [
    (row, dtype)
    for row in ROWS
    if row["isa"] in ISAS and row["operation"] not in ("norm", "cast")
    for dtype in DTYPES[row["element"]]
]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("channels", [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129])
@pytest.mark.parametrize(("row", "dtype"), RUNNABLE, ids=lambda v: v["name"] if isinstance(v, dict) else str(v))
def test_row(row, dtype, channels, density):
    gen = torch.Generator().manual_seed(channels)
    index = (torch.rand(channels, generator=gen) < density).nonzero().flatten().int()
    with capped(row["isa"]):
        OPERATIONS[row["operation"]](channels, index, dtype, gen)


def gather(channels, index, dtype, gen):
    x = draw(2, channels, dtype, gen)
    assert torch.equal(pk.gather_channels(x, index), x[:, index.long()])


def scatter(channels, index, dtype, gen):
    x = draw(2, len(index), dtype, gen)
    y = pk.scatter_channels(x, index, channels)
    assert torch.equal(y[:, index.long()], x)
    dead = torch.ones(channels, dtype=torch.bool).index_fill(0, index.long(), False)
    assert_zero(y[:, dead])


def tiles(channels, index, dtype, gen):
    """One case; the others are in test_planes.py."""
    x = draw(2, channels, dtype, gen).contiguous()
    weight = torch.randint(-4, 5, (5, channels, 3, 3), generator=gen).to(dtype)
    live = {"input_mask": only(channels, *index.tolist())}
    with pk.plan.force("direct"):
        y = pk.masked_conv2d(x, weight, **live, padding=1)
    assert torch.equal(y.double(), reference.masked_conv2d(x, weight, **live, padding=1))


def depthwise(channels, index, dtype, gen):
    """One case; the others are in test_depthwise.py."""
    x, weight = (torch.randint(-4, 5, (n, c, 3, 5), generator=gen).to(dtype) for n, c in ((2, channels), (channels, 1)))
    live = {"filter_mask": only(channels, *index.tolist())}
    with pk.plan.force("direct"):
        y = pk.masked_conv2d(x, weight, **live, padding=(1, 2), groups=channels)
    assert torch.equal(y.double(), reference.masked_conv2d(x, weight, **live, padding=(1, 2), groups=channels))


def pixels(channels, index, dtype, gen, plan="direct"):
    """One case; the others are in test_pixels.py."""
    x = torch.randint(-2, 3, (2, channels, 3, 5), generator=gen).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randint(-1, 2, (5, channels, 3, 3), generator=gen).to(dtype)
    live = {"input_mask": only(channels, *index.tolist())}
    with pk.plan.force(plan):
        y = pk.masked_conv2d(x, weight, **live, padding=1)
    assert torch.equal(y.double(), reference.masked_conv2d(x, weight, **live, padding=1).to(dtype).double())


def quads(channels, index, dtype, gen):
    """One case; the others are in test_sparse_pixels.py."""
    pixels(channels, index, dtype, gen, "sparse")


def step(channels, index, dtype, gen):
    """One case; the others are in optim/test_sgd.py."""
    weight, grad = (torch.randint(1, 9, (4, channels, 3, 1), generator=gen).to(dtype) for _ in range(2))
    live, K = only(channels, *index.tolist()), 4
    mask = torch.ops.prunekernels.conv_mask(None, None, live, K, channels, 1)
    expected = torch.where(live.view(1, -1, 1, 1), weight - 0.5 * grad, weight)
    torch.ops.prunekernels.masked_sgd_([weight], [grad], [], [mask], [], [], 0.5, 0.0, 0.0, 0.0, False, False)
    assert torch.equal(weight, expected)


def mask_grad(channels, index, dtype, gen):
    """One case; the others are in test_filter_ops.py."""
    grad = torch.randint(1, 9, (4, channels, 3, 1), generator=gen).to(dtype)
    live = only(channels, *index.tolist()).expand(4, channels)
    expected, sums = torch.where(live[:, :, None, None], grad, 0), torch.empty(4)
    mask_grad_([grad], [live], abs_sums=[sums])
    assert torch.equal(grad, expected) and torch.equal(sums, expected.flatten(1).sum(1))


OPERATIONS = {
    "gather_pixels": gather,
    "scatter_pixels": scatter,
    "microkernels": tiles,
    "depthwise": depthwise,
    "pixels": pixels,
    "quads": quads,
    "optim": step,
    "mask_grad": mask_grad,
}


def draw(n, c, dtype, gen):
    """No number is 0, so that a hole shows."""
    numbers = torch.randint(1, 100, (n, c, 3, 5), generator=gen).to(dtype)
    return numbers.contiguous(memory_format=torch.channels_last)


CASES = [
    ConvCase(n=3, c=33, k=31, h=5, w=7),
    ConvCase(n=3, c=16, k=65, h=5, w=7, r=1, s=1, padding=0),
    ConvCase(n=3, c=32, k=16, h=5, w=7, groups=4),
]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("pattern", ["filter", "all"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolution(case, pattern, layout, dtype, isa):
    with capped(isa):
        got = run(inputs(case, dtype, layout), case, "compact", **masks(case, pattern))
    assert_same(got, [t.to(dtype).double() for t in expected(case, pattern, dtype)])


@pytest.mark.parametrize("isa", ISAS)
def test_environment_variable(isa):
    code = "import prunekernels as pk; print(pk.build_info()['isa'])"
    done = subprocess.run([sys.executable, "-c", code], env=environment(isa), capture_output=True, text=True)
    assert done.stdout.strip() == isa, done.stderr


def test_unknown_environment_variable():
    code = "import torch, prunekernels as pk; pk.gather_channels(torch.zeros(1, 1, 1, 1), torch.tensor([0]).int())"
    done = subprocess.run([sys.executable, "-c", code], env=environment("sse9"), capture_output=True, text=True)
    assert done.returncode != 0 and "PRUNEKERNELS_ISA: expected scalar" in done.stderr and "got sse9" in done.stderr


def test_the_model_of_amx_is_for_tests_alone():
    code = "import prunekernels as pk; pk.build_info()"
    done = subprocess.run([sys.executable, "-c", code], env=environment("amx_model"), capture_output=True, text=True)
    assert done.returncode != 0 and "got amx_model" in done.stderr
    with capped("amx_model"):
        assert pk.build_info()["isa"] == BEST


def environment(isa):
    root = str(pathlib.Path(pk.__file__).resolve().parents[1])
    return os.environ | {"PRUNEKERNELS_ISA": isa, "PYTHONPATH": root}
