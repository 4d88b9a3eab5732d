"""Bad arguments: an exception that names the operator, the argument, what was expected and what was got."""

import pytest
import torch
import torch.nn.functional as F

import prunekernels as pk

X, W, B = torch.zeros(2, 4, 5, 6), torch.zeros(6, 4, 3, 3), torch.zeros(6)
FILTERS, KERNELS, INPUTS = torch.arange(6) > 1, torch.ones(6, 4).bool(), torch.arange(4) > 0
PREPARED = pk.ConvMask(FILTERS, KERNELS, INPUTS)

BAD_MASKS = {
    "filter_mask": [
        FILTERS[:5],
        FILTERS[:1],
        FILTERS[None],
        FILTERS.float(),
        FILTERS.byte(),
        FILTERS.to("meta"),
        FILTERS.tolist(),
        torch.ones(4).bool(),
    ],
    "kernel_mask": [KERNELS.T, KERNELS[:, :3], KERNELS[:, :1], KERNELS[..., None], KERNELS.flatten(), KERNELS.float()],
    "input_mask": [INPUTS[:3], INPUTS[:1], INPUTS[:, None], INPUTS.int(), INPUTS.to("meta"), torch.ones(6).bool()],
}
BAD = {  # argument it is about: calls
    "x": [
        {"x": X[0, 0]},
        {"x": X[None]},
        {"x": X.int()},
        {"x": X.to(torch.complex64)},
        {"x": X.int(), "weight": W.int(), "bias": None},
    ],
    "weight": [
        {"weight": W[0]},
        {"weight": W[None]},
        {"weight": W[:, :3]},
        {"weight": W.double()},
        {"weight": W.to("meta")},
        {"weight": torch.zeros(6, 4, 6, 3)},
        {"weight": torch.zeros(6, 4, 3, 7)},
        {"dilation": 3},
        {"x": torch.zeros(2, 3, 5, 6)},
    ],
    "bias": [{"bias": B[:5]}, {"bias": B[None]}, {"bias": B.double()}, {"bias": B.to("meta")}, {"bias": B[:1]}],
    "stride": [
        {"stride": 0},
        {"stride": -1},
        {"stride": (1, 0)},
        {"stride": (1, 1, 1)},
        {"stride": 1.5},
        {"stride": "1"},
    ],
    "padding": [
        {"padding": -1},
        {"padding": (0, -1)},
        {"padding": (1, 1, 1)},
        {"padding": "full"},
        {"padding": "same", "stride": 2},
        {"padding": "same", "stride": (1, 2)},
        {"padding": 0.5},
    ],
    "dilation": [{"dilation": 0}, {"dilation": (1, -1)}, {"dilation": (1, 1, 1)}],
    "groups": [{"groups": 0}, {"groups": -1}, {"groups": 3}, {"groups": 1.0}],
    "grad_scale": [
        {"grad_scale": torch.ones(5)},
        {"grad_scale": torch.ones(1)},
        {"grad_scale": torch.ones(6, 1)},
        {"grad_scale": torch.ones(6, dtype=torch.float64)},
        {"grad_scale": torch.ones(6).bool()},
        {"grad_scale": torch.ones(6).requires_grad_()},
        {"grad_scale": torch.ones(6, device="meta")},
        {"grad_scale": 0.5},
    ],
    "weight_grad": [{"weight_grad": "x"}, {"weight_grad": None}, {"weight_grad": True}],
    "mask": [{"mask": FILTERS}, {"mask": PREPARED, "x": torch.zeros(2, 3, 5, 6), "weight": torch.zeros(6, 3, 3, 3)}],
}


def describe(value):
    if isinstance(value, dict):
        return "-".join(f"{key}={describe(v)}" for key, v in value.items())
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{list(value.shape)}{value.device}".removeprefix("torch.").removesuffix("cpu")
    return "ConvMask" if isinstance(value, pk.ConvMask) else str(value)


def call(**args):
    return pk.masked_conv2d(**({"x": X, "weight": W, "bias": B} | args))


@pytest.mark.parametrize(("name", "mask"), [(n, m) for n, masks in BAD_MASKS.items() for m in masks], ids=describe)
def test_bad_mask(name, mask):
    with pytest.raises((ValueError, RuntimeError), match=rf"(?si)(masked_conv2d|conv_?mask).*{name}.*expected.*got"):
        call(**{name: mask})


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize(("argument", "args"), [(a, args) for a, calls in BAD.items() for args in calls], ids=describe)
def test_bad_argument(argument, args, masked):
    masks = {"filter_mask": FILTERS} if masked and "mask" not in args else {}
    with pytest.raises((ValueError, RuntimeError), match=rf"(?s)(masked_conv2d|ConvMask).*{argument}.*expected.*got"):
        call(**masks, **args)


@pytest.mark.parametrize("name", ["filter_mask", "kernel_mask", "input_mask"])
def test_a_prepared_mask_and_another_one(name):
    mask = {"filter_mask": FILTERS, "kernel_mask": KERNELS, "input_mask": INPUTS}[name]
    with pytest.raises(ValueError, match=rf"(?s)masked_conv2d.*mask.*expected.*got.*{name}"):
        call(mask=PREPARED, **{name: mask})


def test_mask_of_another_device():
    with pytest.raises((ValueError, RuntimeError), match=r"(?s)expected.*got"):
        call(filter_mask=FILTERS.to("meta"))


@pytest.mark.parametrize("plan", ["fast", "", None, 1])
def test_unknown_plan(plan):
    with pytest.raises(ValueError, match=r"(?s)plan.*expected.*got"), pk.plan.force(plan):
        call(filter_mask=FILTERS)


def test_a_failing_block_does_not_leave_its_plan_behind():
    with pytest.raises(KeyError), pk.plan.force("compact"):
        raise KeyError
    with pytest.raises(ValueError), pk.plan.force("nonsense"):
        pass
    y = call(filter_mask=FILTERS)
    assert torch.equal(y, F.conv2d(X, W, B))


@pytest.mark.parametrize(("argument", "position"), [("stride", 0), ("padding", 1), ("dilation", 2)])
def test_operators_check_pairs_themselves(argument, position):
    pairs = [[1, 1], [0, 0], [1, 1]]
    pairs[position] = [-1, 1]
    with pytest.raises((ValueError, RuntimeError), match=rf"(?s)masked_conv2d.*{argument}.*expected.*got"):
        torch.ops.prunekernels.masked_conv2d(X, W, B, None, None, None, *pairs, 1, "auto")


NOT_A_TABLE = {
    "bool mask": FILTERS,
    "other numbers": torch.zeros(100, dtype=torch.int32),
    "short": torch.zeros(3, dtype=torch.int32),
    "int64": torch.zeros(100, dtype=torch.int64),
    "2-D": torch.zeros(10, 10, dtype=torch.int32),
}


@pytest.mark.parametrize("name", NOT_A_TABLE)
@pytest.mark.parametrize("operator", ["masked_conv2d", "grad_input", "grad_weight", "grad_bias"])
def test_operators_check_tables(operator, name):
    table, sizes, ops = NOT_A_TABLE[name], ([1, 1], [0, 0], [1, 1], 1, "dense"), torch.ops.prunekernels
    grad_out = torch.zeros(2, 6, 3, 4)
    calls = {
        "masked_conv2d": lambda: ops.masked_conv2d(X, W, B, table, None, None, *sizes),
        "grad_input": lambda: ops.masked_conv2d_grad_input(grad_out, W, table, X.shape, False, *sizes),
        "grad_weight": lambda: ops.masked_conv2d_grad_weight(grad_out, X, W, table, None, *sizes),
        "grad_bias": lambda: ops.masked_conv2d_grad_bias(grad_out, table),
    }
    with pytest.raises((ValueError, RuntimeError), match=r"(?s)masked_conv2d.*mask.*expected.*got"):
        calls[operator]()


@pytest.mark.parametrize("operator", ["grad_input", "grad_weight"])
@pytest.mark.parametrize("shape", [(2, 6, 3, 3), (2, 5, 3, 4), (3, 6, 3, 4), (6, 3, 4)], ids=str)
def test_gradient_operators_check_grad_out(operator, shape):
    sizes, ops, grad_out = ([1, 1], [0, 0], [1, 1], 1, "dense"), torch.ops.prunekernels, torch.zeros(shape)
    calls = {
        "grad_input": lambda: ops.masked_conv2d_grad_input(grad_out, W, None, X.shape, False, *sizes),
        "grad_weight": lambda: ops.masked_conv2d_grad_weight(grad_out, X, W, None, None, *sizes),
    }
    with pytest.raises((ValueError, RuntimeError), match=rf"(?s)masked_conv2d_{operator}.*grad_out.*expected.*got"):
        calls[operator]()


def test_conv_mask_of_another_layer():
    with pytest.raises((ValueError, RuntimeError), match=r"(?s)(masked_conv2d|ConvMask).*expected.*got"):
        call(mask=pk.ConvMask(torch.ones(7).bool(), in_channels=4))
