"""Trainings beside each other: what they train on, and the table and the files of their results."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import prunekernels as pk
from prunekernels.train.data import Split, load


@dataclass
class Row:
    """One training. score in %; seconds: the processor's, in training steps and changes of masks."""

    run: str
    seed: int
    score: float
    seconds: float
    multiply_adds: int
    parameters: int


def row(run: str, seed: int, score: float, seconds: float, network: nn.Module, example: Any) -> Row:
    """A row with the network's size; score as a share."""
    parameters = sum(p.numel() for p in network.parameters())
    return Row(run, seed, round(100 * score, 2), round(seconds, 2), pk.count_flops(network, example).live, parameters)


def parser(doc: str, epochs: int) -> argparse.ArgumentParser:
    """The arguments that the scripts share."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--data", metavar="DIR", help="Fashion-MNIST's four files; by default where Debian puts them")
    made.add_argument("--epochs", type=int, default=epochs)
    made.add_argument("--seeds", type=int, nargs="+", default=[0])
    made.add_argument("--rate", type=float, default=0.5, help="share of the filters that PGP prunes")
    made.add_argument("--threads", type=int, default=1, help="seconds are the processor's: the sum over the threads")
    made.add_argument("--held-out", action="store_true", help="score on training items held out, to choose options")
    made.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
    made.add_argument("--json", type=Path, help="results file; seeds that it has are not trained again")
    made.add_argument("--md", type=Path, help="the table, and all rows")
    return made


def items(given: argparse.Namespace) -> tuple[Split, Split]:
    """Fashion-MNIST's items, one to train on (five sixths of the training set) and one to score on."""
    data = load(f"idx:{given.data}" if given.data else "fashion-mnist")
    images, labels = data.train.images, data.train.labels
    own = 5 * len(labels) // 6
    return Split(images[:own], labels[:own]), Split(images[own:], labels[own:]) if given.held_out else data.test


def compare(given: argparse.Namespace, doc: str, measure: str, rows_of: Callable[[int], Iterable[Row]]) -> list[Row]:
    """Trains with each seed, prints the table and writes the files.

    Args:
        given: What parser read.
        doc: The script's.
        measure: What the score is.
        rows_of: From a seed, its trainings, among them "dense", "scratch" and "PGP".
    """
    torch.set_num_threads(given.threads)
    settings = {name: value for name, value in vars(given).items() if name not in ("json", "md", "seeds", "threads")}
    rows = _stored(given.json, settings)
    for seed in given.seeds:
        if any(row.seed == seed for row in rows):
            continue
        new = []
        for made in rows_of(seed):
            new.append(made)
            print(f"seed {seed}: {made.run}: {measure} {made.score:.2f}, {made.seconds:.1f} s", flush=True)
        known = _stored(given.json, settings) or rows  # the file: another process may have added seeds
        rows = sorted([*known, *new], key=lambda row: row.seed)
        _write(given.json, settings, measure, rows)
    _write(given.json, settings, measure, rows)
    text = f"{table(rows, measure)}\n\n{by_seed(rows)}"
    print(text)
    if given.md:
        facts = "\n".join(f"- {name}: {value}" for name, value in header().items())
        every = markdown(list(asdict(rows[0])), [asdict(row).values() for row in rows])
        given.md.write_text(f"# {doc.splitlines()[0]}\n\n{facts}\n\n{text}\n\n## Rows\n\n{every}\n")
    return rows


def _stored(path: Path | None, settings: dict[str, Any]) -> list[Row]:
    if path is None or not path.exists():
        return []
    found = json.loads(path.read_text())
    if found["settings"] != settings:
        raise ValueError(f"--json: {path}: expected results of {settings}, got {found['settings']}: take another file")
    return [Row(**row) for row in found["rows"]]


def _write(path: Path | None, settings: dict[str, Any], measure: str, rows: list[Row]) -> None:
    if path is not None:
        results = {"header": header(), "settings": settings, "measure": measure, "summary": summary(rows)}
        path.write_text(_by_line(results | {"rows": [asdict(row) for row in rows]}))


def _by_line(results: dict[str, Any]) -> str:
    """JSON with a line for each entry of each section: a row is a line."""
    sections = []
    for name, value in results.items():
        if isinstance(value, dict):
            entries = [f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items()]
        elif isinstance(value, list):
            entries = [json.dumps(entry) for entry in value]
        else:
            sections.append(f" {json.dumps(name)}: {json.dumps(value)}")
            continue
        start, end = "{}" if isinstance(value, dict) else "[]"
        inner = ",\n".join(f"  {entry}" for entry in entries)
        sections.append(f" {json.dumps(name)}: {start}\n{inner}\n {end}")
    return "{\n" + ",\n".join(sections) + "\n}\n"


def summary(rows: list[Row]) -> list[dict[str, Any]]:
    """Means over the seeds, times and sizes over the dense training. spread: the best seed less the worst."""
    runs = {name: [row for row in rows if row.run == name] for name in dict.fromkeys(row.run for row in rows)}
    found = []
    for name, own in runs.items():
        scores = [row.score for row in own]
        shares = {of: _mean(own, of) / _mean(runs["dense"], of) for of in ("seconds", "multiply_adds", "parameters")}
        found.append({"run": name, "score": statistics.mean(scores), "spread": max(scores) - min(scores), **shares})
    return found


def table(rows: list[Row], measure: str) -> str:
    cells = [[name, *(f"{value:.2f}" for value in values)] for name, *values in map(dict.values, summary(rows))]
    return markdown(["training", measure, "spread", "time", "multiply-adds", "parameters"], cells)


def by_seed(rows: list[Row]) -> str:
    """What PGP has over scratch."""
    scores = {(row.run, row.seed): row.score for row in rows}
    gains = [scores["PGP", seed] - scores["scratch", seed] for seed in sorted({row.seed for row in rows})]
    single = ", ".join(f"{gain:+.2f}" for gain in gains)
    return f"PGP over scratch: {statistics.mean(gains):+.2f} points; by seed {single}"


def _mean(rows: list[Row], column: str) -> float:
    return statistics.mean(getattr(row, column) for row in rows)


def markdown(head: list[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def header() -> dict[str, object]:
    """The command, the machine and the versions that results come from."""
    cpu = [line for line in _text_of("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": os.environ.get("COMMIT") or _commit(),
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "build": pk.build_info(),
    }


def _text_of(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except OSError:
        return None
