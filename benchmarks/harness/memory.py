"""Peak memory of one run, counted in the allocations of torch's allocator: on the CPU the same number every time."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

MB = 1e6


def peak_mb(run: Callable[[], object], device: str = "cpu") -> float:
    """How far the allocated bytes rise during run(), above what was allocated before it; what it returns counts too.

    CPU: oneDNN's reordered copies are such allocations; what comes from malloc, or in a worker thread, is not seen.
    """
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / MB
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would print two lines for every profile
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
