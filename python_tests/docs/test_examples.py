"""The scripts of examples/ do what they say."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from cases.pages import ROOT

SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_script_has_a_test():
    assert SCRIPTS == ["ddp", "prune_one_layer", "shrink_and_export", "train_resnet_ghfp"]


def test_prune_one_layer(capsys):
    layer = load("prune_one_layer").main(["--channels", "16", "--size", "8", "--rounds", "1"])
    assert int(layer.filter_mask.sum()) == 8
    assert "filters=8/16" in capsys.readouterr().out


@pytest.mark.slow
def test_train_resnet_ghfp(capsys):
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    model, _ = load("train_resnet_ghfp").main(["--epochs", "2", "--size", "8", "--batch", "256"])
    masks = [m.hard_mask for m in model.modules() if hasattr(m, "hard_mask")]
    live = sum(int(mask.sum()) for mask in masks)
    assert abs(live / sum(len(mask) for mask in masks) - 0.5) < 0.02
    assert capsys.readouterr().out.count("accuracy") == 2


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_shrink_and_export(suffix, tmp_path):
    torch.manual_seed(0)
    out = tmp_path / f"small.{suffix}"
    x = torch.randn(3, 3, 16, 16)
    if suffix == "onnx":
        runtime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        small = load("shrink_and_export").main(["--size", "16", "--out", str(out)])
        session = runtime.InferenceSession(out)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        got = torch.from_numpy(got)
    else:
        small = load("shrink_and_export").main(["--size", "16", "--out", str(out)])
        got = torch.export.load(out).module()(x)
    torch.testing.assert_close(got, small(x), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_ddp():
    """As torchrun starts it, on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["examples/ddp.py", "--epochs", "2", "--images", "256"]
    given = {**os.environ, "OMP_NUM_THREADS": "1", "PRUNEKERNELS_MEASURE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=given, timeout=100)
    has_aborted = "terminate called without an active exception" in done.stderr  # gloo's threads, after the end of main
    assert done.returncode == 0 or has_aborted, done.stderr
    assert done.stdout.count("masks equal on all 2 ranks") == 2
    assert "GHFP(epoch 2/2; filters: 40 live, 0 soft, 40 hard)" in done.stdout
