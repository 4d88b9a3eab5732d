"""report.html: a run's results in one file, with the pictures inside."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import write_atomically
from .config import Config
from .plots import History, plot_accuracy, plot_filters, plot_time

PICTURES = ("accuracy.png", "filters.png", "time.png")
KINDS = {"flops": "multiply-adds", "params": "parameters"}  # of budgets
CAPTIONS = {
    "accuracy.png": "Accuracy of an epoch is measured with all dead filters masked, even if training steps let them "
    "train.",
    "filters.png": "In each layer, the filters that were live for longest are on top.",
    "time.png": "Bars: seconds of each epoch, training steps and the method's work. Lines: seconds an epoch of the "
    "dense network, this one with its last masks and the small one: medians of steps timed in turns after the last "
    "epoch.",
}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 960px; margin: 2em auto; padding: 0 1em }}
h1 {{ font-size: 1.5em; margin-bottom: 0 }} h2 {{ font-size: 1.15em; margin-top: 2em }} .dim {{ color: #666 }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
td, th {{ padding: .2em .9em .2em 0; text-align: right }}
td:first-child, th:first-child {{ text-align: left }} th {{ border-bottom: 1px solid #bbb; font-weight: 600 }}
tr:nth-child(even) td {{ background: #f6f6f6 }} img {{ max-width: 100% }}
figure {{ margin: 1em 0 }} figcaption {{ color: #666 }}
</style></head><body>
<h1>{title}</h1><p class="dim">{subtitle}</p>
{body}
</body></html>
"""


def write_report(
    out: Path,
    config: Config,
    history: Sequence[Mapping[str, float]],
    layers: Mapping[str, int],
    states: Tensor,
    summary: Mapping[str, Any],
    beside: Mapping[str, History] | None = None,
) -> Path:
    """Writes report.html and its pictures.

    Args:
        out: Folder of the run.
        config: Its settings.
        history: By epoch, the rows of Trainer.history.
        layers: Number of filters by layer.
        states: uint8 [epochs, filters of all layers]: 0 live, 1 soft-dead, 2 hard-dead.
        summary: What finalize_run returned.
        beside: By what they are, as "dense" or "scratch", the histories of other runs, to compare with.

    Returns:
        The path of report.html.
    """
    images = "test" if summary.get("validation_accuracy") is None else "validation"
    beside = beside or {}
    plot_accuracy(out / "accuracy.png", history, states, beside, images)
    plot_filters(out / "filters.png", layers, states)
    plot_time(out / "time.png", history, summary["epoch_of"], config.method)
    what = "" if config.method == "none" else f": {config.method} at {rate_text(config)}"
    if config.small_of is not None:
        what = f": the small network of {config.small_of}, from scratch"
    title = f"{config.arch} on {config.data}{what}"
    ranks = f"{summary['ranks']} processes, " if summary.get("ranks", 1) > 1 else ""
    machine = f"{ranks}{summary['device']}, {summary['threads']} threads, torch {summary['torch']}"
    subtitle = f"{summary['mode']}, {summary['epochs']} epochs, {machine}"
    parts = [_results(summary, beside), *(_figure(out / name) for name in PICTURES)]
    parts += ["<h2>Layers</h2>", _layers(layers, states), "<h2>Settings</h2>", _settings(config)]
    page = PAGE.format(title=html.escape(title), subtitle=html.escape(subtitle), body="\n".join(parts))
    write_atomically(out / "report.html", lambda path: path.write_text(page, encoding="utf-8"))
    return out / "report.html"


def rate_text(config: Config) -> str:
    """What is pruned: the rate, or what a budget leaves."""
    budget = config.options.get("budget")
    if isinstance(budget, Mapping):
        return ", ".join(f"{share:g} of the {KINDS.get(kind, kind)}" for kind, share in budget.items())
    return f"{config.rate:g}"


def _results(s: Mapping[str, Any], beside: Mapping[str, History]) -> str:
    times = s["epoch_of"]
    validation = s.get("validation_accuracy")  # where there are such images, epochs are evaluated on them
    others = [name for name in beside if name != "dense"]
    accuracies = {name: _accuracy(history) for name, history in beside.items()}
    seconds = {name: f"{sum(row['seconds'] for row in history):.1f}" for name, history in beside.items()}
    dense = accuracies.get("dense", "")
    test = [f"{s['accuracy']:.4f}", f"{s['small_accuracy']:.4f}"]
    if validation is None:
        rows = [("accuracy on the test set", dense, *test, *(accuracies[name] for name in others))]
    else:
        rows = [
            ("accuracy on validation images", dense, f"{validation:.4f}", "", *(accuracies[name] for name in others)),
            ("accuracy on the test set", "", *test),
        ]
    rows += [
        ("parameters", f"{s['parameters']:,}", "", f"{s['small_parameters']:,}"),
        ("multiply-adds an image", f"{s['multiply_adds']:,}", "", f"{s['small_multiply_adds']:,}"),
        ("seconds an epoch, steps in turns", *(f"{times[name]:.3f}" for name in ("dense", "this", "small"))),
        ("times as fast as dense", "1.00", *(f"{times['dense'] / times[name]:.2f}" for name in ("this", "small"))),
        ("seconds an epoch, training (median)", "", f"{s['epoch_seconds']:.3f}"),
        (
            "seconds, all epochs",
            seconds.get("dense", ""),
            f"{s['seconds']:.1f}",
            "",
            *(seconds[name] for name in others),
        ),
    ]
    agreed = f"{s['agreed']} of {s['test_images']} test images"
    note = f"Masked and small network agree on {agreed}. {html.escape(s['checked'])}."
    head = ("", "dense", "this run", "small network", *others)
    filled = [(*row, *[""] * (len(head) - len(row))) for row in rows]
    return html_table(head, filled) + f'<p class="dim">{note}</p>'


def _accuracy(history: History) -> str:
    """Of the last epoch; nothing where that was not evaluated."""
    last = history[-1]["accuracy"]
    return "" if math.isnan(last) else f"{last:.4f}"


def _figure(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    caption = html.escape(CAPTIONS[path.name])
    return (
        f'<figure><img alt="{path.stem}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def _layers(layers: Mapping[str, int], states: Tensor) -> str:
    rows = []
    for (name, filters), block in zip(layers.items(), states.split(list(layers.values()), dim=1), strict=True):
        counts = torch.bincount(block[-1].long(), minlength=3).tolist()
        returned = int(((block[1:] == 0) & (block[:-1] == 1)).any(0).sum())
        rows.append((name, *map(str, (filters, *counts, returned))))
    return html_table(("layer", "filters", "live", "soft-dead", "hard-dead", "came back at least once"), rows)


def _settings(config: Config) -> str:
    return html_table(("setting", "value"), [(name, str(value)) for name, value in config.as_dict().items()])


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"
