"""A row of network.py's results, the summary over rows, and the goals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from layers.goals import LOSS, Goal
from layers.rows import geomean

RATIOS = ("layer_vs_dense", "network_vs_dense", "of_limit")


@dataclass(frozen=True)
class NetworkRow:
    """One network, masks, kept share and pass. Times are medians in ms, None where somebody did not run."""

    network: str
    batch: int
    masks: str
    kept: float
    direction: str  # "train" or "infer"
    dense_ms: float
    layer_ms: float | None
    network_ms: float | None
    small_ms: float | None
    layouts: str  # the faster of each, in the order of the times; nhwc: channels_last
    rounds: int
    optimizer: str  # of the gears
    dense_peak_mb: float | None = None
    layer_peak_mb: float | None = None
    network_peak_mb: float | None = None
    small_peak_mb: float | None = None
    quartiles: dict[str, list[float]] = field(default_factory=dict)  # "network/nchw": [first, median, third]
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
    def layer_vs_dense(self) -> float | None:
        return None if self.layer_ms is None else self.dense_ms / self.layer_ms

    @property
    def network_vs_dense(self) -> float | None:
        return None if self.network_ms is None else self.dense_ms / self.network_ms

    @property
    def of_limit(self) -> float | None:
        """The network gear's share of the small network's speed."""
        return None if self.network_ms is None or self.small_ms is None else self.small_ms / self.network_ms

    def flat(self) -> dict[str, object]:
        raw = {k: v for k, v in asdict(self).items() if k not in ("quartiles", "trials")}
        return raw | {name: getattr(self, name) for name in RATIOS}


@dataclass(frozen=True)
class NetworkSummary:
    """All networks of one dtype, masks, pass and kept share."""

    dtype: str
    masks: str
    direction: str
    kept: float
    networks: int
    layer_vs_dense: float | None
    network_vs_dense: float | None
    small_vs_dense: float | None
    of_limit: float | None
    worst: str
    worst_of_limit: float | None
    lost_to_dense: int  # networks where the network gear is slower than dense


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
                layer_vs_dense=geomean(here, lambda r: r.layer_vs_dense),
                network_vs_dense=geomean(here, lambda r: r.network_vs_dense),
                small_vs_dense=geomean(here, lambda r: None if r.small_ms is None else r.dense_ms / r.small_ms),
                of_limit=geomean(here, lambda r: r.of_limit),
                worst=worst.network if worst else "-",
                worst_of_limit=worst.of_limit if worst else None,
                lost_to_dense=sum(r.network_vs_dense is not None and r.network_vs_dense < LOSS for r in here),
            )
        )
    return found


def _limit_is_asked(r: NetworkRow) -> bool:
    return (r.direction, r.masks, r.kept) == ("train", "joint", 0.5)


def _almost_full(r: NetworkRow) -> bool:
    return r.direction == "train" and r.kept >= 0.95


GOALS = tuple(
    goal
    for device, prefix in (("cpu", ""), ("cuda", "GPU "))
    for goal in (
        Goal(
            f"{prefix}network gear, training step, joint: share of the small network's speed, each",
            0.9,
            lambda r: r.of_limit,
            _limit_is_asked,
            each=True,
            device=device,
        ),
        Goal(
            f"{prefix}network gear, training step, almost full: over dense, each",
            LOSS,
            lambda r: r.network_vs_dense,
            _almost_full,
            each=True,
            device=device,
        ),
    )
)
