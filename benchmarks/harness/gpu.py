"""What only a GPU needs: runs recorded as CUDA graphs, ceilings to hold times against, and whether it still lives."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Protocol

import torch

from harness.timing import WARMUPS, Clock
from layers.baselines import Wrong

Run = Callable[[], object]


class Recordable(Protocol):
    """Who can be recorded: a rival of conv.py's or of network.py's."""

    ours: bool
    direction: str
    problem: Any

    def begin(self) -> None: ...
    def rewind(self) -> None: ...
    def run(self) -> Any: ...
    def check(self, results: Any = None) -> None: ...


def record(rival: Recordable) -> Run:
    """The rival's run as a graph, whose results have been checked too."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        rival.begin()  # a backward pass runs on the stream of its forward pass
        for _ in range(WARMUPS):
            rival.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):  # the outer one leaves the stream even
        results = rival.run()  # after a capture that fails
    rival.rewind()
    graph.replay()
    rival.check(results)
    return graph.replay


def recorded(rivals: Mapping[str, Any]) -> dict[str, Run] | None:
    """Everybody's graph; None if there is somebody who cannot be recorded, for then all are timed call by call."""
    runs: dict[str, Run] = {}
    for key, rival in rivals.items():
        try:
            runs[key] = record(rival)
        except Exception as error:
            if isinstance(error, Wrong) and rival.ours:
                raise Wrong(f"{error}, replayed from a CUDA graph") from None
            torch.cuda.synchronize()  # if the device is gone, say so here
            what = f"{rival.problem.format()}: {key}, {rival.direction}"
            print(f"warning: {what}: no CUDA graph, {type(error).__name__}: {error}; calls are timed", file=sys.stderr)
            for other in rivals.values():
                other.begin()  # back on the ordinary stream
            return None
    return runs


def alive(device: str) -> bool:
    """False after an error that sticks: every later call of this process would fail."""
    if device == "cpu":
        return True
    try:
        torch.cuda.synchronize()
        return torch.ones(2, device=device).sum().item() == 2
    except RuntimeError:
        return False


@cache
def driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


@cache
def ceilings(dtype: torch.dtype) -> dict[str, float]:
    """What the card gives: a copy, bytes read and written; a product of matrices, random ones, for zeros are faster."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    size = 8192 if dtype != torch.float32 else 4096
    matrix = torch.randn(size, size, device="cuda", dtype=dtype)
    copy = _median(lambda: target.copy_(source))
    product = _median(lambda: matrix @ matrix)
    return {"copy GB/s": round(2 * 2**30 / copy / 1e6), "matrix TFLOP/s": round(2 * size**3 / product / 1e9, 1)}


def _median(run: Run) -> float:
    clock = Clock("cuda")
    return statistics.median([clock(run) for _ in range(WARMUPS + 7)][WARMUPS:])
