"""masked_batch_norm and its gradients against torch's batch norm in float64."""

import pytest
import torch
import torch.nn.functional as F

import prunekernels as pk
from cases.conv import assert_zero, capped, isas

pytestmark = pytest.mark.skipif(not pk.has_extension(), reason="an operator of the extension")
OPS = torch.ops.prunekernels
# N, C, H, W: planes and images around the numbers that decide how NCHW is worked on, runs around a vector, around the
# blocks that sums are drained in and longer than what is set up once, one value a channel and image, one channel.
SIZES = [
    (2, 3, 16, 32), (2, 3, 7, 73), (3, 5, 19, 27), (2, 2, 128, 129), (4, 5, 6, 7), (3, 64, 1, 1), (2, 130, 4, 4),
    (2, 511, 3, 3), (2, 512, 2, 1), (2, 600, 3, 3), (16, 1, 5, 5), (1, 20, 2, 2), (5, 33, 16, 1), (300, 16, 2, 4),
    (514, 128, 1, 1), (2, 1, 1, 1), (3, 130, 6, 6), (2, 130, 4, 8), (3, 1100, 1, 31), (2, 4100, 1, 2),
    (1, 7, 4, 8), (1, 7, 3, 11), (3, 128, 4, 8), (3, 4097, 1, 1),
]  # fmt: skip


class Problem:
    """wide: x has a channel for every feature, and NaN in those that are not at index, as its gradient does."""

    def __init__(self, size, layout, *, affine=True, integers=False, offset=0.0, dtype=torch.float32, wide=False):
        gen = torch.Generator().manual_seed(sum(size))

        def draw(*shape):
            t = torch.randn(*shape, generator=gen)
            return (t * 2).round() if integers else t

        N, C, H, W = size
        self.features = 2 * C + 1
        self.index = torch.randperm(self.features, generator=gen)[:C].sort().values
        self.x, self.grad = (draw(*size) * 3 + offset).to(dtype), draw(*size).to(dtype)
        if wide:
            self.x, self.grad = self.widened(self.x), self.widened(self.grad)
        self.x = self.x.contiguous(memory_format=layout).requires_grad_()
        self.weight, self.bias = ((draw(self.features).requires_grad_() if affine else None) for _ in range(2))
        self.mean, self.var = draw(self.features), draw(self.features).square() + 0.5

    def widened(self, t):
        wide = torch.full((t.shape[0], self.features, *t.shape[2:]), float("nan"), dtype=t.dtype)
        return wide.index_copy_(1, self.index, t)

    def narrowed(self, t):
        return t[:, self.index] if t.dim() == 4 and t.shape[1] == self.features else t

    def leaves(self):
        return [t for t in (self.x, self.weight, self.bias) if t is not None]

    def outcome(self, training, momentum=0.1):
        """y, running statistics, gradients, by the operator."""
        mean, var = self.mean.clone(), self.var.clone()
        args = (self.x, self.weight, self.bias, mean, var, self.index.int(), self.features, training, momentum, 1e-5)
        y = OPS.masked_batch_norm(*args)[0]
        return y, mean, var, *torch.autograd.grad(y, self.leaves(), self.grad)

    def expected(self, training, momentum=0.1, dtype=torch.float64):
        """The same by torch."""
        leaves = [self.narrowed(t.detach()).to(dtype).requires_grad_() for t in self.leaves()]
        weight, bias = leaves[1:] if len(leaves) == 3 else (None, None)
        mean, var = self.mean.to(dtype), self.var.to(dtype)
        live = [None if t is None else t[self.index] for t in (mean, var, weight, bias)]
        y = F.batch_norm(leaves[0], *live, training, momentum, 1e-5)
        mean[self.index], var[self.index] = live[:2]
        return y, mean, var, *torch.autograd.grad(y, leaves, self.narrowed(self.grad).to(dtype))


def assert_outcome(problem, training):
    """Values are rounded once, to the dtype of x; statistics and gradients of parameters are float32's."""
    got, want = problem.outcome(training), problem.expected(training)
    assert got[0].stride() == got[3].stride() == problem.x.stride()
    dead = torch.ones(problem.features, dtype=torch.bool).index_fill_(0, problem.index, False)
    for a, b in zip(got, want, strict=True):
        if a.dim() == 4 and a.shape != b.shape:
            assert_zero(a[:, dead])
        rtol = 2**-8 if a.dtype == torch.bfloat16 else 2e-5
        atol = 2e-5 * float(b.detach().abs().max()) + 1e-6
        torch.testing.assert_close(problem.narrowed(a).double(), b, rtol=rtol, atol=atol)


DTYPES = [torch.float32, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("wide", [False, True], ids=["compact", "wide"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_torch(size, layout, training, dtype, wide):
    if training and size == (2, 1, 1, 1):
        pytest.skip("two values decide the sign of their gradient by rounding")
    assert_outcome(Problem(size, layout, dtype=dtype, wide=wide), training)


ROWS = [(row["isa"], row["element"]) for row in pk.kernels() if row["operation"] == "norm" and row["isa"] in isas()]
ELEMENTS = {"f32": torch.float32, "bf16": torch.bfloat16}


# Whole groups of vectors, single vectors and what is left; planes and runs.
@pytest.mark.parametrize("size", [(2, 3, 16, 33), (4, 5, 6, 7), (3, 90, 2, 3), (3, 42, 1, 3)], ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["compact", "wide"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("isa", "element"), ROWS)
def test_every_instruction_set(isa, element, layout, wide, size):
    with capped(isa):
        assert_outcome(Problem(size, layout, dtype=ELEMENTS[element], wide=wide), True)


@pytest.mark.parametrize(("isa", "element"), ROWS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_nan_and_infinity_pass_through(isa, element, layout):
    """A NaN with few bits set must not round to infinity."""
    x = torch.zeros(2, 17, 3, 11, dtype=ELEMENTS[element]).contiguous(memory_format=layout)
    x[0, 3, 1, 2], x[1, 16, 0, 0], x[0, 0, 2, 10] = float("nan"), float("inf"), 3
    statistics = torch.zeros(17), torch.ones(17)
    with capped(isa):
        y = OPS.masked_batch_norm(x, None, None, *statistics, None, 17, False, 0.1, 0.0)[0]
    assert torch.equal(y.nan_to_num(-7.0), x.nan_to_num(-7.0))


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("size", [(3, 4, 16, 40), (3, 40, 5, 5)], ids=str)
def test_a_mean_far_from_zero_costs_no_accuracy(size, layout):
    problem = Problem(size, layout, offset=10000.0)
    y, want = problem.outcome(True)[0], problem.expected(True)[0]
    assert float((y - want).abs().max()) < 2e-3 * float(want.abs().max())  # x itself is rounded to 1e-3


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_sums_of_integers_are_exact(layout):
    problem = Problem((4, 6, 5, 5), layout, integers=True)
    _, mean, _, _, _, grad_bias = problem.outcome(True, momentum=1.0)
    _, want_mean, _, _, _, want_bias = problem.expected(True, momentum=1.0)
    assert torch.equal(grad_bias.double(), want_bias)
    assert torch.equal(mean, want_mean.float())


@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_without_parameters(layout):
    problem = Problem((4, 6, 5, 5), layout, affine=False)
    for a, b in zip(problem.outcome(True), problem.expected(True), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_gradients_and_statistics_elsewhere_are_untouched():
    problem = Problem((4, 6, 5, 5), torch.contiguous_format)
    _, mean, var, _, grad_weight, grad_bias = problem.outcome(True)
    elsewhere = torch.ones(problem.features, dtype=torch.bool).index_fill_(0, problem.index, False)
    assert not grad_weight[elsewhere].any() and not grad_bias[elsewhere].any()
    assert torch.equal(mean[elsewhere], problem.mean[elsewhere]) and torch.equal(var[elsewhere], problem.var[elsewhere])


@pytest.mark.parametrize("wide", [False, True], ids=["compact", "wide"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_second_derivative(training, wide):
    problem = Problem((3, 4, 3, 3), torch.contiguous_format, wide=wide)

    def penalty(leaves, normed):
        (slope,) = torch.autograd.grad(
            (normed.sin() * problem.grad.to(normed.dtype)).sum(), leaves[0], create_graph=True
        )
        return torch.autograd.grad(slope.square().sum(), leaves)

    args = (problem.mean.clone(), problem.var.clone(), problem.index.int(), problem.features, training, 0.1, 1e-5)
    got = penalty(problem.leaves(), OPS.masked_batch_norm(*problem.leaves(), *args)[0])
    leaves = [problem.narrowed(t.detach()).double().requires_grad_() for t in problem.leaves()]
    problem.grad, i = problem.narrowed(problem.grad), problem.index
    statistics = (problem.mean.double()[i], problem.var.double()[i])
    want = penalty(leaves, F.batch_norm(leaves[0], *statistics, leaves[1][i], leaves[2][i], training, 0.1, 1e-5))
    for a, b in zip(got, want, strict=True):
        a = problem.narrowed(a).double()
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.detach().abs().max()))


def test_one_thread_is_two_threads():
    problem, before = Problem((8, 7, 24, 32), torch.contiguous_format), torch.get_num_threads()
    outcomes = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        outcomes.append(problem.outcome(True))
    torch.set_num_threads(before)
    assert all(map(torch.equal, *outcomes))


def arguments(**changed):
    x, parameter = torch.randn(2, 3, 4, 4), torch.ones(5)
    given = {
        "x": x, "weight": parameter, "bias": parameter, "running_mean": parameter.clone(),
        "running_var": parameter.clone(), "index": torch.tensor([0, 2, 4], dtype=torch.int32),
    }  # fmt: skip
    return [*(given | changed).values(), 5, True, 0.1, 1e-5]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.randn(2, 3, 4)}, r"x: expected float32 or bfloat16 \[N, C, H, W\]"),
        ({"x": torch.randn(2, 3, 4, 4).double()}, r"x: expected float32 or bfloat16 \[N, C, H, W\]"),
        ({"x": torch.randn(2, 4, 4, 4)}, r"index: expected contiguous int32 \[4\]"),
        ({"x": torch.randn(1, 3, 1, 1)}, "x: expected more than one value per channel"),
        ({"weight": torch.ones(4)}, r"weight: expected contiguous float32 \[5\]"),
        ({"running_var": torch.ones(5).double()}, r"running_var: expected contiguous float32 \[5\]"),
        ({"index": torch.tensor([0, 1], dtype=torch.int32)}, r"index: expected contiguous int32 \[3\]"),
        ({"index": torch.tensor([0, 1, 5], dtype=torch.int32)}, "index: expected places below 5, got 5"),
        (
            {"x": torch.randn(2, 5, 4, 4), "index": torch.tensor([1, 1], dtype=torch.int32)},
            "index: expected each place once",
        ),
        ({"index": None}, "x: expected 5 channels"),
    ],
)
def test_errors(changed, message):
    with pytest.raises((ValueError, RuntimeError), match=f"masked_batch_norm: {message}"):
        OPS.masked_batch_norm(*arguments(**changed))
