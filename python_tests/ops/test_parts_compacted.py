"""Rows and columns of many tensors at once, into small tensors and back: what compacted mode does at a change of masks.

The operators, their fallbacks, and indexing agree to the bit.
"""

import pytest
import torch

import prunekernels as pk
from cases.conv import generator
from prunekernels.ops import fallback_parts
from prunekernels.ops.parts import gather_parts, scatter_parts

OPS = torch.ops.prunekernels
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
SHAPES = [(9,), (7, 11), (6, 5, 3), (8, 6, 3, 3), (8, 17, 1, 1), (5, 1, 3, 3), (4, 6, 2, 3, 2), (1, 1, 1, 1), (0, 3, 3)]
LAYOUTS = ["contiguous", "channels last", "transposed", "sliced", "reordered"]
LISTS = {  # of so many: which
    "all": lambda size: None,
    "listed": lambda size: range(size),
    "some": lambda size: range(0, size, 2),
    "runs": lambda size: [i for i in range(size) if i % 4],
    "backwards": lambda size: range(size - 1, -1, -1),
    "padded": lambda size: [*range(1, size, 2), -1, -1],
    "zeros inside": lambda size: [i if i % 3 else -1 for i in range(size)],
    "one": lambda size: [size // 2][:size],
    "none": lambda size: [],
    "zeros": lambda size: [-1, -1],
}
IMPLEMENTATIONS = {
    "operators": (OPS.gather_parts_, OPS.scatter_parts_),
    "fallbacks": (fallback_parts.gather_parts_, fallback_parts.scatter_parts_),
}
implementations = pytest.mark.parametrize(("gather", "scatter"), IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


def listed(kind, size):
    chosen = LISTS[kind](size)
    return None if chosen is None else torch.tensor(list(chosen), dtype=torch.int64)


def lay_out(tensor, layout):
    """The same numbers, elsewhere in memory."""
    if layout == "channels last" and tensor.dim() in (4, 5):
        last = torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
        return torch.empty(tensor.shape, dtype=tensor.dtype, memory_format=last).copy_(tensor)
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":
        wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1)
        wide[..., 1::2] = tensor
        return wide[..., 1::2]
    if layout == "reordered" and tensor.dim() > 2:  # dense, in an order of its own
        order = [tensor.dim() - 1, *range(tensor.dim() - 1)]
        back = [order.index(i) for i in range(tensor.dim())]
        return tensor.permute(order).contiguous().permute(back)
    return tensor.contiguous()


def draw(shape, dtype=torch.float32, layout="contiguous"):
    numbers = torch.randint(-100, 100, shape, generator=generator(tuple(shape))).to(dtype)
    return lay_out(numbers, layout)


def gathered(whole, rows, columns):
    """What a part holds: one more row, and one more column, of zeros, are the last, which -1 chooses."""
    if columns is not None and columns.dim() == 2:
        rows = torch.arange(len(whole)) if rows is None else rows
        its = zip(rows.chunk(len(columns)), columns, strict=True)
        return torch.cat([gathered(whole, *of_group) for of_group in its])
    part = whole
    for dim, index in enumerate((rows, columns)):
        if index is not None:
            zeros = part.new_zeros(*part.shape[:dim], 1, *part.shape[dim + 1 :])
            part = torch.cat([part, zeros], dim).index_select(dim, index.remainder(whole.shape[dim] + 1))
    return part


def scattered(whole, part, rows, columns):
    whole = whole.clone()
    if whole.dim() == 1:
        return scattered(whole[:, None], part[:, None], rows, None)[:, 0]
    if columns is not None and columns.dim() == 2:
        rows = torch.arange(len(whole)) if rows is None else rows
        for its, own_rows, own in zip(part.chunk(len(columns)), rows.chunk(len(columns)), columns, strict=True):
            whole = scattered(whole, its, own_rows, own)
        return whole
    for i in range(len(part)):
        for j in range(part.shape[1]):
            row, column = (at if index is None else int(index[at]) for at, index in ((i, rows), (j, columns)))
            if row >= 0 and column >= 0:
                whole[row, column] = part[i, j]
    return whole


def assert_agree(gather, scatter, whole, rows, columns, part_layout):
    want = gathered(whole, rows, columns)
    part = lay_out(torch.full(want.shape, 1).to(whole.dtype), part_layout)
    gather([part], [whole], [rows], [columns])
    assert torch.equal(part, want)
    part.copy_(draw(part.shape, part.dtype))
    want = scattered(whole, part, rows, columns)
    scatter([whole], [part], [rows], [columns])
    assert torch.equal(whole, want)


@implementations
@pytest.mark.thinned(13)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("columns", LISTS)
@pytest.mark.parametrize("rows", LISTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_indexing(gather, scatter, shape, rows, columns, layout):
    column_list = listed(columns, shape[1]) if len(shape) > 1 else None
    whole = draw(shape, layout=layout)
    assert_agree(gather, scatter, whole, listed(rows, shape[0]), column_list, layout)


IN_GROUPS = {  # of the rows of a part: columns of each group
    "one": [[3, 0, 4]],
    "alike": [[0, 2], [0, 2]],
    "runs": [[0, 1, 2], [2, 3, 4]],
    "padded": [[1, 4, -1], [0, -1, -1]],
    "nothing in one": [[-1, -1], [0, 3]],
    "by row": [[0], [4], [2], [-1], [1], [0]],
}


@implementations
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("columns", IN_GROUPS)
@pytest.mark.parametrize("rows", [None, [0, 2, 3, 5, 6, 7], [5, -1, 0, -1, -1, -1]], ids=str)
@pytest.mark.parametrize("taps", [(), (1, 1), (3, 3)], ids=str)
def test_columns_of_groups(gather, scatter, taps, rows, columns, layout):
    whole = draw((6 if rows is None else 8, 5, *taps), layout=layout)
    row_list = None if rows is None else torch.tensor(rows)
    assert_agree(gather, scatter, whole, row_list, torch.tensor(IN_GROUPS[columns]), layout)


@implementations
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("columns", ["all", "some", "zeros inside"])
@pytest.mark.parametrize("shape", [(19,), (8, 6, 3, 3), (8, 17, 1, 1), (7, 11)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(gather, scatter, dtype, shape, columns, layout):
    whole = draw(shape, dtype, layout)
    column_list = listed(columns, shape[1]) if len(shape) > 1 else None
    assert_agree(gather, scatter, whole, listed("zeros inside", shape[0]), column_list, layout)


@implementations
@pytest.mark.parametrize("part_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("columns", ["all", "runs"])
def test_a_part_may_lie_otherwise_than_its_whole(gather, scatter, columns, layout, part_layout):
    whole = draw((8, 6, 3, 2), layout=layout)
    assert_agree(gather, scatter, whole, listed("some", 8), listed(columns, 6), part_layout)


@implementations
def test_many_at_once(gather, scatter):
    """Of all dtypes, with lists that several share."""
    kinds = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
    lists = {size: listed("padded", size) for shape in SHAPES for size in shape}
    wholes = [draw(shape, dtype) for shape, dtype in kinds]
    rows = [lists[len(whole)] for whole in wholes]
    columns = [lists[whole.shape[1]] if whole.dim() > 1 else None for whole in wholes]
    want = [gathered(*at) for at in zip(wholes, rows, columns, strict=True)]
    parts = [torch.ones_like(part) for part in want]
    gather(parts, wholes, rows, columns)
    assert all(map(torch.equal, parts, want))
    want = [scattered(*at) for at in zip(wholes, parts, rows, columns, strict=True)]
    back = [torch.zeros_like(whole) for whole in wholes]
    want = [scattered(*at) for at in zip(back, parts, rows, columns, strict=True)]
    scatter(back, parts, rows, columns)
    assert all(map(torch.equal, back, want))


def test_nothing_at_all():
    gather_parts([], [], [], [])
    scatter_parts([], [], [], [])


@implementations
def test_nan_and_signs_are_moved_as_they_are(gather, scatter):
    whole = torch.tensor([[1.0, float("nan"), -0.0, 1e-42], [float("inf"), 2.0, 3.0, 4.0]])
    part = torch.full((2, 3), float("nan"))
    gather([part], [whole], [torch.tensor([0, -1])], [torch.tensor([1, 2, 3])])
    assert part.view(torch.int32).tolist() == [whole[0, 1:].view(torch.int32).tolist(), [0, 0, 0]]
    scatter([whole], [part], [torch.tensor([1, -1])], [torch.tensor([1, 2, 3])])
    assert torch.equal(whole[0, 1:].view(torch.int32), whole[1, 1:].view(torch.int32))


@implementations
def test_a_part_of_a_tensor(gather, scatter):
    """Rows of a larger part, as the groups of a grouped convolution are, and columns of a larger whole."""
    whole, part = draw((8, 6, 3, 3)), torch.zeros(5, 4, 3, 3)
    rows, columns = [torch.tensor([0, 2]), torch.tensor([1, 3, 0])], [torch.tensor([0, 1, 2, 5]), listed("runs", 6)[:4]]
    gather([part[:2], part[2:]], [whole[:4], whole[4:]], rows, columns)
    assert torch.equal(part, torch.cat([whole[:4][rows[0]][:, columns[0]], whole[4:][rows[1]][:, columns[1]]]))
    want = whole.clone()
    want[:, 2:4] = 0
    scatter([whole[:, 2:4]], [torch.zeros(8, 2, 3, 3)], [None], [None])
    assert torch.equal(whole, want)


@implementations
@pytest.mark.parametrize("gap", [False, True])
@pytest.mark.parametrize("run", [1, 7, 8, 9, 40])
@pytest.mark.parametrize("shape", [(3, 250), (2000,), (3, 250, 1, 2), (3, 5000)], ids=str)
def test_runs_of_adjacent_columns(gather, scatter, shape, run, gap):
    """Copied one by one below eight single elements, else together."""
    size = shape[min(1, len(shape) - 1)]
    chosen = torch.tensor([-1 if gap and i % 100 < 20 else i for i in range(size) if i % (run + 1)])
    rows, columns = (None, chosen) if len(shape) > 1 else (chosen, None)
    assert_agree(gather, scatter, draw(shape), rows, columns, "contiguous")


@implementations
def test_lists_may_be_slices_and_name_a_row_twice(gather, scatter):
    whole, rows, columns = draw((6, 5, 3)), torch.arange(12)[1:12:4].remainder(4), torch.tensor([[4, 0], [4, 0]])[:, 0]
    part = torch.zeros(3, 2, 3)
    gather([part], [whole], [rows], [columns])
    assert torch.equal(part, whole[rows][:, columns])
    part[1:] = part[0]
    part[:, 1] = part[:, 0]
    want = whole.clone()
    want[1, 4] = part[0, 0]
    scatter([whole], [part], [rows], [columns])  # equal values, so whichever arrives
    assert torch.equal(whole, want)


@pytest.mark.parametrize("length", [(1 << 15) - 1, 1 << 15, (1 << 15) + 1, 100_003])
@pytest.mark.parametrize("kind", ["all", "runs"])
@pytest.mark.parametrize("threads", [1, 2])
def test_long_vectors(threads, kind, length):
    torch.set_num_threads(threads)
    whole, rows = torch.arange(length), listed(kind, length)
    want = whole if rows is None else whole[rows]
    part = torch.zeros_like(want)
    gather_parts([part], [whole], [rows], [None])
    assert torch.equal(part, want)
    back = torch.full_like(whole, -1)
    scatter_parts([back], [part], [rows], [None])
    assert torch.equal(back[want], whole[want]) and int((back >= 0).sum()) == len(want)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_any_number_of_threads(threads, layout):
    torch.set_num_threads(threads)
    shapes = [(96, 64, 3, 3), (1,), (200, 301), (7, 1, 3, 3), (64, 128, 1, 1), (333,), (3, 5000)]
    wholes = [draw(shape, layout=layout) for shape in shapes]
    rows = [listed("zeros inside", len(whole)) for whole in wholes]
    columns = [listed("runs", whole.shape[1]) if whole.dim() > 1 else None for whole in wholes]
    want = [gathered(*at) for at in zip(wholes, rows, columns, strict=True)]
    parts = [lay_out(torch.ones_like(part), layout) for part in want]
    gather_parts(parts, wholes, rows, columns)
    assert all(map(torch.equal, parts, want))
    back, of_fallback = ([torch.zeros_like(whole) for whole in wholes] for _ in range(2))
    scatter_parts(back, parts, rows, columns)
    fallback_parts.scatter_parts_(of_fallback, parts, rows, columns)
    assert all(map(torch.equal, back, of_fallback))


@implementations
def test_version_counters_move(gather, scatter):
    """Of what is written, and of that alone."""
    whole, part, rows = torch.ones(4, 3), torch.zeros(2, 3), torch.tensor([0, 2])
    before = whole._version, part._version
    gather([part], [whole], [rows], [None])
    assert whole._version == before[0] and part._version > before[1]
    between = part._version
    scatter([whole], [part], [rows], [None])
    assert whole._version > before[0] and part._version == between


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_parameters_stay_leaves(mode):
    whole, part = torch.nn.Parameter(draw((4, 3))), torch.nn.Parameter(torch.zeros(2, 3))
    with mode():
        gather_parts([part], [whole], [torch.tensor([0, 2])], [None])
        scatter_parts([whole], [part], [torch.tensor([1, 3])], [None])
        inside = torch.zeros(2, 3)
        gather_parts([inside], [whole], [torch.tensor([1, 3])], [None])
    assert part.is_leaf and whole.is_leaf and part.requires_grad
    assert torch.equal(part, whole[[0, 2]]) and torch.equal(part, whole[[1, 3]]) and torch.equal(inside, part)


@pytest.mark.parametrize("made", [gather_parts, scatter_parts])
def test_tensors_of_several_devices(made):
    """Those of each go to an operator of their own."""
    there, here = torch.empty(4, 3, device="meta"), torch.ones(4, 3)
    small = [torch.zeros(2, 3, device="meta"), torch.zeros(2, 3)]
    pair = (small, [there, here]) if made is gather_parts else ([there, here], small)
    made(*pair, [torch.tensor([0, 2])] * 2, [None] * 2)
    assert torch.equal(here[[0, 2]], small[1]) and int(small[1].sum()) == (6 if made is gather_parts else 0)


# ---- bad arguments


W, P, ROWS, COLUMNS = torch.zeros(4, 3), torch.zeros(2, 2), torch.tensor([0, 2]), torch.tensor([0, 1])
BAD = {  # argument it is about: what replaces part, whole, rows, columns
    "parts[1]": [
        {"parts": torch.zeros(3, 2)},
        {"parts": torch.zeros(2, 3)},
        {"parts": torch.zeros(2, 2, 1)},
        {"parts": P.double()},
        {"rows": None},
        {"rows": torch.tensor([], dtype=torch.int64)},
        {"columns": None},
        {"parts": torch.tensor(1.0)},
        {"parts": torch.zeros(2, 2, dtype=torch.complex64)},
    ],
    "wholes[1]": [{"wholes": torch.zeros(())}, {"wholes": torch.zeros(4, 3, 1, 1, 1, 1)}],
    "rows[1]": [
        {"rows": ROWS.int()},
        {"rows": ROWS[None]},
        {"rows": torch.tensor([0, 4])},
        {"rows": torch.tensor([-2, 0])},
        {"rows": torch.tensor([True, False, True, False])},
    ],
    "columns[1]": [
        {"columns": COLUMNS.int()},
        {"columns": COLUMNS[None, None]},
        {"columns": COLUMNS.expand(3, 2)},
        {"columns": COLUMNS.expand(0, 2)},
        {"columns": torch.tensor([[0, 1], [3, 0]])},
        {"columns": torch.tensor([[0, -2], [1, 0]])},
        {"columns": torch.tensor([3, 0])},
        {"columns": torch.tensor([0, -2])},
        {"parts": torch.zeros(2), "wholes": torch.zeros(4)},
    ],
}


def call(gather, scatter, op, **arguments):
    lists = {"parts": [P.clone(), arguments["parts"]], "wholes": [W.clone(), arguments["wholes"]]}
    first, second = ("parts", "wholes") if op == "gather_parts_" else ("wholes", "parts")
    operator = gather if op == "gather_parts_" else scatter
    operator(lists[first], lists[second], [ROWS, arguments["rows"]], [COLUMNS, arguments["columns"]])


@implementations
@pytest.mark.parametrize("op", ["gather_parts_", "scatter_parts_"])
@pytest.mark.parametrize(("argument", "at"), [(name, at) for name in BAD for at in range(len(BAD[name]))])
def test_bad_arguments_are_named(gather, scatter, op, argument, at):
    given = {"parts": P, "wholes": W, "rows": ROWS, "columns": COLUMNS} | BAD[argument][at]
    with pytest.raises(ValueError) as caught:
        call(gather, scatter, op, **given)
    message = str(caught.value).split("\n")[0]
    assert message.startswith(f"{op}: {argument}: expected ") and ", got " in message


def test_sparse_tensors():
    """For which the dispatcher finds no compiled operator."""
    with pytest.raises(ValueError, match=r"gather_parts_: wholes\[0\]: expected a dense tensor, got torch.sparse_coo"):
        fallback_parts.gather_parts_([P], [W.to_sparse()], [ROWS], [COLUMNS])


@implementations
@pytest.mark.parametrize("at", [1, 2, 3])
def test_lists_of_unequal_length(gather, scatter, at):
    arguments = [[P], [W], [ROWS], [COLUMNS]]
    arguments[at] = arguments[at] * 2
    name = ["", "wholes", "rows", "columns"][at]
    with pytest.raises(ValueError, match=rf"gather_parts_: {name}: expected 1 entries, one per part, got 2"):
        gather(*arguments)


@implementations
def test_shared_memory(gather, scatter):
    whole, narrow = torch.zeros(4, 4), torch.zeros(4, 1).expand(4, 4)
    with pytest.raises(ValueError, match=r"gather_parts_: parts\[0\]: expected memory of its own"):
        gather([whole[:2]], [whole], [ROWS], [None])
    with pytest.raises(ValueError, match=r"scatter_parts_: wholes\[0\]: expected memory of its own"):
        scatter([whole], [whole[1:3]], [ROWS], [None])
    with pytest.raises(ValueError, match=r"gather_parts_: parts\[0\]: expected a tensor that holds each element once"):
        gather([narrow], [whole], [None], [None])
    with pytest.raises(ValueError, match=r"scatter_parts_: wholes\[0\]: expected a tensor that holds each element"):
        scatter([narrow], [whole], [None], [None])
    part = torch.ones(2, 4)
    gather([part], [narrow], [ROWS], [None])  # which is only read
    assert not part.any()
    gather([whole[:2]], [whole[2:]], [torch.tensor([0, 1])], [None])  # beside each other


@implementations
def test_nothing_is_written_where_an_argument_is_bad(gather, scatter):
    part, whole, bad = torch.zeros(2, 2), torch.ones(4, 3), torch.tensor([0, 9])
    with pytest.raises(ValueError):
        gather([part, P.clone()], [whole, W], [ROWS, bad], [COLUMNS, COLUMNS])
    assert not part.any() and part._version == 0


@pytest.mark.skipif(not pk.has_extension(), reason="the compiled operators")
def test_the_extension_has_them():
    for name in ("gather_parts_", "scatter_parts_"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"prunekernels::{name}", "CPU")
