"""A row of network.py's results, the summary over rows, and the goals of whole networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from typing import Any

from harness.goals import LOSS, Goal
from harness.options import MODE_OF_GEAR, mode_of_gear
from harness.stats import geomean

TO_DENSE = ("masked_vs_dense", "live_vs_dense", "compacted_vs_dense", "best_vs_dense")
TO_SMALL = ("of_limit", "compacted_of_small", "compiled_of_small", "best_of_small")
RATIOS = (*TO_DENSE, *TO_SMALL)
FORMS = {"dense_ms": "eager", "dense_compile_ms": "compiled", "dense_fp32_ms": "float32"}
OURS = {"masked_ms": "masked", "live_ms": "live", "compacted_ms": "compacted", "compacted_compile_ms": "compiled"}
SMALL = ("small_ms", "small_compile_ms")


def renewed(entry: dict[str, Any]) -> dict[str, Any]:
    """A row of an older results file under today's names: network_ms is live_ms, "network/nchw" is "live/nchw"."""
    for old, new in MODE_OF_GEAR.items():
        for suffix in ("_ms", "_peak_mb"):
            if old + suffix in entry:
                entry[new + suffix] = entry.pop(old + suffix)
    for detail in ("quartiles", "trials"):
        entry[detail] = {mode_of_gear(key): value for key, value in entry.get(detail, {}).items()}
    return entry


@dataclass(frozen=True)
class NetworkRow:
    """Times are medians in ms, None where a contender did not run. The fields are the columns of results files.

    What is over dense is over the fastest dense of the row: eager or compiled, in either layout, in the row's dtype, or
    eager in float32.
    """

    network: str
    batch: int
    masks: str
    kept: float  # keep ratio
    direction: str  # "train" or "infer"
    dense_ms: float
    masked_ms: float | None
    live_ms: float | None
    small_ms: float | None
    layouts: str  # the faster of each, in the order of the times; nhwc: channels_last
    rounds: int
    optimizer: str  # of masked and live mode
    dense_peak_mb: float | None = None
    masked_peak_mb: float | None = None
    live_peak_mb: float | None = None
    small_peak_mb: float | None = None
    compacted_ms: float | None = None
    compacted_peak_mb: float | None = None
    dense_compile_ms: float | None = None
    compacted_compile_ms: float | None = None
    small_compile_ms: float | None = None
    dense_fp32_ms: float | None = None
    quartiles: dict[str, list[float]] = field(default_factory=dict)  # "live/nchw": [first, median, third]
    trials: dict[str, float] = field(default_factory=dict)  # ms of one run, both layouts, before the rounds
    dtype: str = "float32"
    device: str = "cpu"
    clock: str = "wall"

    @property
    def times(self) -> int:
        return 1

    @property
    def label(self) -> str:
        return self.network

    @property
    def which(self) -> str:
        return f" {self.masks}{other_dtype(self.dtype)}"

    @property
    def job(self) -> str:
        return job_name(self.network, self.masks, self.kept, self.dtype)

    def faster(self, fields: Iterable[str]) -> tuple[str, float] | None:
        """The field with the shortest time and the time; None where none of them ran."""
        times = [(ms, name) for name in fields if (ms := getattr(self, name)) is not None]
        return min(times)[::-1] if times else None

    def over(self, fields: Sequence[str], other: Iterable[str]) -> float | None:
        """The shortest time of `other` over that of `fields`."""
        ours, theirs = self.faster(fields), self.faster(other)
        return None if ours is None or theirs is None else theirs[1] / ours[1]

    @property
    def fastest_dense(self) -> str:
        """Which form of the dense network is the fastest: "eager", "compiled" or, beside another dtype, "float32"."""
        found = self.faster(FORMS)
        assert found is not None
        return FORMS[found[0]]

    @property
    def best(self) -> str | None:
        """Which of our modes is the fastest; "compiled": compacted mode, compiled."""
        found = self.faster(OURS)
        return None if found is None else OURS[found[0]]

    @property
    def masked_vs_dense(self) -> float | None:
        return self.over(["masked_ms"], FORMS)

    @property
    def live_vs_dense(self) -> float | None:
        return self.over(["live_ms"], FORMS)

    @property
    def compacted_vs_dense(self) -> float | None:
        """In its faster form."""
        return self.over(["compacted_ms", "compacted_compile_ms"], FORMS)

    @property
    def best_vs_dense(self) -> float | None:
        return self.over(list(OURS), FORMS)

    @property
    def of_limit(self) -> float | None:
        """Live mode's share of the small network's speed, which is its upper bound."""
        return self.over(["live_ms"], ["small_ms"])

    @property
    def compacted_of_small(self) -> float | None:
        return self.over(["compacted_ms"], ["small_ms"])

    @property
    def compiled_of_small(self) -> float | None:
        """Compacted mode and small network, both compiled."""
        return self.over(["compacted_compile_ms"], ["small_compile_ms"])

    @property
    def best_of_small(self) -> float | None:
        """Both in their fastest forms."""
        return self.over(list(OURS), SMALL)

    @property
    def compacted_vs_live(self) -> float | None:
        return self.over(["compacted_ms", "compacted_compile_ms"], ["live_ms"])

    def flat(self) -> dict[str, object]:
        raw = {k: v for k, v in asdict(self).items() if k not in ("quartiles", "trials")}
        return raw | {name: getattr(self, name) for name in ("fastest_dense", "best", *RATIOS)}


def other_dtype(dtype: str) -> str:
    """What the name of a row says of its dtype."""
    return "" if dtype == "float32" else f" {dtype}"


def job_name(network: str, masks: str, kept: float, dtype: str) -> str:
    return f"{network} {masks} kept {kept:g}{other_dtype(dtype)}"


@dataclass(frozen=True)
class NetworkSummary:
    """All networks of one dtype, masks, pass and keep ratio (kept)."""

    dtype: str
    masks: str
    direction: str
    kept: float
    networks: int
    masked_vs_dense: float | None
    live_vs_dense: float | None
    compacted_vs_dense: float | None
    best_vs_dense: float | None
    small_vs_dense: float | None
    of_limit: float | None
    compacted_of_small: float | None
    compiled_of_small: float | None
    best_of_small: float | None
    worst: str
    worst_of_limit: float | None
    lost_to_dense: int  # networks where live mode is slower than dense


def summarise(rows: Sequence[NetworkRow]) -> list[NetworkSummary]:
    found = []
    for key in dict.fromkeys((r.dtype, r.masks, r.direction, r.kept) for r in rows):
        here = [r for r in rows if (r.dtype, r.masks, r.direction, r.kept) == key]
        limited = [r for r in here if r.of_limit is not None]
        worst = min(limited, key=lambda r: r.of_limit or 0, default=None)
        found.append(
            NetworkSummary(
                *key,
                networks=len(here),
                small_vs_dense=geomean(here, lambda r: r.over(SMALL, FORMS)),
                **{ratio: geomean(here, attrgetter(ratio)) for ratio in RATIOS},
                worst=worst.network if worst else "-",
                worst_of_limit=worst.of_limit if worst else None,
                lost_to_dense=sum(r.live_vs_dense is not None and r.live_vs_dense < LOSS for r in here),
            )
        )
    return found


def goal_row(direction: str, masks: str, kept: float) -> bool:
    """Whether most goals are about such a row."""
    return (direction, masks, kept) == ("train", "joint", 0.5)


def _half(r: NetworkRow) -> bool:
    return goal_row(r.direction, r.masks, r.kept)


def _almost_full(r: NetworkRow) -> bool:
    return r.direction == "train" and r.kept >= 0.95


def _resnet18(dtype: str) -> Callable[[NetworkRow], bool]:
    return lambda r: _half(r) and (r.network, r.dtype) == ("resnet18", dtype)


# What it says, the target, the ratio, the rows that it is about.
_GOALS: tuple[tuple[str, float, str, Callable[[NetworkRow], bool]], ...] = (
    ("live mode, training step, joint: share of the small network's speed, each", 0.9, "of_limit", _half),
    ("masked mode, training step, joint: over dense, each", 1.0, "masked_vs_dense", _half),
    ("live mode, training step, joint: over dense, each", 1.0, "live_vs_dense", _half),
    ("live mode, training step, almost full: over dense, each", LOSS, "live_vs_dense", _almost_full),
    ("compacted, training step, joint: share of the small network's speed, each", LOSS, "compacted_of_small", _half),
    ("compacted, training step, joint: the same, both compiled, each", LOSS, "compiled_of_small", _half),
    ("best mode, training step, joint: share of the small network's best form, each", 1.0, "best_of_small", _half),
    ("best mode, ResNet-18, training step, joint, fp32: over dense", 2.9, "best_vs_dense", _resnet18("float32")),
    ("best mode, ResNet-18, training step, joint, bf16: over dense", 2.6, "best_vs_dense", _resnet18("bfloat16")),
    ("compacted mode in its faster form, training step, joint: over live mode, each", 1.0, "compacted_vs_live", _half),
)
GOALS = tuple(
    Goal(f"{prefix}{text}", target, attrgetter(ratio), wanted, each=True, device=device)
    for device, prefix in (("cpu", ""), ("cuda", "GPU "))
    for text, target, ratio, wanted in _GOALS
)
