"""What is timed in one row: ours and the baselines. Each is checked first, then all are timed side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar

import torch

from harness.gpu import Capturable, alive, capture
from harness.timing import Timing, interleaved


class Wrong(Exception):
    """A result that differs from the reference's."""


class Contender(Capturable, Protocol):
    """An implementation in one memory layout, set up for one direction; see layers/ and networks/baselines.py."""

    family: str  # contenders of one family differ in their layout alone
    layout: str
    ours: bool
    direction: str
    problem: Any  # format() names it


AnyContender = TypeVar("AnyContender", bound=Contender)


def checked(
    entries: Iterable[tuple[Any, str]],
    make: Callable[[Any, str], AnyContender],
    problem: str,
    args: Any,
    direction: str,
) -> dict[str, AnyContender]:
    """The contenders whose results are right, by "family/layout".

    entries: class and layout of each; make(class, layout) makes one and checks it. A baseline that is wrong or fails
    is left out, with a warning; an error of ours, or one that has cost the device, is raised.
    """
    found: dict[str, AnyContender] = {}
    for kind, layout in entries:
        try:
            found[f"{kind.family}/{layout}"] = make(kind, layout)
        except Exception as error:
            if kind.ours or not alive(args.device):
                raise
            what = f"{problem}: {kind.family} ({layout}), {direction} failed, {type(error).__name__}: "
            print(f"warning: {'' if isinstance(error, Wrong) else what}{error}; left out", file=sys.stderr)
    return found


def timed(
    contenders: Mapping[str, Contender], args: Any, seconds: float, rounds: int | None, **options: Any
) -> tuple[dict[str, Timing], str]:
    """The times of all contenders, and the clock: "wall", "events", or "graph" for replays of CUDA graphs."""
    graphs = captured(contenders) if args.device == "cuda" and args.clock == "graph" else None
    clock = "wall" if args.device == "cpu" else "events" if graphs is None else "graph"
    runs = graphs or {key: c.run for key, c in contenders.items()}
    return interleaved(runs, args.device, seconds, rounds, **options), clock


def captured(contenders: Mapping[str, Contender]) -> dict[str, Callable[[], object]] | None:
    """A CUDA graph of each contender; None if one of them cannot be captured, since then the calls of all are timed."""
    runs: dict[str, Callable[[], object]] = {}
    for key, contender in contenders.items():
        try:
            runs[key] = capture(contender)
        except Exception as error:
            if isinstance(error, Wrong) and contender.ours:
                raise Wrong(f"{error}, replayed from a CUDA graph") from None
            torch.cuda.synchronize()  # a lost device raises here
            what = f"{contender.problem.format()}: {key}, {contender.direction}"
            print(f"warning: {what}: no CUDA graph, {type(error).__name__}: {error}; calls are timed", file=sys.stderr)
            for other in contenders.values():
                other.begin()  # back on the ordinary stream
            return None
    return runs


def fastest(timings: Mapping[str, Timing], family: str) -> str:
    """The key "family/layout" of the family's faster layout."""
    return min((key for key in timings if key.split("/")[0] == family), key=lambda key: timings[key].median)


def quartiles(timings: Mapping[str, Timing]) -> dict[str, list[float]]:
    return {key: [t.low, t.median, t.high] for key, t in timings.items()}
