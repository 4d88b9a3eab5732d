"""python -m prunekernels: its commands, and errors in one line."""

import re
import subprocess
import sys

import pytest
import torch

import prunekernels as pk
from prunekernels import cli
from prunekernels.train import checkpoint, compiling, demo, finalize
from prunekernels.train import run as module
from prunekernels.train.run import train

QUICK = ["--arch", "vgg_small", "--width", "0.25", "--size", "8", "--batch", "512", "--epochs", "2", "--quiet"]


def run_train(out, *arguments):
    return cli.main(["train", "--out", str(out), *QUICK, *arguments])


@pytest.fixture(autouse=True)
def _extras(monkeypatch):
    monkeypatch.setattr(finalize, "SECONDS", 0.1)
    for name in ("sklearn", "matplotlib"):
        pytest.importorskip(name)


@pytest.mark.slow
def test_train_resume_shrink(tmp_path, capsys):
    out = tmp_path / "a"
    assert run_train(out, "--method", "ghfp", "--set", "hard=1.0", "--duty", "0", "--stop-after", "1") == 0
    assert "stopped after 1 of 2 epochs: --resume goes on" in capsys.readouterr().out
    assert [p.name for p in out.iterdir()] == ["checkpoint.pt"]
    assert cli.main(["train", "--out", str(out), "--resume", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "small network" in said and str(out / "report.html") in said
    files = {"checkpoint.pt", "small.pt", "summary.json", "report.html", "accuracy.png", "filters.png", "time.png"}
    assert {p.name for p in out.iterdir()} == files
    (out / "small.pt").unlink()
    assert cli.main(["shrink", str(out)]) == 0
    assert "shrink: " in capsys.readouterr().out and (out / "small.pt").exists()
    assert cli.main(["train", "--out", str(out), "--resume", "--quiet"]) == 0  # nothing left to train


@pytest.mark.slow
def test_a_compacted_run_stops_and_resumes_to_the_same_bits(tmp_path, capsys):
    given = ("--method", "pgp", "--mode", "compacted", "--epochs", "3", "--deterministic")
    assert run_train(tmp_path / "whole", *given) == 0
    assert "this (compacted mode) " in capsys.readouterr().out
    assert run_train(tmp_path / "parts", *given, "--stop-after", "2") == 0
    assert run_train(tmp_path / "parts", *given, "--resume") == 0
    whole, parts = (checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    assert all(torch.equal(value, parts["model"][name]) for name, value in whole["model"].items())
    assert "compacted mode, 3 epochs" in (tmp_path / "parts" / "report.html").read_text()
    assert run_train(tmp_path / "parts", *given, "--resume") == 0  # nothing left to train


@pytest.mark.slow
def test_a_budget_of_multiply_adds_and_rates_by_layer(tmp_path, capsys):
    given = ("--method", "prune-while-training", "--mode", "live", "--no-report", "--set", "budget=flops")
    assert run_train(tmp_path, *given, "--set", "rates={'stage1*': 0.25}", "--set", "floor=0.2") == 0
    said = capsys.readouterr().out
    small, whole = (int(text.replace(",", "")) for text in re.search(r", ([\d,]+) of ([\d,]+) multiply", said).groups())
    assert 0.4 * whole < small <= 0.5 * whole
    method = checkpoint.load(tmp_path / "checkpoint.pt")["method"]
    assert [counts[0] for name, counts in method["history"][-1].items() if "stage1" in name] == [6, 6]


@pytest.mark.slow
def test_rates_of_no_layer_are_an_error(tmp_path, capsys):
    assert run_train(tmp_path, "--method", "sfp", "--set", "rates={'stage9*': 0.25}") != 0
    assert "SFP: rates: expected names or patterns of layers that are pruned, got 'stage9*'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "compacted"])
def test_compile_is_an_option_of_compacted_runs(tmp_path, monkeypatch, capsys, mode):
    compile_with = torch.compile
    monkeypatch.setattr(compiling.torch, "compile", lambda f: compile_with(f, backend="aot_eager"))
    given = ("--method", "ghfp", "--mode", mode, "--compile", "--compile-after", "0", "--epochs", "1", "--no-report")
    given += ("--set", "wake=together", "--batch", "64", "--set", "warm_up=0")
    arguments = [name for name in QUICK if name != "--quiet"]
    assert cli.main(["train", "--out", str(tmp_path), *arguments, *given]) == 0
    said = capsys.readouterr().out
    waited = [int(steps) for steps in re.findall(r"the same masks for (\d+) steps: eager", said)]
    assert waited and (mode == "auto" or waited[0] == 0)  # auto waits until the mode for these masks is known
    assert said.count("of the filters live: ") == (1 if mode == "auto" else 0)


@pytest.mark.slow
def test_a_report_after_all(tmp_path):
    assert run_train(tmp_path, "--no-report") == 0
    assert not (tmp_path / "report.html").exists()
    assert cli.main(["train", "--out", str(tmp_path), "--resume", "--report", "--quiet"]) == 0
    assert (tmp_path / "report.html").exists()


def test_a_run_is_not_overwritten(tmp_path, capsys):
    assert run_train(tmp_path, "--stop-after", "1") == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    assert run_train(tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: train: out: expected a folder without a run, or --resume or --overwrite, got ")
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert run_train(tmp_path, "--overwrite", "--seed", "1", "--stop-after", "1") == 0
    assert (tmp_path / "checkpoint.pt").read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--rate", "1"], r"train: rate: expected a number in [0, 1), got 1.0"),
        (["--method", "magic"], "train: method: expected one of none, "),
        (["--data", "folder:nowhere"], "data: expected a folder of class folders, got no folder nowhere"),
        (["--resume"], "expected what `prunekernels train` wrote, got no such file"),
        (["--beside", "nowhere"], "nowhere/checkpoint.pt: expected what"),
        (["--small-of", "nowhere"], "nowhere/checkpoint.pt: expected what"),
        (["--small-of", "nowhere", "--method", "sfp"], "nowhere/checkpoint.pt: expected what"),
    ],
)
def test_bad_input(tmp_path, capsys, arguments, text):
    assert run_train(tmp_path / "a", *arguments) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1 and not (tmp_path / "a").exists()


def test_resume_as_another_run(tmp_path, capsys):
    assert run_train(tmp_path, "--method", "ghfp", "--stop-after", "1") == 0
    assert run_train(tmp_path, "--method", "pgp", "--resume") == 2
    assert "train: method: expected 'ghfp', as in" in capsys.readouterr().err


@pytest.mark.parametrize(("gear", "mode"), [("network", "live"), ("layer", "masked")])
def test_gear_is_a_deprecated_name_of_mode(tmp_path, capsys, gear, mode):
    assert run_train(tmp_path, "--gear", gear, "--stop-after", "1") == 0
    assert f"warning: --gear is deprecated: use --mode {mode}" in capsys.readouterr().err
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    assert state["config"]["mode"] == mode and "gear" not in state["config"]
    assert run_train(tmp_path, "--mode", mode, "--resume", "--no-report") == 0
    assert capsys.readouterr().err == ""


def test_a_checkpoint_with_a_gear_resumes(tmp_path):
    assert run_train(tmp_path, "--mode", "masked", "--stop-after", "1") == 0
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    del state["config"]["mode"]
    checkpoint.save(tmp_path / "checkpoint.pt", {**state, "config": {**state["config"], "gear": "layer"}})
    assert cli.main(["train", "--out", str(tmp_path), "--resume", "--quiet", "--no-report"]) == 0
    assert checkpoint.load(tmp_path / "checkpoint.pt")["config"]["mode"] == "masked"


def test_gear_is_not_in_the_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    said = capsys.readouterr().out
    assert "--mode" in said and "gear" not in said.lower()


def test_out_is_a_file(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(NotADirectoryError, match="train: out: expected a folder, got the file"):
        train({"out": str(tmp_path / "a")})


@pytest.mark.parametrize(
    ("module", "name", "extra"),
    [("matplotlib", "matplotlib", "cli"), ("sklearn.datasets", "scikit-learn", "demo")],
)
def test_missing_packages_are_named_before_the_first_epoch(tmp_path, monkeypatch, capsys, module, name, extra):
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["train", "--out", str(tmp_path / "a"), "--epochs", "1"]) == 2
    assert f'expected {name}: pip install "prunekernels[{extra}]"' in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("text", ["hard", "=1", "a b=1"])
def test_settings_that_are_none(tmp_path, text):
    with pytest.raises(SystemExit):
        run_train(tmp_path, "--set", text)


def test_an_interrupted_run(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train", interrupted)
    assert run_train(tmp_path) == 130
    assert "train: interrupted" in capsys.readouterr().err


@pytest.mark.slow
def test_demo(tmp_path):
    text = demo.demo(tmp_path, 1, arch="vgg_small", size=8, width=0.25, batch=512, quiet=True)
    assert "times as fast as dense" in text and str(tmp_path / "ghfp" / "report.html") in text
    assert (tmp_path / "dense" / "checkpoint.pt").exists() and (tmp_path / "ghfp" / "report.html").exists()


def test_info(capsys):
    assert cli.main(["info"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"prunekernels {pk.__version__}, torch {torch.__version__}")
    assert ("isa: " in said) == pk.has_extension()


def test_bench(tmp_path, monkeypatch, capsys):
    called = []
    monkeypatch.setattr(
        cli.subprocess, "run", lambda command: called.append(command) or subprocess.CompletedProcess([], 0)
    )
    assert cli.main(["bench"]) == 0 and called[-1][1].endswith("conv.py") and called[-1][2:] == ["--suite", "tiny"]
    assert cli.main(["bench", "conv", "--kept", "0.5"]) == 0 and called[-1][2:] == ["--kept", "0.5"]
    assert cli.main(["bench", "nothing"]) == 2
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "prunekernels" / "cli.py"))
    assert cli.main(["bench"]) == 2
    assert "expected a checkout of the repository, got an installed package" in capsys.readouterr().err


def test_the_package_needs_none_of_the_extras():
    code = "import sys, prunekernels, prunekernels.cli, prunekernels.train.run\n"
    code += (
        "print([name for name in ('sklearn', 'matplotlib', 'PIL', 'onnx') if name in sys.modules])"  # torch loads tqdm
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
