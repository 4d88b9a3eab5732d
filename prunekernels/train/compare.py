"""compare: several runs beside each other, in one HTML file with plots that answer to the mouse and need no network."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import checkpoint
from .compare_page import PAGE
from .config import Config
from .loop import CHECKPOINT
from .progress import Progress
from .report import html_table, rate_text

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555", "#000000")
CURVES = {
    "accuracy": "accuracy, pruned filters off",
    "train_accuracy": "accuracy on training images",
    "loss": "training loss",
    "live": "share of the filters that is live",
    "seconds": "seconds of an epoch",
}
ALIKE = ("out", "beside", "quiet", "report", "onnx", "timeout", "stop_after", "log")  # settings that tell nothing


def compare_runs(folders: Sequence[Path], out: Path) -> Path:
    """Writes a page that compares the runs in some folders.

    Args:
        folders: Of runs that `train` wrote, finished or not, each once.
        out: The file.

    Returns:
        The file.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"report: expected each run once, got {', '.join(map(str, folders))}")
    runs = []
    with Progress(len(folders), "report") as bar:
        for i, folder in enumerate(folders):
            bar.update(i, str(folder))
            runs.append(_read(folder))
    labels = _labels(runs)
    drawn = [
        {"label": label, "color": COLORS[i % len(COLORS)], "dash": i >= len(COLORS), **_drawn(run)}
        for i, (label, run) in enumerate(zip(labels, runs, strict=True))
    ]
    data = json.dumps({"runs": drawn, "curves": CURVES}, allow_nan=False).replace("<", "\\u003c")
    title = f"{len(runs)} runs" if len(runs) > 1 else labels[0]
    tables = [_results(labels, runs), "<h2>Settings that differ</h2>", _differences(labels, runs)]
    parts = {"title": html.escape(title), "tables": "\n".join(tables), "data": data}
    page = re.sub(r"\$(title|tables|data)\b", lambda found: parts[found[1]], PAGE)
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_atomically(out, lambda path: path.write_text(page, encoding="utf-8"))
    return out


def _read(folder: Path) -> dict[str, Any]:
    """The settings, history and summary of a run; the summary is empty where its last epoch is not over."""
    state = checkpoint.load(folder / CHECKPOINT)
    path = folder / "summary.json"
    done = state["epoch"] >= state["config"]["epochs"] and path.is_file()
    summary = json.loads(path.read_text()) if done else {}
    return {"folder": str(folder), "settings": state["config"], "history": state["history"], "summary": summary}


def _labels(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each run is, with its folder where two are the same."""
    names = []
    for run in runs:
        settings = run["settings"]
        of_config = Config.resumed(settings, {}, run["folder"])
        name = "scratch" if of_config.small_of is not None else of_config.method
        name = f"{name} at {rate_text(of_config)}" if of_config.method != "none" else name.replace("none", "dense")
        names.append(name)
    return [f"{n} ({run['folder']})" if names.count(n) > 1 else n for n, run in zip(names, runs, strict=True)]


def _drawn(run: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of the plots; None where an epoch has none."""
    history, summary = run["history"], run["summary"]
    curves = {name: [_finite(row.get(name)) for row in history] for name in CURVES}
    seconds, total = [], 0.0
    for row in history:
        total += row["seconds"]
        seconds.append(total)
    point = None
    if summary:
        share = summary["small_multiply_adds"] / max(1, summary["multiply_adds"])
        point = {"x": share, "y": summary["small_accuracy"]}
    return {"curves": curves, "clock": seconds, "point": point}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _results(labels: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for label, run in zip(labels, runs, strict=True):
        s, history = run["summary"], run["history"]
        last = next((row["accuracy"] for row in reversed(history) if math.isfinite(row["accuracy"])), None)
        epochs = f"{len(history)} of {run['settings']['epochs']}"
        cells = [label, run["folder"], epochs, "" if last is None else f"{last:.4f}"]
        if s:
            times = s["epoch_of"]
            cells += [
                f"{s['accuracy']:.4f}", f"{s['small_accuracy']:.4f}",
                f"{s['small_parameters']:,} of {s['parameters']:,}",
                f"{s['small_multiply_adds']:,} of {s['multiply_adds']:,}", f"{times['dense'] / times['this']:.2f}",
            ]  # fmt: skip
        else:
            cells += ["", "", "", "", ""]
        rows.append((*cells, f"{sum(row['seconds'] for row in history):.1f}"))
    head = ("run", "folder", "epochs", "last epoch's accuracy", "test accuracy", "of the small network", "parameters",
            "multiply-adds", "times as fast as dense", "seconds, training")  # fmt: skip
    return html_table(head, rows)


def _differences(labels: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> str:
    settings = [run["settings"] for run in runs]
    names = [name for name in dict.fromkeys(n for s in settings for n in s) if name not in ALIKE]
    rows = []
    for name in names:
        values = [_told(s.get(name)) for s in settings]
        if len(set(values)) > 1:
            rows.append((name, *values))
    return html_table(("setting", *labels), rows) if rows else '<p class="dim">none</p>'


def _told(value: Any) -> str:
    return "" if value is None else str(value)
