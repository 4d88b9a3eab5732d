"""The command `sensitivity`: each layer of a run's network pruned alone."""

import json

import pytest
import torch

from cases.train import tiny_data, tiny_run
from prunekernels import cli
from prunekernels.train import loop
from prunekernels.train.run import sensitivity_run


@pytest.fixture(autouse=True)
def _data(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(loop, "load", lambda *_: tiny_data())


@pytest.mark.parametrize(("method", "validation"), [("none", 16), ("ghfp", 0)])
def test_a_finished_run(tmp_path, capsys, method, validation):
    """It evaluates validation images; without any, training images that are spread over the set."""
    run = tiny_run(tmp_path, method=method, mode="dense", epochs=1, validation=validation)
    run.run()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    assert cli.main(["sensitivity", str(tmp_path), "--images", "24"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("accuracy as it is: ") and f"of {validation or 24} images" in told and str(tmp_path) in told
    found = json.loads((tmp_path / "sensitivity.json").read_text())
    layers = [name for name, m in run.model.named_modules() if isinstance(m, torch.nn.Conv2d)]
    assert [name for row in found["rows"] for name in row["layers"]] == layers and found["images"] == (validation or 24)
    half = [row["dead"][4] for row in found["rows"]]
    assert half == [row["filters"] // 2 for row in found["rows"]]
    if method == "ghfp":  # that many are dead already
        assert all(row["values"][0] == found["base"] and row["saved"][0] == 0 for row in found["rows"])
    assert "| layer | filters | 0.1 |" in (tmp_path / "sensitivity.md").read_text()
    assert (tmp_path / "sensitivity.png").read_bytes()[1:4] == b"PNG"
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_what_is_refused(tmp_path, capsys):
    assert cli.main(["sensitivity", str(tmp_path)]) == 2
    assert "got no such file" in capsys.readouterr().err
    with pytest.raises(ValueError, match="sensitivity: images: expected at least 1, got 0"):
        sensitivity_run(tmp_path, 0)
