"""benchmarks/optim.py does everything on tiny networks."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("optim_benchmark", BENCHMARKS / "optim.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_writes_rows(script, tmp_path, capsys):
    to = ["--json", str(tmp_path / "o.json"), "--md", str(tmp_path / "o.md")]
    assert script.main(["--networks", "tiny_vgg", "tiny_resnet", "--kept", "1.0", "0.5", "--seconds", "0.01", *to]) == 0
    body = json.loads((tmp_path / "o.json").read_text())
    assert "benchmarks/optim.py --networks" in body["header"]["command"]
    assert [(r["network"], r["optimizer"], r["kept"]) for r in body["rows"][:3]] == [
        ("tiny_vgg", "sgd", 1.0),
        ("tiny_vgg", "sgd", 0.5),
        ("tiny_vgg", "adamw", 1.0),
    ]
    assert body["rows"][0]["live"] == 1 and 0.2 < body["rows"][1]["live"] < 0.4
    text = (tmp_path / "o.md").read_text()
    assert text.startswith("# Optimizer benchmark\n") and "| tiny_resnet | adamw | 0.5 |" in text
    assert "rows lost to foreach" in capsys.readouterr().out


def test_checks_before_timing(script, monkeypatch):
    class Wrong(script.MaskedSGD):
        def step(self, closure=None):
            super().step(closure)
            self.param_groups[0]["params"][0].data.add_(1)

    monkeypatch.setitem(script.OURS, "sgd", Wrong)
    with pytest.raises(SystemExit, match="expected torch's step where live"):
        script.row("tiny_vgg", "sgd", 0.5, 0.01)


@pytest.mark.parametrize("arguments", [["--networks", "alexnet"], ["--kept", "0"], ["--optimizers", "adam"]])
def test_bad_arguments(script, arguments, capsys):
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert "error: argument" in capsys.readouterr().err
