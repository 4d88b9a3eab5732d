"""A batch norm in two halves, with the sum and the relu that follow it: the bits of one after the other."""

import pytest
import torch
import torch.nn.functional as F

import prunekernels as pk
from cases.conv import capped, isas

pytestmark = pytest.mark.skipif(not pk.has_extension(), reason="an operator of the extension")
OPS = torch.ops.prunekernels
# Planes and runs; whole groups of vectors, single vectors and what is left.
SIZES = [
    (2, 3, 16, 33), (2, 2, 128, 129), (4, 5, 6, 7), (3, 90, 2, 3), (3, 42, 1, 3), (3, 64, 1, 1), (2, 600, 3, 3),
    (16, 1, 5, 5), (5, 33, 16, 1), (2, 5, 4, 8), (3, 5, 4, 8), (3, 5, 1, 31), (3, 1100, 2, 2),
]  # fmt: skip
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
ENDS = pytest.mark.parametrize("end", ["alone", "relu", "sum", "sum relu"])
ROWS = [(row["isa"], row["element"]) for row in pk.kernels() if row["operation"] == "norm" and row["isa"] in isas()]
ELEMENTS = {"f32": torch.float32, "bf16": torch.bfloat16}


class Problem:
    def __init__(self, size, layout=torch.contiguous_format, dtype=torch.float32, training=True, affine=True):
        gen = torch.Generator().manual_seed(sum(size))
        self.features = 2 * size[1] + 1
        index = torch.randperm(self.features, generator=gen)[: size[1]].sort().values.int()
        self.x, self.other, self.grad = (
            torch.randn(size, generator=gen).to(dtype).contiguous(memory_format=layout) for _ in range(3)
        )
        parameters = [torch.randn(self.features, generator=gen) if affine else None for _ in range(2)]
        self.leaves = [None if t is None else t.requires_grad_() for t in (self.x, *parameters, self.other)]
        self.running = [torch.zeros(self.features), torch.ones(self.features)]
        self.rest = (index, self.features, training, 0.1, 1e-5)

    def given(self):
        """The arguments of a norm, with statistics of their own."""
        return *self.leaves[:3], *(t.clone() for t in self.running), *self.rest

    def halves(self):
        given = self.given()
        y, table, gate = OPS.deferred_batch_norm(*given)
        return y, (self.x.detach(), table, *self.rest[:2]), gate, given[3:5]

    def in_one(self, end):
        y, table, gate, running = self.halves()
        if end == "sum relu":
            out = OPS.batch_norm_relu(OPS.deferred_sum(y, self.other), *table, self.other.detach(), None)
        elif end == "sum":
            out = OPS.deferred_sum(y, self.other)
            OPS.apply_batch_norm_(out, *table, self.other.detach(), False)
        elif end == "relu":
            out = OPS.batch_norm_relu(y, *table, None, gate)
        else:
            out = y
            OPS.apply_batch_norm_(out, *table, None, False)
        return out, *running, *self.gradients(out)

    def one_after_the_other(self, end):
        given = self.given()
        y = OPS.masked_batch_norm(*given)[0]
        y = y + self.other if "sum" in end else y
        y = F.relu(y) if "relu" in end else y
        return y, *given[3:5], *self.gradients(y)

    def gradients(self, y, **options):
        return torch.autograd.grad(
            y, [t for t in self.leaves if t is not None], self.grad, allow_unused=True, **options
        )


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.stride() == b.stride() and torch.equal(a, b)


@ENDS
@TRAINING
@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.thinned(2)
def test_the_same_bits(size, dtype, layout, training, end):
    problem = Problem(size, layout, dtype, training)
    assert_same(problem.in_one(end), problem.one_after_the_other(end))


@ENDS
@LAYOUTS
@pytest.mark.parametrize("size", SIZES[:5:2], ids=str)
@pytest.mark.parametrize(("isa", "element"), ROWS)
def test_every_instruction_set(isa, element, size, layout, end):
    problem = Problem(size, layout, ELEMENTS[element])
    with capped(isa):
        assert_same(problem.in_one(end), problem.one_after_the_other(end))


def test_without_parameters():
    problem = Problem((4, 5, 6, 7), affine=False)
    assert_same(problem.in_one("sum relu"), problem.one_after_the_other("sum relu"))


@pytest.mark.parametrize(("isa", "element"), ROWS)
@LAYOUTS
def test_nan_passes_a_relu_and_so_does_its_gradient(isa, element, layout):
    problem = Problem((2, 17, 3, 40), layout, ELEMENTS[element], training=False)
    with torch.no_grad():
        problem.x[0, 3, 1, 2] = problem.x[1, 16, 2, 39] = float("nan")
        problem.x[1, 0, 0, 0] = float("inf")
    with capped(isa):
        got, want = problem.in_one("relu"), problem.one_after_the_other("relu")
    for a, b in zip(got, want, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert got[0].isnan().sum() == 2


def test_parameters_may_change_between_the_halves():
    problem = Problem((4, 5, 6, 7))
    want = problem.one_after_the_other("alone")[0]
    y, table, _, _ = problem.halves()
    with torch.no_grad():
        problem.leaves[1].zero_(), problem.leaves[2].zero_()
    OPS.apply_batch_norm_(y, *table, None, False)
    assert torch.equal(y, want)


def test_the_relu_takes_its_gradient_where_the_gate_is_closed():
    problem = Problem((4, 5, 6, 7))
    want = problem.one_after_the_other("relu")[3:]
    y, table, gate, _ = problem.halves()
    out = OPS.batch_norm_relu(y, *table, None, gate)
    assert gate[0].item() == 1
    gate[0].zero_()
    seen = []
    y.register_hook(lambda grad: seen.append(grad.clone()))
    assert_same(problem.gradients(out), want)
    assert torch.equal(seen[0], torch.where(out > 0, problem.grad, 0))


def test_several_backward_passes():
    problem = Problem((4, 5, 6, 7))
    y, table, gate, _ = problem.halves()
    out = OPS.batch_norm_relu(y, *table, None, gate)
    first = problem.gradients(out, retain_graph=True)
    assert_same(problem.gradients(out, retain_graph=True), first)
    assert_same(problem.gradients(out, create_graph=True), problem.gradients(out, retain_graph=True, create_graph=True))
    gate[0].zero_()  # something else reads y from now on
    assert_same(problem.gradients(out), first)


@TRAINING
def test_second_derivative(training):
    problem = Problem((3, 4, 3, 3), training=training)

    def penalty(y):
        (slope,) = torch.autograd.grad((F.relu(y).sin() * problem.grad).sum(), problem.x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), problem.leaves[:3])

    want = penalty(OPS.masked_batch_norm(*problem.given())[0])
    y, table, gate, _ = problem.halves()
    for got, expected in zip(penalty(OPS.batch_norm_relu(y, *table, None, gate)), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_one_thread_is_two_threads():
    problem, before = Problem((8, 7, 24, 32)), torch.get_num_threads()
    outcomes = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        outcomes.append(problem.in_one("sum relu"))
    torch.set_num_threads(before)
    assert_same(*outcomes)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.randn(2, 3, 4, 4).double()}, r"x: expected float32 or bfloat16 \[N, C, H, W\]"),
        ({"table": torch.zeros(3, 3)}, r"table: expected contiguous float32 \[4, 3\]"),
        ({"add": torch.randn(2, 3, 4, 5)}, "add: expected float .*as x"),
        ({"y": torch.randn(2, 3, 4, 4).bfloat16()}, "y: expected float .*as x"),
        ({"y": torch.randn(2, 3, 4, 8)[..., ::2]}, "y: expected a tensor without gaps"),
    ],
)
def test_errors(changed, message):
    x = torch.randn(2, 3, 4, 4)
    given = {"y": x.clone(), "x": x, "table": torch.zeros(4, 3), "index": None, "features": 3, "add": None}
    with pytest.raises((ValueError, RuntimeError), match=f"apply_batch_norm_: {message}"):
        OPS.apply_batch_norm_(*(given | changed).values(), True)


def test_wide_inputs_are_refused():
    x, index = torch.randn(2, 5, 4, 4), torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises((ValueError, RuntimeError), match="deferred_batch_norm: index: expected a place for each"):
        OPS.deferred_batch_norm(x, None, None, None, None, index, 5, True, 0.1, 1e-5)


def test_sums_of_other_sizes_are_refused():
    with pytest.raises((ValueError, RuntimeError), match="deferred_sum: b: expected"):
        OPS.deferred_sum(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4))
