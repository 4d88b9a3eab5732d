"""pack_weights and unpack_grad_weight, to the bit, with NaN in every dead kernel, full and packed."""

import dataclasses
import itertools

import numpy as np

from . import arrays

ELEMENTS = ["f32", "bf16", "f16"]  # as enum Element has them
LAYOUTS = {
    "rows": (0, 1, 2),
    "columns": (2, 1, 0),
    "channels": (0, 2, 1),
}  # as enum PackLayout, axes of [row, tap, column]
HEADER_WORDS = 16
_POINTER = np.uintp
_COUNTS = ("filters", "channels_per_group", "groups", "live_groups", "out_per_group", "in_per_group")
MASK = np.dtype([("words", _POINTER)] + [(name, "i4") for name in _COUNTS], align=True)
STRIDES = np.dtype([("row", "i8"), ("channel", "i8"), ("tap", "i8")])
_SHAPE = [("mask", MASK), *[(name, "i4") for name in ("taps", "layout", "rows_per_group", "columns")]]
PACK_JOB = np.dtype(
    _SHAPE + [("strides", STRIDES), ("full_element", "i4"), ("full", _POINTER), ("packed", _POINTER)], align=True
)
UNPACK_JOB = np.dtype(
    _SHAPE
    + [("strides", STRIDES), ("splits", "i4"), ("slice", "i8"), ("packed_element", "i4")]
    + [(name, _POINTER) for name in ("packed", "grad_scale", "full")],
    align=True,
)
PACK_WORK_BYTES = PACK_JOB.itemsize + 16
LAYERS_OF_A_LAUNCH = 4096 // PACK_WORK_BYTES  # no less than it holds


@dataclasses.dataclass(frozen=True)
class Layer:
    filters: int = 12
    channels: int = 10  # of all groups
    taps: int = 1
    groups: int = 1
    dead_filters: float = 0.4  # shares
    dead_inputs: float = 0.4
    dead_kernels: float = 0.0
    layout: str = "rows"
    more_rows: int = 0  # of a group, and columns, than there are live ones
    more_columns: int = 0
    memory: str = "contiguous"  # of the full weight: contiguous, last (channels_last) or apart (gaps everywhere)
    element: str = "f32"  # pack: of the full weight; unpack: of the packed gradient
    shift: int = 0  # elements that the full weight lies off a 16-byte boundary
    splits: int = 1  # unpack only, from here on
    scaled: bool = False

    def __str__(self):
        marks = [f"k{self.filters}c{self.channels}t{self.taps}g{self.groups}", self.layout, self.memory, self.element]
        marks += [f"dead{self.dead_filters},{self.dead_inputs},{self.dead_kernels}"]
        marks += [f"more{self.more_rows},{self.more_columns}"] * bool(self.more_rows or self.more_columns)
        marks += [f"shift{self.shift}"] * bool(self.shift) + [f"splits{self.splits}"] * (self.splits > 1)
        return "-".join(marks + ["scaled"] * self.scaled)


Alive = tuple[np.ndarray, np.ndarray]  # bool [K], bool [C]


class Mask:
    """live: bool [K, C / G]. lists: of each live group, its live filters and its live channels within the group."""

    def __init__(self, layer: Layer, rng: np.random.Generator, lib, alive: Alive | None = None):
        K, C, G = layer.filters, layer.channels, layer.groups
        drawn = rng.random(K) >= layer.dead_filters, rng.random(C) >= layer.dead_inputs
        filters, inputs = alive or drawn
        kernels = rng.random((K, C // G)) >= layer.dead_kernels
        self.live = kernels & filters[:, None] & np.repeat(inputs.reshape(G, -1), K // G, 0)
        grouped = self.live.reshape(G, K // G, C // G)
        self.lists = [
            (g * (K // G) + np.flatnonzero(grouped[g].any(1)), np.flatnonzero(grouped[g].any(0)))
            for g in range(G)
            if grouped[g].any()
        ]
        words = HEADER_WORDS + 2 * K + 2 * C + K * -(-(C // G) // 32)
        self.table, fields = arrays.guarded(np.zeros(words, np.int32)), np.zeros(1, MASK)
        lib.call("pk_pack_mask", filters, kernels, inputs, K, C, G, self.table, fields)
        self.rows, self.columns = (max((len(pair[side]) for pair in self.lists), default=0) for side in (0, 1))
        self.fields = tuple(fields[0])
        assert self.fields[1:] == (K, C // G, G, len(self.lists), self.rows, self.columns)


class Full:
    """[K, C / G, taps] as it lies in memory. What is not `values` is NaN."""

    def __init__(self, layer: Layer, values: np.ndarray, element: str):
        K, C, T = values.shape
        strides = {"contiguous": (C * T, T, 1), "last": (C * T, 1, C), "apart": (2 * C * T + 3, 2 * T, 2)}[layer.memory]
        room = sum((count - 1) * step for count, step in zip(values.shape, strides, strict=True)) + 1
        self.memory = arrays.narrow(np.full(layer.shift + room, np.nan), element)
        self.strides, self.address = strides, self.memory[layer.shift :].ctypes.data
        self.shape, self.shift = values.shape, layer.shift
        self.view = self.weight_in(self.memory)
        self.view[...] = arrays.narrow(values, element)

    def weight_in(self, memory: np.ndarray) -> np.ndarray:
        strides = [step * memory.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(memory[self.shift :], self.shape, strides)


class Job:
    """What packing and unpacking have in common."""

    def __init__(self, layer: Layer, rng: np.random.Generator, lib, alive: Alive | None = None):
        self.layer, self.mask = layer, Mask(layer, rng, lib, alive)
        self.rows_per_group = self.mask.rows + layer.more_rows
        self.columns = self.mask.columns + layer.more_columns
        self.shape = (layer.filters, layer.channels // layer.groups, layer.taps)
        self.live = np.broadcast_to(self.mask.live[..., None], self.shape)

    def head(self) -> tuple:
        layout = list(LAYOUTS).index(self.layer.layout)
        return (self.mask.fields, self.layer.taps, layout, self.rows_per_group, self.columns)

    def packed(self, full: np.ndarray, nothing: float) -> np.ndarray:
        """[K, C / G, taps] -> float32 [rows, taps, columns], `nothing` where there is no live kernel"""
        packed = np.full((len(self.mask.lists) * self.rows_per_group, self.layer.taps, self.columns), nothing)
        for i, (filters, channels) in enumerate(self.mask.lists):
            first = i * self.rows_per_group
            part, live = full[filters][:, channels], self.live[filters][:, channels]
            values = np.where(live, part, nothing).transpose(0, 2, 1)
            packed[first : first + len(filters), :, : len(channels)] = values
        return packed.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Pack:
    element: str  # packed
    layers: tuple[Layer, ...]
    seed: int = 0

    def __str__(self):
        return str(self.layers[0]) + (f"-and-{len(self.layers) - 1}-more" if len(self.layers) > 1 else "")

    def run(self, lib):
        rng = np.random.default_rng(self.seed)
        jobs = [Job(layer, rng, lib) for layer in self.layers]
        records, kept = np.zeros(len(jobs), PACK_JOB), []
        for i, job in enumerate(jobs):
            values = np.where(job.live, rng.standard_normal(job.shape), np.nan)
            full = Full(job.layer, values, job.layer.element)
            held = arrays.widen(full.view, job.layer.element)
            if self.element == "tf32":
                held = arrays.round_to_tf32(held)
            expected = np.ascontiguousarray(job.packed(held, 0.0).transpose(LAYOUTS[job.layer.layout]))
            packed = arrays.poison(expected.shape, self.element)
            code = ELEMENTS.index(job.layer.element)
            records[i] = (*job.head(), full.strides, code, full.address, packed.ctypes.data)
            kept.append((full, packed, expected))
        storage = "f32" if self.element == "tf32" else self.element
        lib.call("pk_pack_weights", records, len(jobs), ELEMENTS.index(storage), self.element == "tf32")
        for layer, (_, packed, expected) in zip(self.layers, kept, strict=True):
            np.testing.assert_array_equal(packed, arrays.narrow(expected, self.element), err_msg=str(layer))
            arrays.check_surroundings("pack_weights", packed)


@dataclasses.dataclass(frozen=True)
class Unpack:
    element: str  # full
    layers: tuple[Layer, ...]
    seed: int = 0

    __str__ = Pack.__str__

    def run(self, lib):
        rng = np.random.default_rng(self.seed)
        jobs = [Job(layer, rng, lib) for layer in self.layers]
        records, kept = np.zeros(len(jobs), UNPACK_JOB), []
        for i, job in enumerate(jobs):
            layer = job.layer
            scale = rng.choice([0.0, 1.0, 0.5, 2.0], layer.filters).astype(np.float32)
            live = job.live & (scale != 0)[:, None, None] if layer.scaled else job.live
            slices = [np.where(live, arrays.integers(rng, job.shape), np.nan) for _ in range(layer.splits)]
            packed = np.stack([job.packed(part, np.nan) for part in slices])
            packed = arrays.narrow(packed.transpose(0, *(1 + axis for axis in LAYOUTS[layer.layout])), layer.element)
            full = Full(layer, np.full(job.shape, np.nan), self.element)
            total = np.sum(slices, 0) * (scale[:, None, None] if layer.scaled else 1)
            memory = full.memory.copy()
            full.weight_in(memory)[...] = arrays.narrow(np.where(live, total, 0), self.element)
            guarded_scale = arrays.guarded(scale)
            records[i] = (
                *job.head(),
                full.strides,
                layer.splits,
                packed[0].size,
                ELEMENTS.index(layer.element),
                packed.ctypes.data,
                guarded_scale.ctypes.data if layer.scaled else 0,
                full.address,
            )
            kept.append((full, packed, guarded_scale, memory))
        lib.call("pk_unpack_grad_weight", records, len(jobs), ELEMENTS.index(self.element))
        for layer, (full, _, _, expected) in zip(self.layers, kept, strict=True):
            np.testing.assert_array_equal(full.memory, expected, err_msg=str(layer))  # the gaps included
            arrays.check_surroundings("unpack_grad_weight", full.memory)


class Refused:
    """cudaErrorInvalidValue for fewer rows or columns than are live, and for PackLayout::columns of several groups or
    of a gradient. No layers at all are no error."""

    def __str__(self):
        return "refused"

    def run(self, lib):
        rng = np.random.default_rng(0)
        dense = {"dead_filters": 0.0, "dead_inputs": 0.0}
        for layer in (
            Layer(more_rows=-1, **dense),
            Layer(more_columns=-1, **dense),
            Layer(groups=2, layout="columns", **dense),
        ):
            job = np.zeros(1, PACK_JOB)
            job[0] = (*Job(layer, rng, lib).head(), (1, 1, 1), 0, 0, 0)
            assert lib.status("pk_pack_weights", job, 1, 0, False)[0] == 1, str(layer)
        for layer in (Layer(more_rows=-1, **dense), Layer(more_columns=-1, **dense), Layer(layout="columns", **dense)):
            job = np.zeros(1, UNPACK_JOB)
            job[0] = (*Job(layer, rng, lib).head(), (1, 1, 1), 1, 0, 0, 0, 0, 0)
            assert lib.status("pk_unpack_grad_weight", job, 1, 0)[0] == 1, str(layer)
        assert lib.status("pk_pack_weights", np.zeros(1, PACK_JOB), 0, 0, False)[0] == 0, "no layers at all"
        assert lib.status("pk_unpack_grad_weight", np.zeros(1, UNPACK_JOB), 0, 0)[0] == 0, "no layers at all"


NOTHING_DEAD = {"dead_filters": 0.0, "dead_inputs": 0.0}


def _masks() -> list[dict]:
    """Every kind of mask table: full, pairs, all dead, ragged groups, groups that drop out."""
    return [
        NOTHING_DEAD,
        {},
        {"dead_kernels": 0.5},
        {"dead_filters": 1.0},
        {"dead_inputs": 1.0},
        {"filters": 1, "channels": 1, **NOTHING_DEAD},
        {"filters": 12, "channels": 70, "dead_kernels": 0.3},  # pairs in three words
        {"filters": 12, "channels": 8, "groups": 4},
        {"filters": 12, "channels": 12, "groups": 3, "dead_kernels": 0.5, "more_rows": 2, "more_columns": 3},
        {"filters": 8, "channels": 8, "groups": 8, "dead_filters": 0.6, "dead_inputs": 0.0},
    ]


def _many(change) -> tuple[Layer, ...]:
    """More layers than one launch takes; some are empty, one needs several blocks."""
    shapes = [
        Layer(3 + i % 5, 1 + i % 7, taps=1 + i % 2 * 8, dead_kernels=i % 3 * 0.3) for i in range(LAYERS_OF_A_LAUNCH + 5)
    ]
    shapes[4] = dataclasses.replace(shapes[4], dead_filters=1.0)
    shapes[7] = Layer(40, 70, 9)
    return tuple(change(i, layer) for i, layer in enumerate(shapes))


def _pack(element: str) -> list:
    cases = []
    for i, mask in enumerate(_masks()):
        for layout in LAYOUTS:
            if layout == "columns" and "groups" in mask:
                continue
            for taps in (1, 9):
                memory = ("contiguous", "last", "apart")[(i + taps) % 3]
                layer = Layer(taps=taps, layout=layout, memory=memory, element=ELEMENTS[i % 3], shift=i % 2)
                cases.append(Pack(element, (dataclasses.replace(layer, **mask),), i))
    for layout in ("rows", "columns"):  # the tile of threads: 32 along what is innermost, 8 across
        for inner in (31, 32, 33, 65):
            for outer in (7, 8, 9):
                filters, channels = (outer, inner) if layout == "rows" else (inner, outer)
                cases.append(Pack(element, (Layer(filters, channels, layout=layout, **NOTHING_DEAD),)))
    for memory in ("contiguous", "last", "apart"):
        for full in ELEMENTS:
            padded = Layer(20, 17, 4, memory=memory, element=full, more_rows=5, more_columns=7)
            cases.append(Pack(element, (padded,)))
            cases.append(Pack(element, (dataclasses.replace(padded, layout="columns", dead_kernels=0.2),)))
    layouts, memories = list(LAYOUTS), ("contiguous", "last", "apart")
    many = _many(
        lambda i, layer: dataclasses.replace(
            layer, layout=layouts[i % 3], memory=memories[i % 2], element=ELEMENTS[i % 3], more_columns=i % 4
        )
    )
    return [*cases, Pack(element, many)]


def _unpack(element: str) -> list:
    cases = []
    for i, mask in enumerate(_masks()):
        for layout in ("rows", "channels"):
            for taps in (1, 9):
                memory = ("contiguous", "last", "apart")[(i + taps) % 3]
                layer = Layer(taps=taps, layout=layout, memory=memory, splits=1 + i % 3, scaled=i % 2 == 1)
                cases.append(Unpack(element, (dataclasses.replace(layer, **mask),), i))
    for memory in ("contiguous", "last", "apart"):
        for packed in ELEMENTS:
            for scaled in (False, True):
                layer = Layer(20, 17, 4, memory=memory, element=packed, scaled=scaled, splits=3)
                layer = dataclasses.replace(layer, more_rows=2, more_columns=5, dead_kernels=0.2)
                cases.append(Unpack(element, (layer,)))
    for filters, channels in (
        (1023, 1),
        (1, 1024),
        (41, 25),
        (1, 1),
        (1, 3),
        (2, 2),
        (1, 5),
        (32, 64),
    ):  # spans, blocks
        for shift in (0, 1):
            cases.append(Unpack(element, (Layer(filters, channels, shift=shift, dead_filters=0.1),)))
    cases += [Unpack(element, (Layer(8, 6, taps, memory="last", splits=4),)) for taps in (1, 2, 9)]
    for i, splits in enumerate((1, 3, 4, 5, 8, 9, 16, 17, 32, 33, 35, 100)):  # slices in flight, parts, their tails
        memory = ("contiguous", "last", "apart")[i % 3]
        layer = Layer(20, 17, memory=memory, element=ELEMENTS[i // 3 % 3], splits=splits)
        cases.append(Unpack(element, (dataclasses.replace(layer, dead_kernels=0.2, scaled=i % 2 == 1),)))
    for splits, elements in itertools.product((9, 17, 33), (127, 128, 129, 255, 256, 257, 511, 512, 513)):
        cases.append(Unpack(element, (Layer(1, elements, splits=splits, dead_filters=0.0),)))  # a block's elements
    many = _many(
        lambda i, layer: dataclasses.replace(
            layer, memory=("contiguous", "last")[i % 2], splits=(1, 2, 3, 12, 40)[i % 5], scaled=i % 5 == 2
        )
    )
    return [*cases, Unpack(element, many)]


CASES: dict[str, list] = {
    **{f"pack_weights_{e}_sm80": _pack(e) for e in ("f32", "tf32", "bf16", "f16")},
    **{f"unpack_grad_weight_{e}_sm80": _unpack(e) for e in ELEMENTS},
}
CASES["pack_weights_f32_sm80"].append(Refused())
