"""Plans: forcing, measuring and its cache, the environment variables, and what is chosen when nothing is forced."""

import os
import pathlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import prunekernels as pk
from prunekernels import reference

pytestmark = pytest.mark.trials
LARGE = {"x_shape": (16, 256, 28, 28), "weight_shape": (256, 256, 3, 3), "padding": (1, 1)}
DIRECTIONS = ["forward", "grad_input", "grad_weight"]
SKIPPING = {"compact", "direct", "sparse"}
needs_extension = pytest.mark.skipif(not pk.has_extension(), reason="without the extension there is one plan only")


def mask(live):
    return pk.ConvMask(torch.arange(256) < live, input_mask=torch.arange(256) < live)


@needs_extension
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("live", "plans"), [(256, {"dense"}), (255, {"dense"}), (64, SKIPPING), (1, SKIPPING)])
def test_choice(live, plans, direction):
    assert pk.plan.choose(direction, mask=mask(live), **LARGE) in plans


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_mask_is_dense(direction):
    assert pk.plan.choose(direction, mask=None, **LARGE) == "dense"


@needs_extension
@pytest.mark.skipif(pk.build_info().get("isa") == "scalar", reason="windows need vectors")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("dead", "plan"), [(1, "dense"), (5, "sparse"), (9, "sparse")])
@pytest.mark.parametrize("stride", [1, 2])
def test_choice_with_masks_of_kernels(stride, dead, plan, direction):
    """Of ten kernels so many are dead, in every row and column: plans that skip whole filters have nothing to skip."""
    kernels = (torch.arange(256)[:, None] + torch.arange(256)) % 10 >= dead
    chosen = pk.plan.choose(direction, mask=pk.ConvMask(kernel_mask=kernels), stride=(stride, stride), **LARGE)
    assert chosen == plan


@needs_extension
@pytest.mark.parametrize("plan", ["dense", "compact"])
def test_force_decides_and_nests(plan):
    with pk.plan.force(plan):
        assert pk.plan.choose("forward", mask=mask(255), **LARGE) == plan
        with pk.plan.force("dense" if plan == "compact" else "compact"):
            assert pk.plan.choose("forward", mask=mask(64), **LARGE) != plan
        assert pk.plan.choose("forward", mask=mask(64), **LARGE) == plan
    assert pk.plan.choose("forward", mask=mask(255), **LARGE) == "dense"


@needs_extension
def test_the_device_is_that_of_the_mask_unless_said():
    with pk.plan.force("compact"):
        assert pk.plan.choose("forward", mask=mask(64), **LARGE, device="cpu") == "compact"
        if torch.cuda.is_available():
            there = "compact" if pk.build_info()["cuda"] else "dense"
            assert pk.plan.choose("forward", mask=mask(64), **LARGE, device="cuda") == there


@pytest.mark.parametrize("name", ["cuda:99"] if torch.cuda.is_available() else ["cuda", "cuda:99"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(
        ValueError, match=rf"plan.choose: device: expected one that torch finds, got {name}; it finds \d"
    ):
        pk.plan.choose("forward", mask=mask(64), **LARGE, device=name)


def test_unknown_direction():
    with pytest.raises(ValueError, match="direction.*expected.*got 'backward'"):
        pk.plan.choose("backward", mask=mask(3), **LARGE)


@pytest.mark.parametrize(
    ("argument", "value"), [("dtype", torch.int32), ("memory_format", torch.preserve_format), ("dtype", "float32")]
)
def test_choose_checks_its_arguments(argument, value):
    with pytest.raises(ValueError, match=f"plan.choose: {argument}: expected .*, got {value!r}"):
        pk.plan.choose("forward", mask=mask(3), **LARGE, **{argument: value})


# ---- measuring: SMALL at 60 % live filters is a case in which the model keeps both dense and compact ----------------

SMALL = {"x_shape": (2, 32, 12, 12), "weight_shape": (32, 32, 3, 3), "padding": (1, 1)}


@pytest.fixture
def empty_table():
    pk.plan.clear()
    yield
    pk.plan.clear()


def small_mask(filters=20, inputs=32):
    return pk.ConvMask(torch.arange(32) < filters, input_mask=torch.arange(32) < inputs)


def convolve(filters=20, inputs=32, layout=torch.contiguous_format, dtype=torch.float32, backward=False):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SMALL["x_shape"], generator=generator).to(dtype, memory_format=layout).requires_grad_(backward)
    weight = torch.randn(SMALL["weight_shape"], generator=generator).to(dtype).requires_grad_(backward)
    y = pk.masked_conv2d(x, weight, mask=small_mask(filters, inputs), padding=1)
    if backward:
        y.sum().backward()
    return y


def settle(call, *args, **kwargs):
    assert pk.plan.settle(lambda: call(*args, **kwargs), most=64) < 64


@needs_extension
@pytest.mark.usefixtures("empty_table")
def test_each_direction_is_settled_in_a_few_calls():
    convolve(backward=True)
    assert all(len(row["ms"]) == 1 and not row["settled"] for row in pk.plan.table())  # one plan a call
    settle(convolve, backward=True)
    rows = pk.plan.table()
    assert sorted(row["direction"] for row in rows) == sorted(DIRECTIONS)
    convolve(backward=True)
    assert pk.plan.table() == rows
    for row in rows:
        assert row["x_shape"] == SMALL["x_shape"] and row["weight_shape"] == SMALL["weight_shape"]
        assert row["stride"] == (1, 1) and row["padding"] == (1, 1) and row["dilation"] == (1, 1) and row["groups"] == 1
        assert row["dtype"] == "float32" and not row["channels_last"] and row["live"] == (10, 16, 16)
        assert row["settled"] and row["plan"] in row["ms"] and {"dense", "compact"} <= set(row["ms"])
        assert min(row["ms"].values()) > 0
        assert pk.plan.choose(row["direction"], mask=small_mask(), **SMALL) == row["plan"]
    pk.plan.clear()
    assert pk.plan.table() == []


@needs_extension
@pytest.mark.usefixtures("empty_table")
def test_the_faster_plan_is_kept_and_dense_wins_ties():
    settle(convolve, backward=True)
    for row in pk.plan.table():
        times = row["ms"] | {"dense": row["ms"]["dense"] * 0.97}
        assert row["plan"] == min(times, key=times.get)


@needs_extension
@pytest.mark.usefixtures("empty_table")
def test_a_settled_plan_repeats_its_bits():
    settle(convolve)
    first = convolve()
    assert all(torch.equal(first, convolve()) for _ in range(3))


@needs_extension
@pytest.mark.usefixtures("empty_table")
def test_a_similar_problem_is_asked_first():
    """What is far behind at 20 live filters is not tried at 18, and what leads there by far is taken over."""
    settle(convolve)
    (known,) = pk.plan.table()
    fastest = min(known["ms"].values())
    settle(convolve, 18)
    (other,) = (row for row in pk.plan.table() if row["live"] != known["live"])
    far = {plan for plan, ms in known["ms"].items() if ms > 1.8 * fastest}
    assert not far & set(other["ms"]) and (other["plan"] == known["plan"] if not other["ms"] else True)


@pytest.mark.usefixtures("empty_table")
def test_the_measuring_call_computes_the_same_numbers():
    x, weight, bias = (torch.randint(-4, 5, size).float() for size in (SMALL["x_shape"], (32, 32, 3, 3), (32,)))
    keep = torch.arange(32) < 20
    y = pk.masked_conv2d(x, weight, bias, filter_mask=keep, padding=1)
    want = reference.masked_conv2d(x, weight, bias, filter_mask=keep, padding=1)
    assert torch.equal(y.double(), want.double())


OTHER_KEYS = {
    "fewer filters": lambda: convolve(17),
    "fewer inputs": lambda: convolve(inputs=27),
    "layout": lambda: convolve(layout=torch.channels_last),
    "dtype": lambda: convolve(dtype=torch.bfloat16),
    "direction": lambda: convolve(backward=True),
}


@needs_extension
@pytest.mark.usefixtures("empty_table")
@pytest.mark.parametrize("name", OTHER_KEYS)
def test_another_problem_is_measured_anew(name):
    convolve()
    OTHER_KEYS[name]()
    assert len(pk.plan.table()) > 1


@needs_extension
@pytest.mark.usefixtures("empty_table")
def test_live_counts_of_one_sixteenth_share_a_plan():
    settle(convolve, 20)
    convolve(19)
    assert len(pk.plan.table()) == 1


@needs_extension
@pytest.mark.usefixtures("empty_table")
def test_each_number_of_threads_has_its_plan():
    torch.set_num_threads(1)
    convolve()
    torch.set_num_threads(2)
    convolve()
    assert sorted(row["threads"] for row in pk.plan.table()) == [1, 2]


@needs_extension
@pytest.mark.usefixtures("empty_table")
def test_threads_that_meet_a_problem_together():
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: convolve(), range(64)))
    for y in results:
        torch.testing.assert_close(y, results[0], rtol=1e-4, atol=1e-4)
    threads = [row["threads"] for row in pk.plan.table()]
    assert len(threads) == len(set(threads))


def deterministic():
    torch.use_deterministic_algorithms(True)
    convolve(backward=True)


def unmeasured():
    with pk.plan.measure(False):
        convolve(backward=True)


def forced(plan):
    with pk.plan.force(plan):
        convolve(backward=True)


NOT_MEASURED = {
    "deterministic": deterministic,
    "float64": lambda: convolve(dtype=torch.float64, backward=True),
    "measure(False)": unmeasured,
    "model": lambda: forced("model"),
    "dense": lambda: forced("dense"),
    "compact": lambda: forced("compact"),
    "almost full": lambda: convolve(31, backward=True),
    "nothing dead": lambda: convolve(32, backward=True),
    "nothing live": lambda: convolve(0, backward=True),
}


@pytest.mark.usefixtures("empty_table")
@pytest.mark.parametrize("name", NOT_MEASURED)
def test_not_measured(name):
    NOT_MEASURED[name]()
    assert pk.plan.table() == []


@needs_extension
@pytest.mark.usefixtures("empty_table")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_model_ignores_what_was_measured(direction):
    before = pk.plan.choose(direction, mask=small_mask(), **SMALL)
    convolve(backward=True)
    with pk.plan.force("model"):
        assert pk.plan.choose(direction, mask=small_mask(), **SMALL) == before
    with pk.plan.measure(False):
        assert pk.plan.choose(direction, mask=small_mask(), **SMALL) == before
    torch.use_deterministic_algorithms(True)
    assert pk.plan.choose(direction, mask=small_mask(), **SMALL) == before


@needs_extension
@pytest.mark.usefixtures("empty_table")
def test_measured_up_to_almost_full():
    convolve(30, backward=True)
    assert {row["direction"] for row in pk.plan.table()} == set(DIRECTIONS)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("filters", [31, 32])
def test_almost_full_is_dense(filters, direction):
    assert pk.plan.choose(direction, mask=small_mask(filters), **SMALL) == "dense"


@pytest.mark.parametrize("plan", ["direct", "sparse"])
def test_a_forced_plan_that_does_not_serve_goes_as_auto(plan):
    shape = {"x_shape": (2, 3, 8, 8), "weight_shape": (5, 3, 3, 3)}
    few = pk.ConvMask(torch.arange(5) < 2, in_channels=3)
    auto = pk.plan.choose("forward", mask=few, dtype=torch.float16, **shape)
    x, weight = torch.ones(2, 3, 8, 8, dtype=torch.float16), torch.ones(5, 3, 3, 3, dtype=torch.float16)
    with pk.plan.force(plan):
        assert pk.plan.choose("forward", mask=few, dtype=torch.float16, **shape) == auto
        y = pk.masked_conv2d(x, weight, mask=few)
    assert bool((y[:, :2] == 27).all()) and bool((y[:, 2:] == 0).all())


@pytest.mark.parametrize("enabled", [None, 0, "yes"])
def test_measure_checks_its_argument(enabled):
    with pytest.raises(ValueError, match="plan.measure: enabled: expected True or False, got"):
        with pk.plan.measure(enabled):
            pass


# ---- layer.plan -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("empty_table")
def test_plan_of_a_layer():
    layer = pk.MaskedConv2d(32, 32, 3, padding=1)
    assert layer.plan is None
    layer(torch.randn(2, 32, 12, 12))
    assert layer.plan == ("dense", "dense", "dense")
    layer.set_masks(filter=torch.arange(32) < 20)
    settle(lambda: layer(torch.randn(2, 32, 12, 12, requires_grad=True)).sum().backward())
    kept = {row["direction"]: row["plan"] for row in pk.plan.table()}
    assert layer.plan._asdict() == {direction: kept.get(direction, "dense") for direction in DIRECTIONS}


@needs_extension
def test_plan_of_a_layer_whose_soft_filters_train():
    layer = pk.MaskedConv2d(32, 32, 3, padding=1)
    layer.set_masks(filter=torch.arange(32) < 2)
    layer(torch.randn(2, 32, 12, 12))
    assert set(layer.plan) <= SKIPPING
    layer.weight_grad = "dense"
    assert set(layer.plan[:2]) <= SKIPPING and layer.plan.grad_weight == "dense"


@pytest.mark.parametrize("args", [{"padding": "same"}, {"padding": 1, "padding_mode": "circular"}], ids=str)
@pytest.mark.parametrize("size", [(2, 32, 12, 12), (32, 12, 12)], ids=len)
@pytest.mark.usefixtures("empty_table")
def test_plan_of_a_layer_that_pads(args, size):
    layer = pk.MaskedConv2d(32, 32, (2, 3), **args)
    layer.set_masks(filter=torch.arange(32) < 20)
    settle(lambda: layer(torch.randn(size, requires_grad=True)).sum().backward())
    kept = {row["direction"]: row["plan"] for row in pk.plan.table()}
    assert layer.plan._asdict() == {direction: kept.get(direction, "dense") for direction in DIRECTIONS}


def test_plan_of_a_layer_under_autocast_is_that_of_the_narrow_type():
    layer = pk.MaskedConv2d(32, 32, 3)
    layer.set_masks(filter=torch.arange(32) < 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.randn(2, 32, 12, 12))
    assert layer._last_input[2] == torch.bfloat16 and layer.plan is not None


# ---- environment ----------------------------------------------------------------------------------------------------

CODE = """
import torch, prunekernels as pk
live = torch.arange(64) < 63
print(pk.plan.choose("forward", (2, 64, 8, 8), (64, 64, 1, 1), pk.ConvMask(live, in_channels=64)))
"""


def run(plan="", measure="", code=CODE):
    env = os.environ | {"PYTHONPATH": str(pathlib.Path(pk.__file__).resolve().parents[1])}
    env |= {"PRUNEKERNELS_PLAN": plan, "PRUNEKERNELS_MEASURE": measure}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


@needs_extension
@pytest.mark.parametrize(
    ("variable", "plan"), [("compact", "compact"), ("dense", "dense"), ("auto", "dense"), ("model", "dense")]
)
def test_environment_variable(variable, plan):
    done = run(variable)
    assert done.stdout.strip() == plan, done.stderr


def test_unknown_environment_variable():
    done = run("fast")
    assert done.returncode != 0 and "PRUNEKERNELS_PLAN" in done.stderr and "got 'fast'" in done.stderr


@needs_extension
@pytest.mark.parametrize(("measure", "rows"), [("0", "0"), ("1", "1"), ("", "1")])
def test_environment_variable_for_measuring(measure, rows):
    code = """
import torch, prunekernels as pk
x, w = torch.ones(2, 32, 12, 12), torch.ones(32, 32, 3, 3)
pk.masked_conv2d(x, w, filter_mask=torch.arange(32) < 20, padding=1)
print(len(pk.plan.table()))
"""
    done = run(measure=measure, code=code)
    assert done.stdout.strip() == rows, done.stderr


def test_unknown_environment_variable_for_measuring():
    done = run(measure="no")
    assert done.returncode != 0 and "PRUNEKERNELS_MEASURE: expected 0 or 1, got 'no'" in done.stderr
