"""benchmarks/methods.py: its rows, its means, what the goals say; everything for real on one small network."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from trainings.rows import MethodRow, goal_lines, summarise, table

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "methods", raising=False)
    return importlib.import_module("methods")  # by a name that its worker processes find, too


def row(**given):
    common = {
        "arch": "vgg_small", "method": "ghfp", "rate": 0.5, "duty": 0.1, "clip": None, "seed": 0, "accuracy": 0.98,
        "dense_accuracy": 0.99, "seconds": 1.0, "dense_seconds": 2.0, "live": 0.5, "came_back": 0.1,
        "multiply_adds": 0.4, "parameters": 0.3, "ms_1": 1.0, "dense_ms_1": 1.0, "ms_64": 2.0, "dense_ms_64": 8.0,
    }  # fmt: skip
    return MethodRow(**{**common, **given})


@pytest.mark.slow
def test_writes_rows(script, tmp_path, capsys):
    to = ["--json", str(tmp_path / "m.json"), "--md", str(tmp_path / "m.md")]
    what = ["--arch", "vgg_small", "--methods", "ghfp", "csgd", "--rates", "0.5", "--sweep", "0.1", "--swept", "ghfp"]
    assert script.main([*what, "--seeds", "3", "--epochs", "2", "--size", "8", "--workers", "1", *to]) == 0
    body = json.loads((tmp_path / "m.json").read_text())
    assert "benchmarks/methods.py --arch" in body["header"]["command"]
    assert (body["failed"], body["not_run"]) == ({}, [])
    rows = body["rows"]
    assert [(r["method"], r["rate"], r["clip"]) for r in rows] == [
        ("none", 0.0, None), ("ghfp", 0.5, None), ("csgd", 0.5, None), ("ghfp", 0.5, False),
    ]  # fmt: skip
    dense = rows[0]
    assert (dense["live"], dense["multiply_adds"], dense["parameters"], dense["came_back"]) == (1, 1, 1, 0)
    assert dense["accuracy"] == dense["dense_accuracy"] > 0.2 and dense["seconds"] == dense["dense_seconds"] > 0
    assert all(r["seed"] == 3 and r["live"] == 0.5 and 0.2 < r["multiply_adds"] < 0.35 for r in rows[1:])
    text = (tmp_path / "m.md").read_text()
    assert text.startswith("# Methods benchmark\n") and "| vgg_small | csgd | 0.5 |" in text
    assert "accuracy at rate 0.5, at most 1 point below dense: " in capsys.readouterr().out


def test_means_over_seeds():
    rows = [row(), row(seed=1, accuracy=0.96, dense_accuracy=0.97, seconds=4.0)]
    (found,) = summarise(rows)
    assert (found.seeds, found.accuracy, found.spread) == (2, pytest.approx(97), pytest.approx(2))
    assert found.below_dense == pytest.approx(1) and found.vs_dense == pytest.approx(1)
    assert (found.latency_1, found.latency_64) == (pytest.approx(1), pytest.approx(4))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"accuracy": 0.981}, ["holds for each", "holds: vgg_small ghfp 2.00"]),
        ({"accuracy": 0.9}, ["missed by 1 of 1: vgg_small ghfp by 9.00 points", "holds: "]),
        ({"accuracy": 0.981, "seconds": 1.6}, ["holds for each", "missed: vgg_small ghfp 1.25"]),
        ({"accuracy": 0.981, "method": "csgd"}, ["holds for each"]),
        ({"rate": 0.3}, []),
        ({"duty": 1.0}, []),
        ({"clip": False}, []),
        ({"method": "none", "duty": 1.0, "rate": 0.0}, []),
    ],
)
def test_goals(given, said):
    lines = goal_lines(summarise([row(**given)]), 0.1)
    assert len(lines) == len(said) and all(text in line for text, line in zip(said, lines, strict=True))


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "results").glob("*-methods*.json")), ids=lambda p: p.name)
def test_committed_results_say_what_their_rows_say(path):
    body = json.loads(path.read_text())
    summaries = summarise([MethodRow(**r) for r in body["rows"]])
    assert body["goals"] == goal_lines(summaries, 0.1) and body["goals"]
    text = path.with_suffix(".md").read_text()
    assert table(summaries, markdown=True) in text and body["header"]["command"] in text


def test_which_filters_came_back(script):
    class Trainer:
        states = ()

    states = [torch.tensor(s) for s in ([0, 1, 1, 0], [0, 1, 0, 1], [0, 2, 1, 0])]
    assert script.Run(Trainer(), states).came_back == 0.5  # the last two; the second never


def test_each_setting_once(script):
    args = script.parse(["--methods", "sfp", "pgp", "--rates", "0.5", "0.7", "--sweep", "0.1", "1", "--swept", "sfp"])
    assert [str(s) for s in script.specs(args)] == [
        "sfp 0.5 duty 0.1", "sfp 0.7 duty 0.1", "pgp 0.5 duty 0.1", "pgp 0.7 duty 0.1",
        "sfp 0.5 duty 1", "sfp 0.5 duty 0.1 unclipped",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_failed_run_is_named_and_the_others_go_on(script, monkeypatch):
    specs = script.Spec("ghfp", 0.5, 0.1), script.Spec("pgp", 0.5, 0.1)
    threads, epoch = torch.get_num_threads(), script.Run.epoch

    def failing(run):
        if run.trainer.config.method == "ghfp":
            raise FloatingPointError("train: loss: expected a finite number, got nan")
        epoch(run)

    monkeypatch.setattr(script.Run, "epoch", failing)
    rows, failed = script.trained(script.Group("vgg_small", 0, specs, 1, 8, "live", threads))
    assert [r.method for r in rows] == ["none", "pgp"]
    assert list(failed) == ["vgg_small seed 0 ghfp 0.5 duty 0.1"] and "got nan" in next(iter(failed.values()))


@pytest.mark.parametrize(("old", "new"), [("network", "live"), ("layer", "masked"), ("masked", "masked")])
def test_the_old_name_of_the_mode_is_understood(script, capsys, old, new):
    assert script.parse(["--gear", old]).mode == new
    assert capsys.readouterr().err == "warning: --gear is now --mode\n"
    assert script.parse([]).mode == "live"


@pytest.mark.parametrize(
    "arguments", ["--arch alexnet", "--rates 1", "--sweep 1.5", "--methods adam", "--epochs 0", "--methods"]
)
def test_bad_arguments(script, arguments, capsys):
    with pytest.raises(SystemExit):
        script.main(arguments.split())
    assert "error: argument" in capsys.readouterr().err
