"""regroup_channels, join_channels, pack_weight, unpack_grad_weight against plain torch."""

from pathlib import Path

import pytest
import torch

import prunekernels as pk
from cases.without_extension import python

OPS = torch.ops.prunekernels
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["nchw", "channels_last", "sliced", "expanded"]
SIZES = [(2, 5, 7), (1, 1, 1), (3, 1, 9), (2, 33, 33), (0, 4, 4), (2, 0, 3)]


def integers(layout, *size, dtype=torch.float32):
    x = torch.randint(-4, 5, size).to(dtype)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        return torch.stack([x, x + 1], -1)[..., 0]
    return x[:1].expand(size) if layout == "expanded" and size[0] else x


def places(*index):
    return torch.tensor(index, dtype=torch.int32)


def inverse(index, channels):
    back = torch.full((channels,), -1, dtype=torch.int32)
    for j, c in enumerate(index.tolist()):
        if c >= 0:
            back[c] = j
    return back


def regrouped(x, index):
    """What regroup_channels should give, by plain torch."""
    wide = torch.cat([x, x.new_zeros(x.shape[0], 1, *x.shape[2:])], 1)
    return wide[:, [c if c >= 0 else x.shape[1] for c in index.tolist()]]


INDICES = {
    "all": (6, (0, 1, 2, 3, 4, 5)), "some": (6, (1, 2, 5)), "padded": (4, (-1, 0, 1, -1, 3)), "none": (6, ()),
    "zeros": (6, (-1, -1, -1)), "one": (1, (0,)), "one of many": (70, (68,)), "from nothing": (0, (-1, -1)),
    "nothing": (0, ()), "wide": (130, tuple(range(0, 130, 3))),
    "wide and padded": (130, tuple(c if c % 2 else -1 for c in range(130))),
}  # fmt: skip


def assert_equal(got, want, channels_last=None):
    assert got.shape == want.shape and got.dtype == want.dtype and torch.equal(got, want)
    if channels_last is not None and got.numel():
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert got.is_contiguous(memory_format=layout)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", INDICES)
def test_regroup(name, layout, size):
    channels, index = INDICES[name]
    x, index = integers(layout, size[0], channels, *size[1:]), places(*index)
    got = OPS.regroup_channels(x, index, inverse(index, channels))
    many = channels > 1 and size[1] * size[2] > 1 and size[0] > 0
    assert_equal(got, regrouped(x, index), layout == "channels_last" if many and layout != "expanded" else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_regroup_in_every_dtype(layout, dtype):
    for channels, index in INDICES.values():
        x, index = integers(layout, 2, channels, 3, 5, dtype=dtype), places(*index)
        assert_equal(OPS.regroup_channels(x, index, inverse(index, channels)), regrouped(x, index))


# a_index, b_index: which channel of a (of b) goes to each place of the union, -1 where none does.
JOINS = {
    "apart": ((0, 1, -1, -1), (-1, -1, 0, 1)), "overlapping": ((0, 1, -1), (-1, 0, 1)), "same": ((0, 1), (0, 1)),
    "inside": ((0, 1, 2, 3), (-1, 0, -1, 1)), "around": ((-1, 0, -1), (0, 1, 2)), "none and some": ((-1, -1), (0, 1)),
    "some and none": ((0, 1, 2), (-1, -1, -1)), "nothing": ((), ()), "zeros": ((-1,), (-1,)), "one": ((0,), (0,)),
    "wide": tuple(tuple(c // step if c % step == 0 else -1 for c in range(90)) for step in (2, 3)),
}  # fmt: skip


def join(a, b, a_index, b_index, alpha):
    back = inverse(a_index, a.shape[1]), inverse(b_index, b.shape[1])
    return OPS.join_channels(a, b, a_index, b_index, *back, alpha)


def joined(a, b, a_index, b_index, alpha):
    return regrouped(a, a_index) + alpha * regrouped(b, b_index)


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("size", "alpha"), list(zip(SIZES, (1.0, -1.0, 0.5, 0.0, 2.0, 1.0), strict=True)), ids=str)
@pytest.mark.parametrize("layouts", [(a, b) for a in LAYOUTS[:3] for b in LAYOUTS[:3]], ids="-".join)
@pytest.mark.parametrize("name", JOINS)
def test_join(name, layouts, size, alpha):
    lists = [places(*index) for index in JOINS[name]]
    a, b = (integers(layout, size[0], int((i >= 0).sum()), *size[1:]) for layout, i in zip(layouts, lists, strict=True))
    assert_equal(join(a, b, *lists, alpha), joined(a, b, *lists, alpha))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_join_in_every_dtype(layout, dtype):
    for a_index, b_index in JOINS.values():
        lists = places(*a_index), places(*b_index)
        a, b = (integers(layout, 2, int((i >= 0).sum()), 3, 5, dtype=dtype) for i in lists)
        assert_equal(join(a, b, *lists, -2.0), joined(a, b, *lists, -2.0))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("name", JOINS)
def test_gradients_of_a_join(name, needs):
    lists = [places(*index) for index in JOINS[name]]
    leaves = [torch.randn(2, int((i >= 0).sum()), 2, 3, dtype=torch.float64) for i in lists]
    used = [leaf.requires_grad_() for leaf, need in zip(leaves, needs, strict=True) if need]
    grad = torch.randn(2, len(lists[0]), 2, 3, dtype=torch.float64)
    got, want = (torch.autograd.grad(f(*leaves, *lists, 2.0), used, grad) for f in (join, joined))
    torch.testing.assert_close(got, want)
    assert torch.autograd.gradgradcheck(lambda *_: join(*leaves, *lists, 2.0), used) if used[0].numel() else True


def table(filters, channels, groups=1):
    rows, columns = (torch.tensor(mask, dtype=torch.bool) for mask in (filters, channels))
    return OPS.conv_mask(rows, None, columns, len(filters), len(channels), groups), rows, columns


WEIGHTS = {
    "some": ([1, 0, 1, 1], [0, 1, 1], 1), "all": ([1] * 4, [1] * 3, 1), "one": ([0, 1, 0], [0, 0, 1], 1),
    "rows": ([0, 1, 1], [1, 1], 1), "wide": ([1, 0] * 20, [1, 1, 0] * 25, 1),
    "depthwise": ([1, 0, 1, 1], [1, 0, 1, 1], 4),
}  # fmt: skip


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS[:3])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_packed_and_unpacked(name, layout, dtype, kernel):
    filters, channels, groups = WEIGHTS[name]
    mask, rows, columns = table(filters, channels, groups)
    weight = integers(layout, len(filters), len(channels) // groups, *kernel, dtype=dtype)
    want = weight[rows] if groups > 1 else weight[rows][:, columns]
    assert_equal(OPS.pack_weight(weight, mask, *want.shape[:2]), want)
    for channels_last in (False, True):
        full = OPS.unpack_grad_weight(want, mask, *weight.shape[:2], channels_last)
        kept = rows[:, None] & (columns[None] if groups == 1 else True)
        assert_equal(full, torch.where(kept[..., None, None], weight, 0))
        assert full.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_gradients_of_a_packed_weight(layout):
    mask, rows, columns = table([1, 0, 1, 1], [0, 1, 1])
    weight = integers(layout, 4, 3, 3, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: OPS.pack_weight(w, mask, 3, 2), weight)
    assert torch.autograd.gradgradcheck(lambda w: OPS.pack_weight(w, mask, 3, 2), weight)
    grad = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: OPS.unpack_grad_weight(g, mask, 4, 3, False), grad)
    (got,) = torch.autograd.grad(OPS.pack_weight(weight, mask, 3, 2), weight, grad)
    assert got.stride() == weight.stride() and not got[1].any() and not got[:, 0].any()


X, MASK = torch.zeros(2, 3, 4, 4), table([1, 0, 1, 1], [0, 1, 1])[0]
RAGGED = OPS.conv_mask(None, torch.tensor([[1, 0], [1, 1]], dtype=torch.bool), None, 2, 2, 1)
SOME, BACK = places(0, 2), places(0, -1, 1)
regroup, joining, pack = OPS.regroup_channels, OPS.join_channels, OPS.pack_weight
BAD = {
    "regroup_channels: x: expected a 4-D tensor": (regroup, X[0], SOME, BACK),
    "regroup_channels: x: expected float32, float64": (regroup, X.long(), SOME, BACK),
    "regroup_channels: inverse: expected one place per channel": (regroup, X, SOME, SOME),
    "regroup_channels: index: expected .*int32": (regroup, X, SOME.long(), BACK),
    "regroup_channels: index: expected ascending places below 3, or -1": (regroup, X, places(0, 3), BACK),
    "regroup_channels: index: expected ascending places below 3": (regroup, X, places(0, -2), BACK),
    "index: expected ascending places below 3, or -1, got 0 at position 1": (regroup, X, places(2, 0), BACK),
    "inverse: expected ascending places below 2": (regroup, X, SOME, places(0, -1, 2)),
    "join_channels: a: expected a 4-D tensor": (joining, X[0], X, SOME, SOME, BACK, BACK, 1.0),
    "join_channels: b: expected the sizes of a": (joining, X, X[:1], SOME, SOME, BACK, BACK, 1.0),
    "join_channels: b: expected .*float": (joining, X, X.double(), SOME, SOME, BACK, BACK, 1.0),
    "join_channels: b_index: expected .2., as a_index": (joining, X, X, SOME, SOME[:1], BACK, BACK, 1.0),
    "join_channels: a_inverse, b_inverse: expected one": (joining, X, X, SOME, SOME, BACK, SOME, 1.0),
    "join_channels: a_index: expected ascending": (joining, X, X, places(1, 1), SOME, BACK, BACK, 1.0),
    "pack_weight: weight: expected a 4-D tensor": (pack, X[0], MASK, 3, 2),
    "pack_weight: mask: expected a table of 2 filters and 3 channels": (pack, X, MASK, 3, 2),
    "pack_weight: filters, channels: expected 3, 2": (pack, torch.zeros(4, 3, 1, 1), MASK, 4, 2),
    "pack_weight: mask: expected .*a table": (pack, X, SOME, 3, 2),
    "pack_weight: mask: expected lists of whole": (pack, torch.zeros(2, 2, 1, 1), RAGGED, 2, 2),
    "unpack_grad_weight: grad: expected .3, 2, R, S.": (OPS.unpack_grad_weight, X, MASK, 4, 3, False),
}  # fmt: skip


@pytest.mark.skipif(not pk.has_extension(), reason="pure torch trusts what the package itself gives to these operators")
@pytest.mark.parametrize("text", BAD)
def test_bad_arguments(text):
    call, *args = BAD[text]
    with pytest.raises(ValueError, match=text):
        call(*args)


@pytest.mark.slow
def test_without_the_extension():
    """The tests of operators, rules and tensors that need no compiled operator also pass on the fallbacks."""
    chosen = "every_dtype or gradients or packed or in_place or aliases or alias or autograd or leaf or hooks_on"
    chosen += " or products_are or geometry"
    select = f"({chosen}) and not bad_arguments and not without_the_extension"
    files = ["test_ops.py", "test_tensor.py", "test_rules.py", "test_filled.py", "test_groups.py"]
    paths = [str(Path(__file__).with_name(file)) for file in files]
    flags = ["-q", "--no-header", "-p", "no:cacheprovider", *paths, "-k", select]
    done = python(f"import sys, pytest; sys.exit(pytest.main({flags!r}))")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
