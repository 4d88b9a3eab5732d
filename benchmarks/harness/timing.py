"""Interleaved timing: every run once per round, in shuffled order; medians and quartiles over the rounds."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

import prunekernels as pk

WARMUPS = 2
MIN_ROUNDS = 5
MAX_ROUNDS = 60
FLUSH_BYTES = 256 << 20  # more than any L2


@dataclass(frozen=True)
class Timing:
    """Milliseconds."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    rounds: int


class Clock:
    """Returns the milliseconds that one call takes; on CUDA between events, after overwriting the L2 cache."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if self.cuda else None

    def __call__(self, run: Callable[[], object]) -> float:
        if self.flush is None:
            before = time.perf_counter()
            run()
            return (time.perf_counter() - before) * 1e3
        self.flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def summarise(samples: list[float]) -> Timing:
    several = samples if len(samples) > 1 else samples * 2  # Python < 3.13 needs two
    low, median, high = statistics.quantiles(several, n=4, method="inclusive")
    return Timing(median, low, high, len(samples))


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    device: str,
    seconds: float,
    rounds: int | None = None,
    warmups: int = WARMUPS,
) -> dict[str, Timing]:
    """Times all `runs` side by side, by name.

    Each runs `rounds` times, or MIN_ROUNDS to MAX_ROUNDS times, as many as fit into about `seconds`; without `rounds`
    at least one of the `warmups` is needed to tell how many fit.
    """
    clock = Clock(device)
    for run in runs.values():
        pk.plan.settle(run)
    start = time.perf_counter()
    for _ in range(warmups):
        round_start = time.perf_counter()
        for run in runs.values():
            clock(run)
        round_seconds = time.perf_counter() - round_start
    if rounds is None:
        left = seconds - (time.perf_counter() - start)
        rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(left / max(round_seconds, 1e-6))))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    # In a fixed order each run would always find in the cache what the same other run has left there.
    order, shuffle = list(runs), random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                samples[name].append(clock(runs[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: summarise(values) for name, values in samples.items()}
