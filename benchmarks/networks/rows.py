"""A row of network.py's results, the summary over rows, and the goals of whole networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from harness.goals import LOSS, Goal
from harness.options import MODE_OF_GEAR, mode_of_gear
from harness.stats import geomean

RATIOS = ("masked_vs_dense", "live_vs_dense", "of_limit")


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
    """Times are medians in ms, None where a contender did not run. The fields are the columns of results files."""

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
        return f" {self.masks}"

    @property
    def job(self) -> str:
        return f"{self.network} {self.masks} kept {self.kept:g}"

    @property
    def masked_vs_dense(self) -> float | None:
        return None if self.masked_ms is None else self.dense_ms / self.masked_ms

    @property
    def live_vs_dense(self) -> float | None:
        return None if self.live_ms is None else self.dense_ms / self.live_ms

    @property
    def of_limit(self) -> float | None:
        """Live mode's share of the small network's speed, which is its upper bound."""
        return None if self.live_ms is None or self.small_ms is None else self.small_ms / self.live_ms

    def flat(self) -> dict[str, object]:
        raw = {k: v for k, v in asdict(self).items() if k not in ("quartiles", "trials")}
        return raw | {name: getattr(self, name) for name in RATIOS}


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
    small_vs_dense: float | None
    of_limit: float | None
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
                masked_vs_dense=geomean(here, lambda r: r.masked_vs_dense),
                live_vs_dense=geomean(here, lambda r: r.live_vs_dense),
                small_vs_dense=geomean(here, lambda r: None if r.small_ms is None else r.dense_ms / r.small_ms),
                of_limit=geomean(here, lambda r: r.of_limit),
                worst=worst.network if worst else "-",
                worst_of_limit=worst.of_limit if worst else None,
                lost_to_dense=sum(r.live_vs_dense is not None and r.live_vs_dense < LOSS for r in here),
            )
        )
    return found


def _asks_upper_bound(r: NetworkRow) -> bool:
    return (r.direction, r.masks, r.kept) == ("train", "joint", 0.5)


def _almost_full(r: NetworkRow) -> bool:
    return r.direction == "train" and r.kept >= 0.95


GOALS = tuple(
    goal
    for device, prefix in (("cpu", ""), ("cuda", "GPU "))
    for goal in (
        Goal(
            f"{prefix}live mode, training step, joint: share of the small network's speed, each",
            0.9,
            lambda r: r.of_limit,
            _asks_upper_bound,
            each=True,
            device=device,
        ),
        Goal(
            f"{prefix}live mode, training step, almost full: over dense, each",
            LOSS,
            lambda r: r.live_vs_dense,
            _almost_full,
            each=True,
            device=device,
        ),
    )
)
