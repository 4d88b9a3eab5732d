"""After a pruning the training command estimates the norms' statistics anew, unless training follows."""

import pytest
import torch

from cases.methods import TOGETHER
from cases.train import tiny_data, tiny_run
from prunekernels.train import loop
from prunekernels.train.config import Config
from prunekernels.train.loop import Trainer


@pytest.fixture
def calls(monkeypatch):
    """By call, the epochs that are over, and how many batches there were."""
    found = []
    recalibrate = loop.recalibrate_norms

    def counted(model, batches):
        found.append(recalibrate(model, batches))

    monkeypatch.setattr(loop, "recalibrate_norms", counted)
    return found


def statistics(run):
    return {n: b.clone() for n, b in run.model.named_buffers() if "running" in n}


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ({"method": "ghfp", "duty": 1}, [3, 3, 3]),  # three batches an epoch
        ({"method": "ghfp", "duty": 1, "recalibrate": 2}, [2, 2, 2]),
        ({"method": "ghfp", "duty": 1, "recalibrate": 0}, []),
        ({"method": "ghfp", "duty": 1, "options": {"fine_tune": 2}}, [3]),  # training does it afterwards
        ({"method": "asfp", "duty": 1, "options": {"schedule": lambda r, epoch, epochs: r * (epoch == 2)}}, [3]),
        ({"method": "prune-while-training", "options": {"start": 1, "period": 1, "end": 1}}, [3]),
        ({"method": "ghfp", "duty": 1, "evaluate": "end"}, [3]),
        ({"method": "ghfp", "preset": "paper"}, []),
        ({"method": "none"}, []),
    ],
)
def test_when(calls, given, count):
    run = tiny_run("x", mode="dense", **given)
    for _ in range(3):
        run.run_epoch()
    assert calls == count


def test_statistics_alone_are_another():
    """And only the last ones stay: to evaluate changes nothing of the epochs to come."""
    given = {"method": "ghfp", "mode": "live", "deterministic": True, "epochs": 2, "options": TOGETHER}
    runs = [tiny_run("x", **given, recalibrate=count) for count in (0, 3)]
    for run in runs:
        run.run_epoch()
    plain, other = map(statistics, runs)
    assert all(torch.equal(value, other[name]) for name, value in plain.items())
    for run in runs:
        run.run_epoch()
    plain, other = (dict(run.model.named_parameters()) for run in runs)
    assert all(torch.equal(p, other[name]) for name, p in plain.items())
    plain, other = map(statistics, runs)
    assert any(not torch.equal(value, other[name]) for name, value in plain.items())


def test_resumed_runs_go_on_to_the_same_bits(tmp_path):
    whole = tiny_run(tmp_path / "a", method="ghfp", mode="live", deterministic=True)
    whole.run()
    tiny_run(tmp_path / "b", method="ghfp", mode="live", deterministic=True, stop_after=2).run()
    parts = Trainer.resumed(tmp_path / "b", data=tiny_data())
    parts.run()
    assert parts.history[-1]["accuracy"] == whole.history[-1]["accuracy"]
    other = statistics(parts)
    assert all(torch.equal(value, other[name]) for name, value in statistics(whole).items())


def test_settings():
    assert Config("a", method="ghfp").recalibrate == 20
    assert Config("a", method="ghfp", preset="paper").recalibrate == 0
    with pytest.raises(ValueError, match="train: recalibrate: expected at least 0, got -1"):
        Config("a", recalibrate=-1)
    saved = Config("a", method="ghfp").as_dict()
    del saved["recalibrate"]  # a run from before
    assert Config.resumed(saved, {}, "c.pt").recalibrate == 0
