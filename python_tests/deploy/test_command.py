"""python -m prunekernels shrink RUN --format ...: the folder of a run's small network."""

import pytest
import torch

import prunekernels as pk
from cases.train import tiny_run
from prunekernels import cli
from prunekernels.train.finalize import finalize_run


@pytest.fixture
def trained(tmp_path):
    run = tiny_run(tmp_path / "run", method="ghfp", epochs=1)
    run.run()
    return run


@pytest.mark.slow
def test_formats(trained, capsys, monkeypatch):
    monkeypatch.setattr("prunekernels.train.run.resumed_run", lambda out, given: trained)
    finalize_run(trained)
    folder = trained.out / "small"
    for formats in (["safetensors"], ["pt2", "safetensors"]):  # again: the folder is replaced
        assert cli.main(["shrink", str(trained.out), "--format", *formats]) == 0
        assert str(folder / "README.md") in capsys.readouterr().out
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "model.pt2", "README.md"}
    small = torch.load(trained.out / "small.pt", weights_only=False)
    x = trained.data.normalised(trained.data.test.images)
    assert torch.equal(pk.load_small(folder)(x), small(x))
    card = (folder / "README.md").read_text()
    assert "accuracy on the test set" in card and "Pruned by: ghfp, rate 0.5" in card and "| live |" in card


def test_unknown_format(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["shrink", str(tmp_path), "--format", "tflite"])
    assert "invalid choice: 'tflite'" in capsys.readouterr().err
