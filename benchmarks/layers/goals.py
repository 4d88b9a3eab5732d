"""The goals of single layers."""

from __future__ import annotations

from harness.goals import LOSS, Goal
from layers.problems import Problem
from layers.rows import Row


def _training(r: Row) -> bool:
    return r.direction == "fwd+bwd"


def _filters(r: Row) -> bool:
    return r.mask == "filter" and _training(r)


def _asks_upper_bound(r: Row) -> bool:
    return _filters(r) and r.side == "both" and r.kept in (0.7, 0.5, 0.3)


def _kernels(r: Row) -> bool:
    return r.mask == "kernel" and _training(r)


def _kernels_3x3(r: Row, kept: float) -> bool:
    return _kernels(r) and r.kept == kept and Problem.parse(r.problem).taps == 3


def _bf16_channels_last(r: Row) -> bool:
    return (r.dtype, r.layout) == ("bfloat16", "channels_last")


def _gpu_layers(r: Row) -> bool:
    return _asks_upper_bound(r) and _bf16_channels_last(r)


def _blocks(r: Row) -> bool:
    return r.mask == "block" and r.density < 1 and _training(r) and _bf16_channels_last(r)


GOALS = (
    Goal("filters in and out: share of limit, mean", 0.85, lambda r: r.of_limit, _asks_upper_bound),
    Goal("filters in and out: share of limit, each", 0.6, lambda r: r.of_limit, _asks_upper_bound, each=True),
    Goal("filters: over dense, each", LOSS, lambda r: r.vs_dense, _filters, each=True),
    Goal("kernels 3x3: over dense, mean", 1, lambda r: r.vs_dense, lambda r: _kernels_3x3(r, 0.5)),
    Goal("kernels 3x3: over dense, mean", 3, lambda r: r.vs_dense, lambda r: _kernels_3x3(r, 0.15)),
    Goal("kernels 3x3: over dense, mean", 5, lambda r: r.vs_dense, lambda r: _kernels_3x3(r, 0.05)),
    Goal("kernels 3x3: over dense, each", LOSS, lambda r: r.vs_dense, lambda r: _kernels_3x3(r, 0.5), each=True),
    Goal("kernels 3x3: over SparseProp, mean", 5, lambda r: r.vs_sparseprop, lambda r: _kernels_3x3(r, 0.15)),
    Goal("kernels: over SparseProp, each", LOSS, lambda r: r.vs_sparseprop, _kernels, each=True),
    Goal("bf16 blocks: over dense x density, mean", 0.6, lambda r: r.vs_dense * r.density, _blocks),
    Goal(
        "overhead: time over dense's, without its noise, each",
        1.02,
        lambda r: 1 / r.vs_dense / (r.noise or 1),
        lambda r: _training(r) and r.kept >= 0.9,
        each=True,
        at_most=True,
    ),
    Goal("peak memory over dense's, each", 1.1, lambda r: r.of_dense_peak, _training, each=True, at_most=True),
    Goal(
        "GPU bf16 filters in and out: over compaction, mean", 1.3, lambda r: r.vs_compaction, _gpu_layers, device="cuda"
    ),
    Goal("GPU bf16 filters in and out: share of limit, mean", 0.85, lambda r: r.of_limit, _gpu_layers, device="cuda"),
    Goal("GPU any mask: over dense, each", LOSS, lambda r: r.vs_dense, _training, each=True, device="cuda"),
    Goal("GPU bf16 blocks: over dense x density, mean", 0.7, lambda r: r.vs_dense * r.density, _blocks, device="cuda"),
)
