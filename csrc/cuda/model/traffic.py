"""What kernels move, counted in the emulator: sectors of global memory, wavefronts of shared memory, tensor-core
products. Problems are cut to few images, and what is counted grows with their number."""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "python_tests"))
from cases.emulated import arrays, build
from cases.emulated import pack_weights as packs
from cases.emulated.igemm_problems import ChannelLists, Problem, packed_count

FIELDS = (
    "load_requests", "load_sectors", "loaded_sectors", "store_requests", "store_sectors", "distinct_sectors",
    "shared_wavefronts", "least_wavefronts", "products",
)  # fmt: skip
BF16 = 1  # of enum Element
SECTOR = 32


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one launch. As in emulator/traffic.cpp; loaded_sectors: what blocks ask the L2 cache for."""

    load_requests: float = 0
    load_sectors: float = 0
    loaded_sectors: float = 0
    store_requests: float = 0
    store_sectors: float = 0
    distinct_sectors: float = 0
    shared_wavefronts: float = 0
    least_wavefronts: float = 0
    products: float = 0

    def times(self, factor: float) -> Traffic:
        return Traffic(*(value * factor for value in dataclasses.astuple(self)))

    @property
    def conflicts(self) -> float:
        """Wavefronts of shared memory over the least that the same accesses take."""
        return self.shared_wavefronts / self.least_wavefronts if self.least_wavefronts else 1.0


def count(family: str, name: str, *arguments: Any, memory: Sequence[np.ndarray] = ()) -> Traffic:
    """The traffic of one call of an exported launcher. memory: the arrays that count; those among the arguments."""
    library = build.load(family, counted=True)
    found = list(memory) or [a for a in arguments if isinstance(a, np.ndarray)]
    begins = np.array([a.ctypes.data for a in found], np.uint64)
    sizes, result = np.array([a.nbytes for a in found], np.int64), np.zeros(len(FIELDS), np.int64)
    machine = library.machine
    machine.pk_traffic_begin(_pointer(begins), _pointer(sizes), len(found))
    try:
        library.call(name, *arguments)
    finally:
        machine.pk_traffic_end(_pointer(result))
    return Traffic(**dict(zip(FIELDS, result.tolist(), strict=True)))


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def spread(live: int, channels: int, runs: bool) -> ChannelLists:
    """Channels that live at random, alone or in runs of eight (which vectors serve)."""
    rng, width = np.random.default_rng(channels), 8 if runs else 1
    alive = np.zeros(channels // width, bool)
    alive[rng.permutation(channels // width)[: live // width]] = True
    return ChannelLists(np.repeat(alive, width), np.zeros(channels, bool), "bf16")


def _zeros(*shape: int) -> np.ndarray:
    return arrays.guarded(np.zeros(shape, np.uint16))


def convolution(problem: Problem, filters: ChannelLists, inputs: ChannelLists, grad_input: bool, tile: int) -> Traffic:
    """igemm_fwd or igemm_grad_input of a problem in bfloat16."""
    x, y = _images(problem)
    source, target = (filters, inputs) if grad_input else (inputs, filters)
    weight = _zeros(target.live, problem.r * problem.s, packed_count(source.live))
    operand, result = (y, x) if grad_input else (x, y)
    return count(
        "igemm", "pk_igemm", grad_input, problem.sizes(), BF16, False, tile, operand, operand.shape[-1], source.live,
        source.index, source.vectors, weight, None, result, result.shape[-1], target.live, target.index, target.slot,
        None, None, 0,
    )  # fmt: skip


def weight_gradient(problem: Problem, filters: ChannelLists, inputs: ChannelLists, tile: int, splits: int) -> Traffic:
    x, y = _images(problem)
    partial = arrays.guarded(
        np.zeros((splits, filters.live, problem.r * problem.s, packed_count(inputs.live)), np.float32)
    )
    return count(
        "igemm_grad_weight", "pk_igemm_grad_weight", problem.sizes(), BF16, False, tile, splits, y, y.shape[-1],
        filters.live, filters.index, filters.vectors, x, x.shape[-1], inputs.live, inputs.index, inputs.vectors,
        partial, None, None, 0,
    )  # fmt: skip


def unpacked(problem: Problem, filters: ChannelLists, inputs: ChannelLists, splits: int) -> Traffic:
    """unpack_grad_weight from slices of floats into a bfloat16 gradient."""
    layer = packs.Layer(problem.k, problem.c, problem.r * problem.s, splits=splits)
    alive = filters.slot >= 0, inputs.slot >= 0
    job = packs.Job(layer, np.random.default_rng(0), build.load("pack_weights", counted=True), alive)
    rows, columns = job.mask.rows, packed_count(job.mask.columns)
    packed = arrays.guarded(np.zeros((splits, rows, layer.taps, columns), np.float32))
    full, record = _zeros(*job.shape), np.zeros(1, packs.UNPACK_JOB)
    head, strides = (*job.head()[:-1], columns), (problem.c * layer.taps, layer.taps, 1)
    record[0] = (*head, strides, splits, packed[0].size, 0, packed.ctypes.data, 0, full.ctypes.data)
    return count("pack_weights", "pk_unpack_grad_weight", record, 1, BF16, memory=(packed, full, job.mask.table))


def channel_copy(gather: bool, images: int, pixels: int, lists: ChannelLists) -> Traffic:
    """gather_channels or scatter_channels, channels_last, of 2-byte elements."""
    channels = len(lists.slot)
    full, compact, granule = (
        _zeros(images, pixels, channels),
        _zeros(images, pixels, lists.live),
        np.zeros(1, np.int64),
    )
    build.load("channels", counted=True).call("pk_channel_granule", lists.index, lists.live, channels, granule)
    moved = (images, pixels, channels, lists.live, 2, True, int(granule[0]))
    if gather:
        return count("channels", "pk_gather_channels", full, lists.index, compact, *moved)
    return count("channels", "pk_scatter_channels", compact, lists.slot, full, *moved)


def join(images: int, pixels: int, a: ChannelLists, b: ChannelLists) -> Traffic:
    """join of two bfloat16 tensors of live channels, channels_last."""
    channels = len(a.slot)
    operands = _zeros(images, pixels, a.live), a.slot, _zeros(images, pixels, b.live), b.slot
    result = _zeros(images, pixels, channels)
    return count("channels", "pk_join", *operands, result, images, pixels, a.live, b.live, channels, BF16, True, 1.0)


def norm_forward(pixels: int, channels: int, adds: bool) -> tuple[Traffic, Traffic]:
    """A batch norm with a relu behind it, adds: behind the sum with another tensor: its sums, and its values."""
    problem, lists, x, floats = _norm(pixels, channels)
    mean, invstd, scale, offset = (floats(channels) for _ in range(4))
    sums = count(
        "batch_norm", "pk_batch_norm", *problem, *lists, None, None, None, None, True, 0.1, 1e-5, x, None, mean, invstd,
        scale, offset, _workspace(problem), memory=[x],
    )  # fmt: skip
    other, y = _zeros(pixels, channels), _zeros(pixels, channels)
    values = count(
        "batch_norm", "pk_batch_norm_apply", *problem, *lists, mean, scale, offset, x, other if adds else None, True, y,
        memory=[x, other, y],
    )  # fmt: skip
    return _in_vectors(sums, problem, 1), _in_vectors(values, problem, 1 + adds)


def norm_backward(pixels: int, channels: int) -> tuple[Traffic, Traffic]:
    """Of a norm with a relu behind it: sums, and the gradient, which read the same and alone writes."""
    problem, lists, x, floats = _norm(pixels, channels)
    mean, invstd, scale, offset, grad_weight, grad_bias = (floats(channels) for _ in range(6))
    grad, grad_x = _zeros(pixels, channels), _zeros(pixels, channels)
    both = count(
        "batch_norm", "pk_batch_norm_backward", *problem, *lists, None, mean, invstd, True, scale, offset, grad, x,
        grad_x, grad_weight, grad_bias, _workspace(problem), memory=[grad, x, grad_x],
    )  # fmt: skip
    loads = {name: getattr(both, name) / 2 for name in ("load_sectors", "loaded_sectors")}
    shared = {name: getattr(both, name) for name in ("shared_wavefronts", "least_wavefronts")}
    stores = {"store_requests": both.store_requests, "store_sectors": both.store_sectors}
    parts = (
        Traffic(**loads, **shared, distinct_sectors=both.distinct_sectors - both.store_sectors),
        Traffic(**loads, **stores, distinct_sectors=both.distinct_sectors),
    )
    return _in_vectors(parts[0], problem, 2), _in_vectors(parts[1], problem, 2)


def _in_vectors(moved: Traffic, problem: tuple[int, int, int], tensors: int) -> Traffic:
    """Loads counted as the GPU makes them: the emulator loads the lanes of a struct one by one."""
    _, pixels, channels = problem
    return dataclasses.replace(moved, load_requests=tensors * pixels * channels / (32 * (1 if channels % 8 else 8)))


def _norm(pixels: int, channels: int) -> tuple[Any, Any, np.ndarray, Any]:
    index = np.arange(channels, dtype=np.int32)
    return (BF16, pixels, channels), (index, index), _zeros(pixels, channels), lambda n: np.zeros(n, np.float32)


def _workspace(problem: tuple[int, int, int]) -> np.ndarray:
    floats = np.zeros(1, np.int64)
    build.load("batch_norm", counted=True).call("pk_batch_norm_workspace", *problem, floats)
    return np.zeros(int(floats[0]), np.float32)


def tile_of(pixels: int, channels: int, vectors: bool, multiprocessors: int) -> int:
    """What igemm_tile chooses, as a number of enum IgemmTile."""
    tile = np.zeros(1, np.int32)
    build.load("igemm", counted=True).call("pk_igemm_tile", pixels, channels, vectors, 0, multiprocessors, True, tile)
    return int(tile[0])


def grad_weight_plan(problem: Problem, filters: int, channels: int, multiprocessors: int) -> tuple[int, int]:
    """What plan_grad_weight chooses: the tile and the number of slices."""
    plan = np.zeros(3, np.int64)
    library = build.load("igemm_grad_weight", counted=True)
    library.call("pk_plan_grad_weight", problem.sizes(), BF16, filters, channels, multiprocessors, plan)
    return int(plan[0]), int(plan[1])


def _images(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """x and y of a problem, channels_last."""
    sizes = problem.sizes()
    return _zeros(problem.n, problem.h, problem.w, problem.c), _zeros(problem.n, *map(int, sizes[7:9]), problem.k)
