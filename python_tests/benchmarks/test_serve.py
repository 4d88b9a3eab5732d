"""benchmarks/serve.py does everything on a tiny network."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("serve_benchmark", BENCHMARKS / "serve.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


GIVEN = ["--networks", "tiny_vgg", "--clients", "1", "3", "--calls", "2", "--batch", "2", "--seconds", "0.01"]


def test_writes_rows(script, tmp_path, capsys):
    assert script.main([*GIVEN, "--json", str(tmp_path / "s.json"), "--md", str(tmp_path / "s.md")]) == 0
    body = json.loads((tmp_path / "s.json").read_text())
    assert [(r["network"], r["threads"], r["images"]) for r in body["rows"]] == [
        ("tiny_vgg", 1, 4),
        ("tiny_vgg", 3, 12),
    ]
    for row in body["rows"]:
        assert min(row[f"{mode}_images_per_s"] for mode in script.MODES) > 0
        assert tuple(row["quartiles"]) == script.MODES == ("dense", "masked", "live", "small")
    assert (tmp_path / "s.md").read_text().startswith("# Serving benchmark\n")
    assert "rows lost to dense" in capsys.readouterr().out


def test_checks_before_timing(script, monkeypatch, capsys):
    calls = iter(range(1000))
    right = script.answer
    monkeypatch.setattr(script, "answer", lambda *args: right(*args) + next(calls))
    with pytest.raises(SystemExit, match="dense: expected the answer of one thread, got another"):
        script.main(GIVEN)
