"""The scripts of examples/ do what they say."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from cases.idx import write_idx
from cases.pages import ROOT
from cases.yolo import go_offline, write_model

SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


def load(name):
    if str(ROOT / "examples") not in sys.path:  # as for a script: they share examples/fashion
        sys.path.append(str(ROOT / "examples"))
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_script_has_a_test():
    assert SCRIPTS == [
        "adapt_fashion", "ddp", "detect_fashion", "hf_prune", "lightning_prune", "prune_one_layer", "shrink_and_export",
        "train_resnet_ghfp", "yolo_prune",
    ]  # fmt: skip


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


COMPARISONS = {
    "detect_fashion": ["dense", "PGP", "scratch"],
    "adapt_fashion": ["source alone", "dense", "PGP", "scratch"],
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_pgp_on_other_tasks(name, tmp_path, capsys):
    """Detection and domain adaptation, a few steps of each."""
    write_idx(tmp_path / "items", (28, 28), counts=(60, 10), classes=10)
    files = [tmp_path / "rows.json", tmp_path / "rows.md"]
    command = ["--tiny", "--data", str(tmp_path / "items"), "--json", str(files[0]), "--md", str(files[1]), "--seeds"]
    rows = load(name).main([*command, "3"])
    assert [row.run for row in rows] == COMPARISONS[name] and {row.seed for row in rows} == {3}
    small, scratch, dense = (next(r for r in rows if r.run == run) for run in ("PGP", "scratch", "dense"))
    assert (small.multiply_adds, small.parameters) == (scratch.multiply_adds, scratch.parameters)
    assert small.multiply_adds < 0.35 * dense.multiply_adds and small.parameters < 0.35 * dense.parameters
    assert all(0 <= row.score <= 100 and row.seconds > 0 for row in rows)

    printed = capsys.readouterr().out
    again = load(name).main([*command, "3"])  # from the file
    assert again == rows and "shrink" in printed and "shrink" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="--json: .*expected results of .*'rate': 0.3.*take another file"):
        load(name).main([*command, "4", "--rate", "0.3"])
    stored = json.loads(files[0].read_text())
    assert len(stored["rows"]) == len(rows) and {"command", "commit", "cpu", "torch"} <= set(stored["header"])
    assert "| PGP | " in files[1].read_text() and "PGP over scratch: " in files[1].read_text()


@pytest.mark.parametrize("name, option", [("detect_fashion", "--canvases"), ("adapt_fashion", "--images")])
def test_less_than_a_batch_is_an_error(name, option, tmp_path, capsys):
    write_idx(tmp_path / "items", (28, 28), counts=(60, 10), classes=10)
    with pytest.raises(SystemExit):
        load(name).main([option, "8", "--batch", "16", "--data", str(tmp_path / "items")])
    assert f"{option}: expected " in capsys.readouterr().err


def test_domains_share_no_item(tmp_path, capsys):
    write_idx(tmp_path / "items", (28, 28), counts=(60, 10), classes=10)
    with pytest.raises(SystemExit):
        load("adapt_fashion").main(["--images", "26", "--batch", "4", "--data", str(tmp_path / "items")])
    assert "--images: expected 4 to 25, half of the items, got 26" in capsys.readouterr().err


def test_a_comparison_tells_means_and_spreads(capsys):
    load("detect_fashion")
    from fashion import comparison

    rows = [
        comparison.Row("dense", 0, 80, 10, 100, 50), comparison.Row("PGP", 0, 78, 5, 25, 10),
        comparison.Row("scratch", 0, 77, 4, 25, 10), comparison.Row("dense", 1, 82, 10, 100, 50),
        comparison.Row("PGP", 1, 81, 7, 25, 10), comparison.Row("scratch", 1, 81.5, 4, 25, 10),
    ]  # fmt: skip
    assert comparison.table(rows, "points").splitlines()[2:] == [
        "| dense | 81.00 | 2.00 | 1.00 | 1.00 | 1.00 |",
        "| PGP | 79.50 | 3.00 | 0.60 | 0.25 | 0.20 |",
        "| scratch | 79.25 | 4.50 | 0.40 | 0.25 | 0.20 |",
    ]
    assert comparison.by_seed(rows) == "PGP over scratch: +0.25 points; by seed +1.00, -0.50"


@pytest.mark.slow
@pytest.mark.parametrize("name, libraries", [("lightning", ["lightning"]), ("hf", ["transformers", "accelerate"])])
@pytest.mark.filterwarnings("ignore:.*(num_workers|LeafSpec|isinstance)")
def test_trainers_of_libraries(name, libraries, capsys):
    for library in libraries:
        pytest.importorskip(library, reason=f"needs {library}: pip install prunekernels[integrations]")
    small = load(f"{name}_prune").main(["--epochs", "4", "--images", "128"])
    filters = [m.out_channels for m in small.modules() if isinstance(m, torch.nn.Conv2d)]
    assert filters == ([8, 16, 16] if name == "lightning" else [8, 8, 8, 16, 16, 16][: len(filters)])
    assert "accuracy of the small network: " in capsys.readouterr().out


@pytest.mark.slow
def test_yolo(tmp_path, capsys):
    go_offline()
    ultralytics = pytest.importorskip("ultralytics", reason="needs ultralytics: pip install prunekernels[ultralytics]")
    model = str(write_model(tmp_path))
    small = load("yolo_prune").main(["--model", model, "--epochs", "3", "--images", "8", "--out", str(tmp_path)])
    assert (tmp_path / "small.torchscript").exists()
    assert "of " in capsys.readouterr().out
    again = ultralytics.YOLO(tmp_path / "small.pt").model
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in small.parameters())
