"""Peak memory of one run, from the allocations of torch's allocator: the same number every time on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

MB = 1e6


def peak_mb(run: Callable[[], object], device: str = "cpu") -> float:
    """How far the allocated bytes rise during run() above those before it, its results included, in 10^6 bytes.

    On the CPU this includes oneDNN's reordered copies; memory from malloc, or taken by a worker thread, is not seen.
    """
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / MB
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # without it every profile prints two lines
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        results = run()  # held until the profile ends, as autograd's caller would
    del results
    recorded = profiled.profiler.kineto_results.events()
    changes = sorted(((e.start_ns(), e.nbytes()) for e in recorded if e.name() == "[memory]"), key=lambda c: c[0])
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak / MB
