"""Results files: a line for each row, and nothing lost on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cases.benchmark_layers import make_row
from harness.report import Missing, json_text
from layers.report import LAYERS

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_a_row_is_a_line_and_comes_back():
    line = "n2c8h6k4r3s1p1g1"
    rows = [make_row(problem=line, ms=1 / 3, quartiles={"ours/nchw": [0.1, 1 / 3, 1e-9]}), make_row(problem=line)]
    missing = Missing({"a filter both kept 1": 'Wrong: "y"\n'}, ["c filter both kept 1"])
    text = LAYERS.json(rows, {"command": "c", "build": {"cuda": ""}}, missing)
    body = json.loads(text)
    assert len([line for line in text.splitlines() if line.startswith('  {"problem": "n2c8')]) == 2
    assert body["rows"][0]["quartiles"] == rows[0].quartiles and body["header"]["build"] == {"cuda": ""}
    assert json_text(body) == text


def test_empty_sections_are_written(tmp_path):
    (tmp_path / "r.json").write_text(LAYERS.json([], {"command": "c"}))
    assert LAYERS.read(tmp_path / "r.json") == ([], Missing({}, []))


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda p: p.name)
def test_committed_results_have_a_line_for_each_row(path):
    text = path.read_text()
    body = json.loads(text)
    assert json_text(body) == text and len(text.splitlines()) < len(body["rows"]) + len(body.get("not_run", [])) + 150
    assert path.with_suffix(".md").is_file()
