"""--dry-run: what a training would do, without training or writing anything."""

import re

import pytest
import torch

from prunekernels import cli
from prunekernels.train import checkpoint, dry_run
from prunekernels.train.config import Config
from prunekernels.train.loop import Trainer
from prunekernels.train.run import train
from prunekernels.train.scratch import begun_run

QUICK = {"arch": "vgg_small", "width": 0.25, "size": 8, "batch": 512, "epochs": 2, "quiet": True, "report": False}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(dry_run, "SECONDS", 0.0)
    monkeypatch.setattr(Trainer, "run_epoch", lambda run: pytest.fail("it trains"))


def told(tmp_path, **settings):
    text = dry_run.dry_run({**QUICK, "out": str(tmp_path / "a"), **settings})
    assert not (tmp_path / "a").exists()
    return text


def counts(text):
    return {name: int(live) for name, live in re.findall(r"^(\S+) +\d+ +(\d+)$", text, flags=re.M)}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ghfp", {"budget": {"flops": 0.5}}),
        pytest.param("pgp", {"coupling": "independent", "rates": {"stage1*": 0.0}}, marks=pytest.mark.slow),
        pytest.param("asfp", {"budget": "flops"}, marks=pytest.mark.slow),
        pytest.param("csgd", {}, marks=pytest.mark.slow),
        pytest.param("coarse-pruning", {"masks": 2}, marks=pytest.mark.slow),
    ],
)
def test_what_is_told_is_what_is_left(tmp_path, monkeypatch, method, options):
    text = told(tmp_path, method=method, options=options)
    assert text.startswith(f"vgg_small on digits: {method} at ")
    assert text.endswith("nothing was trained, nothing written")
    run = begun_run({**QUICK, "out": str(tmp_path / "a"), "method": method, "options": options})
    assert counts(text) == {name: int(live.sum()) for name, live in run.method.forecast().items()}
    for _ in range(QUICK["epochs"]):
        for _ in range(run.method.steps_per_epoch or 1):
            torch.nn.functional.cross_entropy(run.model(run.first_batch()[0]), run.first_batch()[1]).backward()
            run.optimizer.step()
            run.method.step()
        run.method.end_epoch()
    if method != "asfp":  # which layers give how much depends on scores there
        assert counts(text) == {name: c.live for name, c in run.method.history[-1].items()}


def test_a_forecast_changes_nothing(tmp_path):
    run = begun_run({**QUICK, "out": str(tmp_path / "a"), "method": "asfp"})
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.method.forecast()
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


def test_without_a_method(tmp_path):
    text = told(tmp_path)
    assert "no method: nothing is pruned" in text and "in the end" not in text
    assert re.search(r"^multiply-adds an image +152,384$", text, flags=re.M)


def test_left_out_layers_are_told_with_the_reason(tmp_path):
    text = told(tmp_path, method="sfp", options={"skip": ["stage2_1.conv"]})
    assert re.search(r"^stage2_1.conv +16 +skip$", text, flags=re.M)


@pytest.mark.slow
def test_a_run_that_resumes(tmp_path, monkeypatch):
    monkeypatch.undo()
    given = {**QUICK, "out": str(tmp_path), "method": "sfp"}
    train({**given, "stop_after": 1})
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(FileExistsError, match="expected a folder without a run, or --resume"):
        dry_run.dry_run(given)
    assert "; epochs 2 to 2 of " in dry_run.dry_run(given, resume=True)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    assert checkpoint.load(tmp_path / "checkpoint.pt")["epoch"] == 1


def test_the_command(tmp_path, capsys):
    given = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items() if name not in ("quiet", "report")]
    assert cli.main(["train", "--out", str(tmp_path / "a"), *given, "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith("nothing was trained, nothing written\n")
    assert cli.main(["train", "--out", str(tmp_path / "a"), *given, "--dry-run", "--rate", "2"]) == 2
    assert not list(tmp_path.iterdir())


def test_every_setting_is_an_option_and_every_option_in_a_group():
    """But for gear, which is deprecated, and options, which --set gives."""
    parser = next(p for p in cli._parser()._subparsers._group_actions[0].choices.items() if p[0] == "train")[1]
    names = {action.dest for action in parser._actions}
    fields = set(Config.__dataclass_fields__) - {"options"}
    assert fields <= names and names - fields == {"help", "set", *cli.ONLY_GIVEN}
    assert [action.dest for action in parser._optionals._group_actions] == ["help"]
