"""masked_batch_norm and its gradients against torch's batch norm in float64."""

import pytest
import torch
import torch.nn.functional as F

import prunekernels as pk

pytestmark = pytest.mark.skipif(not pk.has_extension(), reason="an operator of the extension")
OPS = torch.ops.prunekernels
# N, C, H, W: planes around the length that decides how NCHW is worked on, runs around a vector and around the blocks
# that sums are drained in, one value a channel and image, one channel.
SIZES = [
    (2, 3, 16, 32), (2, 3, 7, 73), (3, 5, 19, 27), (2, 2, 128, 129), (4, 5, 6, 7), (3, 64, 1, 1), (2, 130, 4, 4),
    (2, 511, 3, 3), (2, 512, 2, 1), (2, 600, 3, 3), (16, 1, 5, 5), (1, 20, 2, 2), (5, 33, 16, 1), (300, 16, 2, 4),
    (514, 128, 1, 1), (2, 1, 1, 1),
]  # fmt: skip


class Problem:
    def __init__(self, size, layout, *, affine=True, integers=False, offset=0.0):
        gen = torch.Generator().manual_seed(sum(size))

        def draw(*shape):
            t = torch.randn(*shape, generator=gen)
            return (t * 2).round() if integers else t

        N, C, H, W = size
        self.features = 2 * C + 1
        self.index = torch.randperm(self.features, generator=gen)[:C].sort().values
        self.x = (draw(*size) * 3 + offset).to(memory_format=layout).requires_grad_()
        self.grad = draw(*size)
        self.weight, self.bias = ((draw(self.features).requires_grad_() if affine else None) for _ in range(2))
        self.mean, self.var = draw(self.features), draw(self.features).square() + 0.5

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
        leaves = [t.detach().to(dtype).requires_grad_() for t in self.leaves()]
        weight, bias = leaves[1:] if len(leaves) == 3 else (None, None)
        mean, var = self.mean.to(dtype), self.var.to(dtype)
        live = [None if t is None else t[self.index] for t in (mean, var, weight, bias)]
        y = F.batch_norm(leaves[0], *live, training, momentum, 1e-5)
        mean[self.index], var[self.index] = live[:2]
        return y, mean, var, *torch.autograd.grad(y, leaves, self.grad.to(dtype))


LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_torch(size, layout, training):
    if training and size == (2, 1, 1, 1):
        pytest.skip("two values decide the sign of their gradient by rounding")
    problem = Problem(size, layout)
    got, want = problem.outcome(training), problem.expected(training)
    assert got[0].stride() == problem.x.stride()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5 * float(b.detach().abs().max()) + 1e-6)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
def test_every_instruction_set(isa, layout):
    if isa not in [row["isa"] for row in pk.kernels() if row["operation"] == "norm"]:
        pytest.skip("not in this build")
    best = pk.build_info()["isa"]
    pk.ops.extension.cap_isa(isa)
    try:
        if pk.build_info()["isa"] != isa and isa not in best:
            pytest.skip(f"this CPU has {best}")
        for size in ((2, 3, 16, 33), (4, 5, 6, 7)):
            problem = Problem(size, layout)
            for a, b in zip(problem.outcome(True), problem.expected(True), strict=True):
                torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5 * float(b.detach().abs().max()))
    finally:
        pk.ops.extension.cap_isa(None)


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


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_second_derivative(training):
    problem = Problem((3, 4, 3, 3), torch.contiguous_format)

    def penalty(leaves, normed):
        (slope,) = torch.autograd.grad(
            (normed.sin() * problem.grad.to(normed.dtype)).sum(), leaves[0], create_graph=True
        )
        return torch.autograd.grad(slope.square().sum(), leaves)

    args = (problem.mean.clone(), problem.var.clone(), problem.index.int(), problem.features, training, 0.1, 1e-5)
    got = penalty(problem.leaves(), OPS.masked_batch_norm(*problem.leaves(), *args)[0])
    leaves = [t.detach().double().requires_grad_() for t in problem.leaves()]
    i = problem.index
    statistics = (problem.mean.double()[i], problem.var.double()[i])
    want = penalty(leaves, F.batch_norm(leaves[0], *statistics, leaves[1][i], leaves[2][i], training, 0.1, 1e-5))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3 * float(b.detach().abs().max()))


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
        ({"x": torch.randn(2, 3, 4)}, r"x: expected float32 \[N, C, H, W\]"),
        ({"x": torch.randn(2, 3, 4, 4).double()}, r"x: expected float32 \[N, C, H, W\]"),
        ({"x": torch.randn(1, 3, 1, 1)}, "x: expected more than one value per channel"),
        ({"weight": torch.ones(4)}, r"weight: expected contiguous float32 \[5\]"),
        ({"running_var": torch.ones(5).double()}, r"running_var: expected contiguous float32 \[5\]"),
        ({"index": torch.tensor([0, 1], dtype=torch.int32)}, r"index: expected contiguous int32 \[3\]"),
        ({"index": torch.tensor([0, 1, 5], dtype=torch.int32)}, "index: expected places below 5, got 5"),
        ({"index": None}, "x: expected 5 channels"),
    ],
)
def test_errors(changed, message):
    with pytest.raises((ValueError, RuntimeError), match=f"masked_batch_norm: {message}"):
        OPS.masked_batch_norm(*arguments(**changed))
