"""--log: the numbers of each epoch, as TensorBoard, Weights & Biases and MLflow have them. With the real libraries."""

import json
import subprocess
import sys

import pytest

from prunekernels import cli
from prunekernels.train import checkpoint, finalize
from prunekernels.train.loggers import Loggers
from prunekernels.train.run import train

QUICK = {
    "arch": "vgg_small", "width": 0.25, "size": 8, "batch": 512, "epochs": 3, "quiet": True, "report": False,
    "method": "sfp",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(finalize, "SECONDS", 0.0)


def trained(out, *loggers):
    """A run in two parts. Returns the rows of its history."""
    given = {**QUICK, "out": str(out), "log": list(loggers)}
    train({**given, "stop_after": 2})
    train(given, resume=True)
    return checkpoint.load(out / "checkpoint.pt")["history"]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = trained(tmp_path / "a", "tensorboard")
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {*history[0], "method/live", "method/live_share_of/stage1_1.conv"} <= set(tags["scalars"])
    for name in history[0]:
        values = events.Scalars(name)
        assert [event.step for event in values] == [1, 2, 3]
        assert [event.value for event in values] == pytest.approx([row[name] for row in history], rel=1e-6)
    assert "settings/text_summary" in tags["tensors"]


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trained(tmp_path / "a", "wandb")
    runs = list((tmp_path / "a" / "wandb").glob("offline-run-*/*.wandb"))
    known = json.loads((tmp_path / "a" / "loggers.json").read_text())["wandb"]
    assert len(runs) == 2 and all(known in path.name for path in runs)


def test_mlflow_in_files(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    history = trained(tmp_path / "a", "mlflow")
    client = mlflow.MlflowClient()
    known = json.loads((tmp_path / "a" / "loggers.json").read_text())["mlflow"]
    (run,) = client.search_runs([client.get_experiment_by_name("prunekernels").experiment_id])
    assert run.info.run_id == known and run.info.status == "FINISHED" and run.data.params["method"] == "sfp"
    for name in ("loss", "accuracy"):
        values = sorted((metric.step, metric.value) for metric in client.get_metric_history(known, name))
        assert values == [(epoch, row[name]) for epoch, row in enumerate(history, 1)]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_named_before_the_first_epoch(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["train", "--out", str(tmp_path / "a"), "--no-report", "--log", name]) == 2
    error = capsys.readouterr().err
    assert f'--log {name}: expected {name}: pip install "prunekernels[log]"' in error
    assert not (tmp_path / "a").exists()


def test_an_unknown_logger(tmp_path, capsys):
    assert cli.main(["train", "--out", str(tmp_path / "a"), "--log", "paper"]) == 2
    assert "train: log: expected some of tensorboard, wandb, mlflow, got 'paper'" in capsys.readouterr().err


def test_nothing_is_imported_without_a_name(tmp_path):
    Loggers((), tmp_path, {}).log({"loss": 1.0}, 1)
    code = "import sys, prunekernels.cli\n"
    code += "print([name for name in ('tensorboard', 'wandb', 'mlflow', 'yaml') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
