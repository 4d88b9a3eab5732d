"""Rows of results: text table, Markdown, JSON, CSV, and the summary that says where we lose."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

LOSS = 0.98  # below this share of a rival's speed a problem counts as lost


@dataclass(frozen=True)
class Row:
    """One problem, mask, kept share and direction. Times are medians in ms, None where a rival did not run."""

    problem: str
    name: str
    times: int
    mask: str
    side: str
    kept: float
    live_k: int
    live_c: int
    live_kernels: int
    direction: str
    layout: str  # where ours was fastest
    plan: str
    ms: float
    dense_ms: float
    masked_dense_ms: float
    compaction_ms: float
    sparseprop_ms: float | None
    limit_ms: float | None
    quartiles: dict[str, list[float]] = field(default_factory=dict)  # "ours/nchw": [first, median, third]

    @property
    def vs_dense(self) -> float:
        return self.dense_ms / self.ms

    @property
    def vs_compaction(self) -> float:
        return self.compaction_ms / self.ms

    @property
    def vs_sparseprop(self) -> float | None:
        return None if self.sparseprop_ms is None else self.sparseprop_ms / self.ms

    @property
    def of_limit(self) -> float | None:
        return None if self.limit_ms is None else self.limit_ms / self.ms

    def flat(self) -> dict[str, object]:
        ratios = {name: getattr(self, name) for name in ("vs_dense", "vs_compaction", "vs_sparseprop", "of_limit")}
        return {k: v for k, v in asdict(self).items() if k != "quartiles"} | ratios


def geomean(rows: Iterable[Row], ratio: Callable[[Row], float | None]) -> float | None:
    """Geometric mean weighted by multiplicity, over the rows that have the ratio."""
    pairs = [(row.times, value) for row in rows if (value := ratio(row)) is not None]
    total = sum(times for times, _ in pairs)
    return math.exp(sum(times * math.log(value) for times, value in pairs) / total) if total else None


def break_even(speedups: dict[float, float]) -> float | None:
    """The largest kept share at which ours is as fast as dense, from mean speed-ups by kept share.

    Interpolated in the logarithm between neighbours; None if dense is faster throughout.
    """
    kept = sorted(speedups, reverse=True)
    for above, here in zip([None, *kept], kept, strict=False):
        if speedups[here] < 1:
            continue
        if above is None:
            return here
        low, high = math.log(speedups[above]), math.log(speedups[here])
        return above + (here - above) * -low / (high - low)
    return None


@dataclass(frozen=True)
class Summary:
    """All rows of one mask, side, direction and kept share."""

    mask: str
    side: str
    direction: str
    kept: float
    problems: int
    vs_dense: float | None
    vs_compaction: float | None
    vs_sparseprop: float | None
    of_limit: float | None
    worst: str
    worst_ratio: float  # of the limit, or over dense where there is no limit
    lost_to_dense: int
    lost_to_compaction: int


def summarise(rows: Sequence[Row]) -> list[Summary]:
    keys = dict.fromkeys((r.mask, r.side, r.direction, r.kept) for r in rows)
    summaries = []
    for key in keys:
        here = [r for r in rows if (r.mask, r.side, r.direction, r.kept) == key]
        worst = min(here, key=lambda r: r.of_limit or r.vs_dense)
        summaries.append(
            Summary(
                *key,
                problems=len(here),
                vs_dense=geomean(here, lambda r: r.vs_dense),
                vs_compaction=geomean(here, lambda r: r.vs_compaction),
                vs_sparseprop=geomean(here, lambda r: r.vs_sparseprop),
                of_limit=geomean(here, lambda r: r.of_limit),
                worst=worst.name or worst.problem,
                worst_ratio=worst.of_limit or worst.vs_dense,
                lost_to_dense=sum(r.vs_dense < LOSS for r in here),
                lost_to_compaction=sum(r.vs_compaction < LOSS for r in here),
            )
        )
    return summaries


def break_evens(summaries: Sequence[Summary]) -> dict[str, float | None]:
    """By "mask side direction", where more than one kept share was run."""
    curves: dict[str, dict[float, float]] = {}
    for s in summaries:
        if s.vs_dense is not None:
            curves.setdefault(f"{s.mask} {s.side} {s.direction}", {})[s.kept] = s.vs_dense
    return {name: break_even(curve) for name, curve in curves.items() if len(curve) > 1}


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _table(records: Sequence[dict[str, object]], markdown: bool) -> str:
    cells = [list(records[0]), *([_cell(v) for v in record.values()] for record in records)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    if markdown:
        lines = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in cells]
        lines.insert(1, "|" + "---|" * len(widths))
    return "\n".join(lines)


ROW_COLUMNS = (
    *("name", "times", "mask", "side", "kept", "live_k", "live_c", "direction", "layout", "plan", "ms", "dense_ms"),
    *("masked_dense_ms", "compaction_ms", "sparseprop_ms", "limit_ms", "vs_dense", "vs_compaction", "of_limit"),
)


def tables(rows: Sequence[Row], markdown: bool = False) -> tuple[str, str]:
    """The rows, and the summary with its break-even densities."""
    flat = [row.flat() for row in rows]
    shown = [{c: (f["name"] or f["problem"]) if c == "name" else f[c] for c in ROW_COLUMNS} for f in flat]
    summaries = summarise(rows)
    summary = _table([asdict(s) for s in summaries], markdown)
    bullet = "\n- " if markdown else ""
    for name, kept in break_evens(summaries).items():
        found = "none: dense is faster throughout" if kept is None else f"kept {kept:.2f}"
        summary += f"\n{bullet}break-even with dense, {name}: {found}"
    return _table(shown, markdown), summary


def markdown(rows: Sequence[Row], header: dict[str, object]) -> str:
    table, summary = tables(rows, markdown=True)
    head = "\n".join(f"- {key}: {f'`{value}`' if key == 'command' else value}" for key, value in header.items())
    return f"# Convolution benchmark\n\n{head}\n\n## Summary\n\n{summary}\n\n## Rows\n\n{table}\n"


def write_json(path: Path, rows: Sequence[Row], header: dict[str, object]) -> None:
    summaries = summarise(rows)
    body = {
        "header": header,
        "summary": [asdict(s) for s in summaries],
        "break_even": break_evens(summaries),
        "rows": [row.flat() | {"quartiles": row.quartiles} for row in rows],
    }
    path.write_text(json.dumps(body, indent=1) + "\n")


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    flat = [row.flat() for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, flat[0])
        writer.writeheader()
        writer.writerows(flat)


def write_plot(path: Path, rows: Sequence[Row]) -> None:
    """Speed-up over dense against kept share, a panel per direction: geometric means, and a dot per problem of ours."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    directions = list(dict.fromkeys(r.direction for r in rows))
    figure, axes = plt.subplots(1, len(directions), figsize=(1 + 4.5 * len(directions), 4), squeeze=False, sharey=True)
    lines = {"ours": "ms", "Python compaction": "compaction_ms", "SparseProp": "sparseprop_ms", "limit": "limit_ms"}
    for axis, direction in zip(axes[0], directions, strict=True):
        here = [r for r in rows if r.direction == direction]
        axis.scatter([r.kept for r in here], [r.vs_dense for r in here], s=9, color="C0", alpha=0.35, linewidths=0)
        for color, (label, column) in enumerate(lines.items()):
            means = {k: _over_dense([r for r in here if r.kept == k], column) for k in sorted({r.kept for r in here})}
            points = {k: v for k, v in means.items() if v is not None}
            if points:
                style = "--" if label == "limit" else "-"
                axis.plot(list(points), list(points.values()), style, color=f"C{color}", marker="o", ms=4, label=label)
        if all(r.limit_ms is None for r in here):
            kept = sorted({r.kept for r in here})
            axis.plot(kept, [1 / k for k in kept], ":", color="0.3", label="1 / kept")
        axis.axhline(1, color="0.5", linewidth=1)
        axis.set(title=direction, xlabel="kept share", xlim=(1.03, 0), yscale="log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axis.yaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("speed-up over dense")
    figure.suptitle("geometric means; dots: ours, by problem", fontsize="medium")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _over_dense(rows: Sequence[Row], column: str) -> float | None:
    return geomean(rows, lambda r: None if getattr(r, column) is None else r.dense_ms / getattr(r, column))
