"""report.html: one file with everything in it."""

import re

import pytest
import torch

from prunekernels.train.config import Config
from prunekernels.train.report import PICTURES, write_report

LAYERS = {"stem": 8, "stage<1>.conv": 16}
SUMMARY = {
    "accuracy": 0.91, "small_accuracy": 0.92, "agreed": 9, "test_images": 10, "checked": "shrink: fine & small",
    "epochs": 3, "seconds": 6.0, "epoch_seconds": 2.0, "parameters": 1000, "small_parameters": 400,
    "multiply_adds": 9000, "small_multiply_adds": 3000, "epoch_of": {"dense": 2.0, "this": 1.0, "small": 0.8},
    "mode": "compacted mode, by auto", "threads": 2, "device": "cpu", "torch": "2",
}  # fmt: skip


def history(epochs):
    row = {"loss": 1.0, "train_accuracy": 0.8, "accuracy": 0.7, "live": 0.5, "seconds": 2.0}
    return [dict(row) for _ in range(epochs)]


@pytest.mark.parametrize(("epochs", "beside"), [(1, None), (3, 5)])
def test_report(tmp_path, epochs, beside):
    pytest.importorskip("matplotlib")
    states = torch.zeros(epochs, 24, dtype=torch.uint8)
    states[0, 8:12], states[-1, 20:] = 1, 2
    dense = {"dense": history(beside)} if beside else None
    config = Config("runs/a", method="ghfp", data="folder:<here>")
    path = write_report(tmp_path, config, history(epochs), LAYERS, states, SUMMARY, dense)
    page = path.read_text()
    assert "resnet20 on folder:&lt;here&gt;: ghfp at 0.5" in page and "stage&lt;1&gt;.conv" in page
    assert page.count("data:image/png;base64,") == len(PICTURES) and not re.search(r'(src|href)="(?!data:)', page)
    assert "compacted mode, by auto, 3 epochs, cpu, 2 threads, torch 2" in page
    assert "9 of 10 test images. shrink: fine &amp; small." in page and "<td>2.00</td>" in page
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*PICTURES, "report.html"])
    came_back = 4 if epochs > 1 else 0
    assert re.search(
        rf"<td>16</td><td>{12 if epochs > 1 else 8}</td><td>{4 - came_back}</td><td>4</td><td>{came_back}</td>", page
    )


def test_report_of_a_run_with_validation(tmp_path):
    """Epochs, and the dense run beside, are evaluated on other images than the small network."""
    pytest.importorskip("matplotlib")
    rows = history(3)
    rows[0]["accuracy"] = rows[1]["accuracy"] = float("nan")  # evaluated at the end
    summary = {**SUMMARY, "validation_accuracy": 0.7}
    states = torch.zeros(3, 24, dtype=torch.uint8)
    page = write_report(
        tmp_path, Config("a", evaluate="end"), rows, LAYERS, states, summary, {"dense": history(3)}
    ).read_text()
    assert "<td>accuracy on validation images</td><td>0.7000</td><td>0.7000</td><td></td>" in page
    assert "<td>accuracy on the test set</td><td></td><td>0.9100</td><td>0.9200</td>" in page and ">nan<" not in page


def test_runs_beside(tmp_path):
    """Each has a column of its own, behind those of the run; the dense one is the first column."""
    pytest.importorskip("matplotlib")
    beside = {"scratch": history(3), "dense": history(4), "scratch, 5 epochs": history(5)}
    beside["scratch"][-1]["accuracy"] = float("nan")
    states = torch.zeros(3, 24, dtype=torch.uint8)
    path = write_report(tmp_path, Config("a", small_of="runs/<b>"), history(3), LAYERS, states, SUMMARY, beside)
    page = path.read_text()
    heads = ("", "dense", "this run", "small network", "scratch", "scratch, 5 epochs")
    assert "".join(f"<th>{head}</th>" for head in heads) in page
    accuracies = ("0.7000", "0.9100", "0.9200", "", "0.7000")
    assert "<td>accuracy on the test set</td>" + "".join(f"<td>{cell}</td>" for cell in accuracies) in page
    seconds = ("8.0", "6.0", "", "6.0", "10.0")
    assert "<td>seconds, all epochs</td>" + "".join(f"<td>{cell}</td>" for cell in seconds) in page
    assert "the small network of runs/&lt;b&gt;, from scratch" in page


def test_matplotlib_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'train: report: expected matplotlib: pip install "prunekernels\[cli\]"'):
        write_report(tmp_path, Config("a"), history(1), LAYERS, torch.zeros(1, 24), SUMMARY)
    assert not list(tmp_path.iterdir())
