"""What only a GPU needs: runs captured as CUDA graphs, and whether the device still works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from harness.timing import WARMUPS


class Capturable(Protocol):
    def begin(self) -> None:
        """Makes what runs share from one to the next, on the current stream."""

    def rewind(self) -> None:
        """Undoes what runs have changed, in place."""

    def run(self) -> Any: ...

    def check(self, results: Any = None) -> None:
        """Raises where results are wrong."""


def capture(contender: Capturable) -> Callable[[], object]:
    """The contender's run as a CUDA graph: returns its replay, after the results of a first one were checked."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        contender.begin()  # a backward pass runs on the stream of its forward pass
        for _ in range(WARMUPS):
            contender.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):  # the outer one leaves the stream even
        results = contender.run()  # after a capture that fails
    contender.rewind()
    graph.replay()
    contender.check(results)
    return graph.replay


def alive(device: str) -> bool:
    """False after a CUDA error that sticks: every later CUDA call of this process would fail, too."""
    if device == "cpu":
        return True
    try:
        torch.cuda.synchronize()
        return torch.ones(2, device=device).sum().item() == 2
    except RuntimeError:
        return False
