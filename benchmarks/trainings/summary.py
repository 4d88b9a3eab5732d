"""Means over the seeds of rows of methods.py, and each method against its baselines, seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from harness.paired import Paired, paired
from harness.report import text_table
from trainings.rows import TrainingRow


@dataclass(frozen=True)
class Summary:
    """All seeds of one setting. Accuracies in %, differences in points.

    over_*: the accuracy less that of a baseline with the same seed. scratch: the small network from new weights, as
    many epochs; scratch_time: for at least as long; literal: the method to its paper's letter; uniform: the rate of all
    layers that leaves as many multiply-adds.
    """

    arch: str
    kind: str
    method: str
    rate: float
    duty: float
    options: str
    seeds: int
    accuracy: float
    spread: float  # the best seed's less the worst's
    vs_dense: float  # time of the fastest dense training, by its steps beside ours, / ours: above 1 ours is faster
    vs_fp32: float  # the same, of dense training in float32
    came_back: float | None  # share of the soft-dead filters that an epoch brings back, mean of the first half
    came_back_by_epoch: list[float | None]
    multiply_adds: float  # of the small network, as share of dense
    parameters: float
    latency_1: float  # dense's forward pass / the small network's, with 1 image
    latency_64: float
    scratch: float | None  # its accuracy
    over_scratch: Paired | None
    scratch_epochs: float | None  # of scratch_time
    over_scratch_time: Paired | None
    over_literal: Paired | None
    time_of_literal: float | None  # our time / that of literal, each over dense training beside it
    over_uniform: Paired | None

    @property
    def label(self) -> str:
        return f"{self.arch} {self.method}"


Setting = tuple[str, str, str, float, float, str]


def setting_of(row: TrainingRow) -> Setting:
    options = " ".join(f"{name}={value}" for name, value in row.options.items())
    return row.arch, row.kind, row.method, row.rate, row.duty, options


def summarise(rows: Sequence[TrainingRow]) -> list[Summary]:
    """The summaries of all runs but those from scratch, which are baselines of others."""
    settings = dict.fromkeys(setting_of(row) for row in rows if row.kind != "scratch")
    return [_summary(setting, [row for row in rows if setting_of(row) == setting], rows) for setting in settings]


def _summary(setting: Setting, here: Sequence[TrainingRow], rows: Sequence[TrainingRow]) -> Summary:
    points = [100 * row.accuracy for row in here]
    shares = [row.came_back_early for row in here if row.came_back_early is not None]
    is_method = setting[1] == "method"
    scratch = _pairs(here, rows, _is_scratch) if is_method else []
    longer = _pairs(here, rows, _is_scratch_time) if is_method else []
    literal = _pairs(here, rows, _is_literal) if is_method else []
    uniform = _pairs(here, rows, _is_uniform) if setting[1] == "budget" else []
    of_literal = [(row.seconds / row.dense_seconds) / (other.seconds / other.dense_seconds) for row, other in literal]
    return Summary(
        *setting,
        seeds=len(here),
        accuracy=statistics.mean(points),
        spread=max(points) - min(points),
        vs_dense=_geomean(row.dense_seconds / row.seconds for row in here),
        vs_fp32=_geomean(row.fp32_seconds / row.seconds for row in here),
        came_back=statistics.mean(shares) if shares else None,
        came_back_by_epoch=came_back_by_epoch(here),
        multiply_adds=statistics.mean(row.multiply_adds / row.dense_multiply_adds for row in here),
        parameters=statistics.mean(row.parameters / row.dense_parameters for row in here),
        latency_1=_geomean(row.dense_ms_1 / row.ms_1 for row in here),
        latency_64=_geomean(row.dense_ms_64 / row.ms_64 for row in here),
        scratch=statistics.mean(100 * other.accuracy for _, other in scratch) if scratch else None,
        over_scratch=_difference(scratch),
        scratch_epochs=statistics.mean(row.scratch_epochs for row in here) if is_method else None,
        over_scratch_time=_difference(longer),
        over_literal=_difference(literal),
        time_of_literal=_geomean(of_literal) if of_literal else None,
        over_uniform=_difference(uniform),
    )


def came_back_by_epoch(rows: Sequence[TrainingRow]) -> list[float | None]:
    """The mean over the seeds, for each epoch."""
    by_epoch = [
        [share for share in shares if share is not None]
        for shares in zip(*(row.came_back for row in rows), strict=False)
    ]
    return [statistics.mean(shares) if shares else None for shares in by_epoch]


# ---- baselines

Pair = tuple[TrainingRow, TrainingRow]


def _pairs(
    here: Sequence[TrainingRow], rows: Sequence[TrainingRow], fits: Callable[[TrainingRow, TrainingRow], bool]
) -> list[Pair]:
    """Each row with its baseline, for the seeds that have one."""
    found = [(row, next((o for o in rows if o.arch == row.arch and o.seed == row.seed and fits(row, o)), None))
             for row in here]  # fmt: skip
    return [(row, other) for row, other in found if other is not None]


def _difference(pairs: Iterable[Pair]) -> Paired | None:
    return paired([100 * (row.accuracy - other.accuracy) for row, other in pairs])


def _is_scratch(row: TrainingRow, other: TrainingRow) -> bool:
    return other.kind == "scratch" and other.key == row.key and other.epochs == row.epochs


def _is_scratch_time(row: TrainingRow, other: TrainingRow) -> bool:
    return other.kind == "scratch" and other.key == row.key and other.epochs == row.scratch_epochs


def _is_literal(row: TrainingRow, other: TrainingRow) -> bool:
    return other.kind == "literal" and (other.method, other.rate) == (row.method, row.rate)


def _is_uniform(row: TrainingRow, other: TrainingRow) -> bool:
    return other.kind == "uniform" and other.method == row.method


def _geomean(values: Iterable[float]) -> float:
    return math.exp(statistics.mean(map(math.log, values)))


# ---- tables


def tables(summaries: Sequence[Summary], markdown: bool) -> str:
    """Accuracy, time and size; the comparisons with the baselines; what came back epoch by epoch."""
    parts = [("", [_of_training(s) for s in summaries])]
    compared = [s for s in summaries if s.kind in ("method", "budget")]
    parts.append(("Points over the baselines, paired by seed: mean ± standard error", [_over(s) for s in compared]))
    soft = [s for s in summaries if any(share is not None for share in s.came_back_by_epoch)]
    epochs = max((len(s.came_back_by_epoch) for s in soft), default=0)
    parts.append(("Share of the soft-dead filters that came back, by epoch", [_by_epoch(s, epochs) for s in soft]))
    blocks = [f"{'### ' if markdown and title else ''}{title}\n\n{text_table(rows, markdown)}".lstrip()
              for title, rows in parts if rows]  # fmt: skip
    return "\n\n".join(blocks)


def _head(s: Summary) -> dict[str, object]:
    what = s.kind if not s.options else f"{s.kind}, {s.options}"
    return {"network": s.arch, "run": what, "method": s.method, "rate": s.rate, "duty": s.duty}


def _of_training(s: Summary) -> dict[str, object]:
    return _head(s) | {
        "seeds": s.seeds, "accuracy": f"{s.accuracy:.2f}", "spread": f"{s.spread:.2f}", "over dense": s.vs_dense,
        "over fp32": s.vs_fp32, "came back": s.came_back, "multiply-adds": s.multiply_adds,
        "parameters": s.parameters, "latency 1": s.latency_1, "latency 64": s.latency_64,
    }  # fmt: skip


def _over(s: Summary) -> dict[str, object]:
    signs = s.over_scratch.p_signs if s.over_scratch is not None else None
    return _head(s) | {
        "scratch": None if s.scratch is None else f"{s.scratch:.2f}", "over scratch": s.over_scratch,
        "p, signs": signs, "over scratch-time": s.over_scratch_time, "its epochs": s.scratch_epochs,
        "over literal": s.over_literal, "time, of literal": s.time_of_literal, "over uniform": s.over_uniform,
    }  # fmt: skip


def _by_epoch(s: Summary, epochs: int) -> dict[str, object]:
    padded = [*s.came_back_by_epoch, *[None] * epochs][:epochs]
    return _head(s) | {str(e): share for e, share in enumerate(padded, 1)}
