"""gather_parts_ and scatter_parts_ in pure torch, for devices and builds without kernels of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from . import extension
from .fallback import _expect

ops = extension.ops
_PARTS = "Tensor?[] rows, Tensor?[] columns) -> ()"
SCHEMAS = (
    f"gather_parts_(Tensor(a!)[] parts, Tensor[] wholes, {_PARTS}",
    f"scatter_parts_(Tensor(a!)[] wholes, Tensor[] parts, {_PARTS}",
)
MOST_DIMENSIONS = 5
_Choice = tuple[Tensor | None, Tensor | None]  # rows (or columns) of a whole, and where they are in its part; None: all


def _check_list(op: str, argument: str, index: Tensor | None, size: int, rows: int | None = None) -> int:
    """How many entries the list has; size: of the whole. rows: of the part, for columns, which may be in groups."""
    if index is None:
        return size
    holds = index.device.type == "cpu" and index.dtype == torch.int64
    holds = holds and (index.dim() == 1 or (index.dim() == 2 and rows is not None))
    forms = "[length]" if rows is None else "[length] or [groups, length]"
    got = f"{index.dtype} {list(index.shape)} on {index.device}"
    _expect(holds, op, argument, f"None, or int64 {forms} on the CPU", got)
    if rows is not None and index.dim() == 2:
        divides = len(index) > 0 and rows % len(index) == 0
        _expect(divides, op, argument, f"as many groups as divide {rows} rows", list(index.shape))
    if index.numel():
        least, most = map(int, torch.aminmax(index))
        entries = f"entries from -1 to {size - 1}"
        _expect(-1 <= least and most < size, op, argument, entries, least if least < -1 else most)
    return index.shape[-1]


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and of that behind the last."""
    if not tensor.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _check_memory(op: str, argument: str, written: Tensor, read: Tensor) -> None:
    once = not written.numel() or all(
        size < 2 or stride for size, stride in zip(written.shape, written.stride(), strict=True)
    )
    _expect(once, op, argument, "a tensor that holds each element once", f"strides {list(written.stride())}")
    (begin, end), (read_begin, read_end) = _extent(written), _extent(read)
    apart = "memory of its own, for the part and for its whole"
    _expect(end <= read_begin or read_end <= begin, op, argument, apart, "two tensors in the same memory")


def _check(op: str, parts: list[Tensor], wholes: list[Tensor], rows: list, columns: list) -> None:
    for name, values in (("wholes", wholes), ("rows", rows), ("columns", columns)):
        _expect(len(values) == len(parts), op, name, f"{len(parts)} entries, one per part", len(values))
    for i, (part, whole, row_list, column_list) in enumerate(zip(parts, wholes, rows, columns, strict=True)):
        for name, tensor in (("parts", part), ("wholes", whole)):
            _expect(tensor.layout == torch.strided, op, f"{name}[{i}]", "a dense tensor", tensor.layout)
            holds = tensor.element_size() <= 8 and not tensor.is_complex()
            _expect(holds, op, f"{name}[{i}]", "real elements of 1, 2, 4 or 8 bytes", tensor.dtype)
            holds = 1 <= tensor.dim() <= MOST_DIMENSIONS
            _expect(holds, op, f"{name}[{i}]", f"1 to {MOST_DIMENSIONS} dimensions", list(tensor.shape))
        _expect(part.dtype == whole.dtype, op, f"parts[{i}]", f"{whole.dtype} as its whole", part.dtype)
        _expect(part.device == whole.device, op, f"parts[{i}]", f"a tensor on {whole.device}", part.device)
        holds = whole.dim() > 1 or column_list is None
        _expect(holds, op, f"columns[{i}]", "None, for a tensor of one dimension", column_list)
        size = [_check_list(op, f"rows[{i}]", row_list, whole.shape[0])]
        if whole.dim() > 1:
            size.append(_check_list(op, f"columns[{i}]", column_list, whole.shape[1], size[0]))
        size += whole.shape[2:]
        _expect(list(part.shape) == size, op, f"parts[{i}]", size, list(part.shape))
        if op == "gather_parts_":
            _check_memory(op, f"parts[{i}]", part, whole)
        else:
            _check_memory(op, f"wholes[{i}]", whole, part)


def _choices(lists: list[Tensor | None], device: torch.device) -> list[_Choice]:
    """What each list chooses, on the device, where all lists go in one copy."""
    made: dict[int, _Choice] = {}
    for index in lists:
        if index is None or id(index) in made:
            continue
        places = (index >= 0).nonzero().flatten()
        made[id(index)] = (index, None) if len(places) == len(index) else (index[places], places)
    if made:
        flat = [t for choice in made.values() for t in choice if t is not None]
        moved = iter(torch.cat(flat).to(device).split([len(t) for t in flat]))
        made = {key: (next(moved), None if places is None else next(moved)) for key, (_, places) in made.items()}
    return [(None, None) if index is None else made[id(index)] for index in lists]


def _take(tensor: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    if rows is not None and columns is not None:
        return tensor[rows[:, None], columns]
    if rows is not None:
        return tensor.index_select(0, rows)
    return tensor if columns is None else tensor.index_select(1, columns)


def _put(tensor: Tensor, rows: Tensor | None, columns: Tensor | None, value: Tensor) -> None:
    if rows is not None and columns is not None:
        tensor[rows[:, None], columns] = value
    elif rows is not None:
        tensor.index_copy_(0, rows, value)
    elif columns is not None:
        tensor.index_copy_(1, columns, value)
    else:
        tensor.copy_(value)


def _by_kernel(part: Tensor, rows: Tensor | None, columns: Tensor) -> tuple[Tensor, ...]:
    """Of the kernels of a part whose columns are in groups: row and column in the part, and in the whole."""
    of_row = torch.arange(len(part)) if rows is None else rows
    of_kernel = columns.repeat_interleave(len(part) // len(columns), 0)
    row, column = ((of_row >= 0)[:, None] & (of_kernel >= 0)).nonzero(as_tuple=True)
    return tuple(at.to(part.device) for at in (row, column, of_row[row], of_kernel[row, column]))


def _without_groups(parts, wholes, rows, columns):
    """The arguments without the tensors whose columns are in groups."""
    one = [n for n, index in enumerate(columns) if index is None or index.dim() == 1]
    return ([values[n] for n in one] for values in (parts, wholes, rows, columns))


def _in_groups(parts, wholes, rows, columns):
    """Part, whole, and what _by_kernel says, of the tensors whose columns are in groups."""
    for part, whole, row_list, column_list in zip(parts, wholes, rows, columns, strict=True):
        if column_list is not None and column_list.dim() == 2:
            yield part, whole, _by_kernel(part, row_list, column_list)


def _chosen(parts, wholes, rows, columns):
    """Part, whole, and what their rows and columns are in each other."""
    count = len(parts)
    choices = _choices([*rows, *columns], parts[0].device) if parts else []
    return zip(parts, wholes, choices[:count], choices[count:], strict=True)


def gather_parts_(parts, wholes, rows, columns):
    _check("gather_parts_", parts, wholes, rows, columns)
    for part, whole, (row, column, whole_row, whole_column) in _in_groups(parts, wholes, rows, columns):
        part.zero_()
        part[row, column] = whole[whole_row, whole_column]
    others = _without_groups(parts, wholes, rows, columns)
    for part, whole, (row, row_place), (column, column_place) in _chosen(*others):
        if row_place is not None or column_place is not None:
            part.zero_()
        _put(part, row_place, column_place, _take(whole, row, column))


def scatter_parts_(wholes, parts, rows, columns):
    _check("scatter_parts_", parts, wholes, rows, columns)
    for part, whole, (row, column, whole_row, whole_column) in _in_groups(parts, wholes, rows, columns):
        whole[whole_row, whole_column] = part[row, column]
    others = _without_groups(parts, wholes, rows, columns)
    for part, whole, (row, row_place), (column, column_place) in _chosen(*others):
        _put(whole, row, column, _take(part, row_place, column_place))


OPERATORS = (gather_parts_, scatter_parts_)
extension.register(SCHEMAS, OPERATORS)


# ---- shapes ---------------------------------------------------------------------------------------------------------


def _nothing(*args):
    return None


for _operator in OPERATORS:
    torch.library.register_fake(f"prunekernels::{_operator.__name__}", _nothing)
