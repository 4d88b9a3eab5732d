"""benchmarks/methods.py: its command line, the order of its runs, and everything for real on one small network."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cases.trainings import training_row
from prunekernels.methods.arguments import keyword_options
from prunekernels.train import setup
from trainings import run, uniform, yardstick
from trainings.rows import TrainingRow
from trainings.run import Job, trained
from trainings.schedule import Asked
from trainings.spec import METHODS, Setting, Spec

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = ["--arch", "vgg_small", "--size", "8", "--width", "0.25", "--epochs", "1", "--train-images", "128"]
TINY += ["--mode", "masked"]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "methods", raising=False)
    return importlib.import_module("methods")


@pytest.fixture
def quick(script, monkeypatch):
    """The script in this process, with few steps beside a run."""
    monkeypatch.setattr(script, "pool", lambda workers: ThreadPoolExecutor(1))
    monkeypatch.setattr(yardstick, "ROUNDS", 1)
    monkeypatch.setattr(yardstick, "TIMED", 1)
    monkeypatch.setattr(run, "LATENCY_SECONDS", 0.01)
    threads = torch.get_num_threads()
    yield script
    torch.set_num_threads(threads)


# ---- for real


@pytest.mark.slow
def test_runs_and_their_baselines(quick, tmp_path, capsys):
    to = ["--json", str(tmp_path / "m.json"), "--md", str(tmp_path / "m.md")]
    kinds = ["--kinds", "dense", "method", "scratch", "literal"]
    what = [*TINY, "--methods", "ghfp", "sfp", "--seeds", "3", "--workers", "1"]
    assert quick.main([*what, *kinds, *to]) == 0
    body = json.loads((tmp_path / "m.json").read_text())
    assert "benchmarks/methods.py --arch" in body["header"]["command"]
    assert (body["failed"], body["not_run"]) == ({}, [])
    rows = [TrainingRow(**row) for row in body["rows"]]
    dense, *methods = rows[:3]
    assert [row.kind for row in rows[:3]] == ["dense", "method", "method"]
    assert (dense.live, dense.soft, dense.came_back, dense.key) == ([1], [0], [None], "")
    assert dense.multiply_adds == dense.dense_multiply_adds and dense.parameters == dense.dense_parameters
    assert dense.small_step_ms == dense.dense_step_ms and set(dense.dense_step_ms) == set(yardstick.FORMS)
    for row in methods:
        assert row.live == [0.5] and row.counts == [4, 4, 8, 8, 16, 16] and set(row.masks) >= {"filter_mask"}
        assert 0.2 < row.multiply_adds / row.dense_multiply_adds < 0.35
        assert row.seconds == pytest.approx(row.setup_seconds + sum(row.epoch_seconds), rel=1e-5)
    assert methods[0].key == methods[1].key  # as many filters in each layer: one training from scratch serves both
    scratch = [row for row in rows if row.kind == "scratch"]
    assert [row.epochs for row in scratch] == [1]
    assert all(row.parameters == methods[0].parameters and row.key == methods[0].key for row in scratch)
    assert sorted(row.method for row in rows if row.kind == "literal") == ["ghfp", "sfp"]
    text = (tmp_path / "m.md").read_text()
    assert text.startswith("# Methods benchmark\n") and "| vgg_small | method | ghfp | 0.5 |" in text
    assert "each method over scratch" in capsys.readouterr().out
    # The same command once more has nothing to do; a method that is made anew keeps its baselines.
    assert quick.main([*what, *kinds, *to, "--resume"]) == 0
    again = json.loads((tmp_path / "m.json").read_text())
    assert again["rows"] == body["rows"]
    before = "2026-01-02T03:04:05+00:00"  # the clock of a row has whole seconds, and this test takes few of them
    (tmp_path / "m.json").write_text(json.dumps({**again, "rows": [{**row, "date": before} for row in again["rows"]]}))
    assert quick.main([*what, *to, "--resume", "--again", "ghfp", "--kinds", "dense", "method"]) == 0
    rows = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert rows and all((row["date"] != before) == (row["method"] == "ghfp") for row in rows)


@pytest.mark.slow
def test_goes_on_after_a_kill(quick, tmp_path, capsys):
    path = tmp_path / "m.json"
    argv = [*TINY, "--kinds", "dense", "--seeds", "0", "1", "2", "--workers", "1", "--json", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen([sys.executable, str(BENCHMARKS / "methods.py"), *argv], env=environment)
    while not path.exists():
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 0
    done = json.loads(path.read_text())
    assert 1 <= len(done["rows"]) < 3 and len(done["not_run"]) == 3 - len(done["rows"])
    with pytest.raises(SystemExit):
        quick.main(argv)
    assert f"{path} exists: --resume goes on with it" in capsys.readouterr().err
    assert quick.main([*argv, "--resume"]) == 0
    after = json.loads(path.read_text())
    assert [row["seed"] for row in after["rows"]] == [0, 1, 2] and after["not_run"] == []
    assert after["rows"][: len(done["rows"])] == done["rows"]


@pytest.mark.slow
def test_a_failed_run_is_named_and_tried_again(quick, tmp_path, monkeypatch):
    to = [*TINY, "--kinds", "dense", "method", "--seeds", "0", "--json", str(tmp_path / "m.json"), "--methods", "ghfp"]
    to += ["--duty", "0.1"]

    def failing(job):
        if job.spec.method == "ghfp":
            raise FloatingPointError("train: loss: expected a finite number, got nan")
        return trained(job)

    monkeypatch.setattr(quick, "trained", failing)
    assert quick.main(to) == 1
    body = json.loads((tmp_path / "m.json").read_text())
    assert [row["kind"] for row in body["rows"]] == ["dense"]
    assert list(body["failed"]) == ["vgg_small seed 0 method 1 epochs ghfp 0.5 duty 0.1"]
    assert "got nan" in next(iter(body["failed"].values()))
    monkeypatch.setattr(quick, "trained", trained)
    assert quick.main([*to, "--resume"]) == 0
    body = json.loads((tmp_path / "m.json").read_text())
    assert [row["kind"] for row in body["rows"]] == ["dense", "method"] and body["failed"] == {}


@pytest.mark.slow
def test_a_yardstick_changes_no_weight(quick):
    """A run draws the random numbers that it draws without one."""
    spec, setting = Spec("vgg_small", "method", 5, 1, "prune-while-training", 0.5, 0.1), SMALL
    found = trained(Job(spec, setting))
    torch.manual_seed(99)
    data = run.loaded("digits", 8, 256, 0)
    trainer = run.Trainer(spec.config(setting), data=data)
    trainer.run_epoch()
    last = trainer.history[-1]
    assert (last["accuracy"], last["train_accuracy"]) == (found.accuracy, found.train_accuracy)


SMALL = Setting("digits", 256, 0, 8, 0.25, "masked", 1)


# ---- which runs, in which order


def asked(**given):
    common = {
        "archs": ["resnet20", "vgg_small"], "methods": ["sfp", "ghfp"], "rates": [0.5], "seeds": [0, 1], "epochs": 8,
        "duty": 0.1, "kinds": ["dense", "method", "scratch", "scratch-time", "literal"],
    }  # fmt: skip
    return Asked(**common | given)


def test_seed_by_seed():
    specs = asked().specs([])
    assert [str(spec) for spec in specs if spec.arch == "vgg_small" and spec.seed == 0] == [
        "vgg_small seed 0 dense 8 epochs",
        "vgg_small seed 0 method 8 epochs sfp 0.5 duty 0.1",
        "vgg_small seed 0 method 8 epochs ghfp 0.5 duty 0.1",
        "vgg_small seed 0 literal 8 epochs sfp 0.5 duty 1",
        "vgg_small seed 0 literal 8 epochs ghfp 0.5 duty 1",
    ]
    assert [spec.seed for spec in specs] == sorted(spec.seed for spec in specs)
    assert [spec.kind for spec in specs[:4]] == ["dense", "dense", "method", "method"]


def test_architectures_are_trained_once():
    """Two methods that leave one architecture share its training; so do the longer ones with as many epochs."""
    rows = [
        training_row(method="sfp", key="100-a", seconds=40.0),
        training_row(method="ghfp", key="100-a", seconds=39.0),
        training_row(method="pgp", key="200-b", seconds=20.0),
        training_row(method="sfp", key="300-c", duty=1.0, kind="literal"),
        training_row(method="sfp", key="400-d", seed=7),
    ]
    specs = asked(methods=["sfp", "ghfp", "pgp"], archs=["vgg_small"], seeds=[0]).specs(rows)
    scratch = [(spec.key, spec.epochs) for spec in specs if spec.kind == "scratch"]
    assert scratch == [("100-a", 8), ("200-b", 8), ("100-a", 16)]  # pgp took no longer than its small network


def test_masks_are_those_of_the_seeds_first_run(script):
    setting = Setting("digits", None, 0, None, 1.0, "auto", 1)
    rows = [
        training_row(method="sfp", key="100-a", masks={"filter_mask": "0f"}),
        training_row(method="ghfp", key="100-a", masks={"filter_mask": "f0"}),
        training_row(method="asfp", key="100-a", masks={"filter_mask": "ff"}, seed=1),
        training_row(method="none", kind="scratch", key="100-a"),
    ]
    spec = Spec("vgg_small", "scratch", 0, 8, key="100-a")
    assert script.job_of(spec, setting, rows).masks == {"filter_mask": "f0"}
    assert script.job_of(spec, setting, rows[::-1]).masks == {"filter_mask": "f0"}
    assert script.job_of(Spec("vgg_small", "dense", 0, 8), setting, rows).masks == {}


def test_each_setting_once(script):
    args = script.parse(
        ["--methods", "sfp", "pgp", "--rates", "0.5", "0.7", "--sweep", "0.1", "1", "--swept", "sfp", "--seeds", "0"]
        + ["--arch", "vgg_small", "--kinds", "method", "sweep", "--duty", "0.1"]
    )
    assert [str(spec).partition("epochs ")[2] for spec in script.asked(args).specs([])] == [
        "sfp 0.5 duty 0.1", "sfp 0.7 duty 0.1", "pgp 0.5 duty 0.1", "pgp 0.7 duty 0.1",
        "sfp 0.5 duty 0.1", "sfp 0.5 duty 1", "sfp 0.5 duty 0.1 clip=False",
    ]  # fmt: skip


def test_budgets_and_their_uniform_rates():
    wanted = asked(kinds=["budget", "uniform"], seeds=[0], archs=["vgg_small"], budgets=["ghfp"])
    assert [str(spec) for spec in wanted.specs([])] == [
        "vgg_small seed 0 budget 8 epochs ghfp 0.5 duty 0.1 budget=flops"
    ]
    both = asked(
        kinds=["uniform"], seeds=[0], archs=["vgg_small"], budgets=["ghfp"], uniform_rates={"vgg_small": 0.3}
    ).specs([])
    assert [str(spec) for spec in both] == ["vgg_small seed 0 uniform 8 epochs ghfp 0.3 duty 0.1"]


@pytest.mark.parametrize(
    ("steps", "expected"), [([(0.1234, 0.6), (0.3, 0.4)], 0.3), ([(0.2, 0.5), (0.2001, 0.4)], 0.2001)]
)
def test_uniform_rate_leaves_at_least_half(monkeypatch, steps, expected):
    """The largest rate before the share that it leaves falls below one half."""

    def left_by(arch, rate, setting, data):
        return next((left for end, left in steps if rate <= end), 0.1)

    monkeypatch.setattr(uniform, "left_by", left_by)
    largest = max(r / 10_000 for r in range(5000) if left_by("", r / 10_000, None, None) >= 0.5)
    assert uniform.uniform_rate("resnet20", SMALL, None) == largest < expected


def test_what_a_rate_of_all_layers_leaves():
    data = run.loaded("digits", 8, 256, 0)
    whole, half = (uniform.left_by("vgg_small", rate, SMALL, data) for rate in (0.0, 0.5))
    assert whole == 1 and 0.2 < half < 0.3


@pytest.mark.parametrize("method", METHODS)
def test_how_a_method_runs(method):
    setting = Setting("fashion-mnist", 20_000, 0, None, 0.5, "auto", 1)
    ours = Spec("resnet20", "method", 1, 8, method, 0.5, 0.1).config(setting)
    is_coupled = "coupling" in keyword_options(setup.known_methods()[method])
    assert (ours.mode, ours.duty, ours.preset, ours.evaluate) == ("auto", 0.1, None, "end")
    assert ours.options == ({"coupling": "joint"} if is_coupled else {}) and ours.train_images == 20_000
    assert ours.amp and not Spec("resnet20", "method", 1, 8, method, 0.5, 0.1).config(SMALL).amp  # as auto chooses
    literal = Spec("resnet20", "literal", 1, 8, method, 0.5, 1.0).config(setting)
    assert (literal.mode, literal.duty, literal.preset, literal.options) == ("dense", 1, "paper", {})
    assert not literal.amp
    for name in ("epochs", "batch", "lr", "momentum", "weight_decay", "seed", "width", "data"):
        assert getattr(literal, name) == getattr(ours, name)


# ---- the command line


@pytest.mark.parametrize(
    ("data", "suits"),
    [("digits", (20, 1, None)), ("fashion-mnist", (8, 0.5, 20_000)), ("cifar10:x", (8, 0.5, None))],
)
def test_what_suits_a_data_set(script, data, suits):
    args = script.parse(["--data", data])
    assert (args.epochs, args.width, args.train_images, args.mode) == (*suits, "auto")


@pytest.mark.parametrize(("old", "new"), [("network", "live"), ("layer", "masked"), ("masked", "masked")])
def test_the_old_name_of_the_mode_is_understood(script, capsys, old, new):
    assert script.parse(["--gear", old]).mode == new
    assert capsys.readouterr().err == "warning: --gear is now --mode\n"


@pytest.mark.parametrize(
    "arguments",
    [
        "--arch alexnet", "--rates 1", "--sweep 1.5", "--methods adam", "--epochs 0", "--kinds small",
        "--methods --kinds method", "--kinds literal --methods",
    ],
)  # fmt: skip
def test_bad_arguments(script, arguments, capsys):
    with pytest.raises(SystemExit):
        script.main(arguments.split())
    assert "error: argument" in capsys.readouterr().err


def test_resuming_needs_a_file_of_the_same_setting(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.parse(["--resume"])
    assert "--resume goes on with a --json file" in capsys.readouterr().err
    args = script.parse(["--json", str(tmp_path / "m.json"), "--seeds", "0"])
    record = script.Record(args, script.trainings_report(0.1), [], {}, rows=[training_row(setting="other")])
    with pytest.raises(SystemExit, match="expected rows of digits, all training images, width 1, .* got other"):
        script.train(record, script.asked(args), script.setting_of(args))
