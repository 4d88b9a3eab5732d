"""benchmarks/models.py: what it asks of a network, its rows, summary and files."""

from __future__ import annotations

import json
import signal
import subprocess
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import models
import prunekernels as pk
from library_models import baseline, checks
from library_models.catalog import ENTRIES, Built, Entry, images


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.norm(self.a(x)).relu()
        x = (x + self.b(x)).softmax(1)
        return self.head(self.drop(x.mean((2, 3))))


def tiny():
    torch.manual_seed(0)
    return Built(Tiny(), images(12))


def test_what_is_asked_of_a_network():
    found = checks.check(tiny())
    assert {
        what: found.answers[what] for what in ("converts", "groups", "live", "compacted", "shrink")
    } == dict.fromkeys(("converts", "groups", "live", "compacted", "shrink"), checks.OK)
    assert (found.numbers["converted"], found.numbers["groups"], found.numbers["pruned_groups"]) == (3, 2, 1)
    assert found.numbers["fallbacks"] == {"softmax": 1} and found.numbers["form"] in ("module", "graph")
    assert 0.2 < found.numbers["small"] / found.numbers["dense"] < 1
    assert all(found.numbers[f"{mode}_difference"] < 1e-12 for mode in ("live", "compacted", "shrink"))


def test_a_wrong_result_is_an_answer(monkeypatch):
    real = pk.compacted

    def wrong(model, example, optimizer):
        with torch.no_grad():
            model.head.weight[0, 0] += 1e-3
        return real(model, example, optimizer)

    monkeypatch.setattr(pk, "compacted", wrong)
    monkeypatch.setattr(pk, "shrink", lambda *_: 1 / 0)
    found = checks.check(tiny())
    assert found.answers["compacted"].startswith("outputs differ by ")
    assert found.answers["shrink"] == "ZeroDivisionError: division by zero"
    assert found.answers["onnx"] == "no small network" and found.answers["live"] == checks.OK


def test_what_counts_as_the_same():
    one = [torch.ones(3), torch.full((2,), 1e-6)]
    assert checks.compare("outputs", one, one) == 0
    with pytest.raises(checks.Differs, match="outputs of other shapes"):
        checks.compare("outputs", one, [torch.ones(4), one[1]])
    assert 0 < checks.compare("outputs", one, [one[0], one[1] + 1e-12]) < 1e-8  # beside a value of 1
    with pytest.raises(checks.Differs, match="gradients differ by 9.9e-08"):
        checks.compare("gradients", [torch.ones(3).double()], [torch.ones(3).double() + 9.9e-8])


def test_outputs_are_left_alone_by_torch_pruning():
    assert baseline.outputs_of(tiny()) == {"head"}
    with pytest.raises(TimeoutError, match="not done in 0.01 s"), baseline.limited(0.01):
        while True:
            pass


def row(name, **changed):
    answers = dict.fromkeys(("converts", *models.ASKED), checks.OK)
    values = dict(
        model=name, library="timm", converted=3, layers=4, groups=2, pruned_groups=1, answers=answers, form="module",
        left=0.25, torch_pruning_left=0.26, fallbacks={"softmax": 1}, left_alone={"filter_fn": 1},
    )  # fmt: skip
    return models.ModelRow(**values | changed)


def test_tables_and_files(tmp_path):
    failed = dict.fromkeys(models.ASKED, checks.OK) | {"onnx": "RuntimeError: no"}
    rows = [row("resnet18"), row("vgg11_bn", answers=failed, left=0.3, torch_pruning_left=None)]
    assert "| vgg11_bn | timm | 3/4 | 1/2 | yes | softmax 1 | yes | module | 0.30 | no | yes | - |" in models.table(
        rows, True
    )
    text = models.summary(rows)
    assert "- onnx: 1 of 2\n- onnx: vgg11_bn: RuntimeError: no" in text
    assert "or fewer: 1 of 1" in text and "- left alone: resnet18: 1 x filter_fn" in text
    path = tmp_path / "m.json"
    path.write_text(models.MODELS.json(rows, {"command": "here"}))
    again, missing = models.MODELS.read(path)
    assert again == rows and not missing.failed


def args(*argv):
    return models.parse(["--threads", "1", *argv])


def test_a_network_has_a_process_of_its_own(monkeypatch, tmp_path):
    """The command, with what another process prints."""
    ours = {
        "answers": {"groups": checks.OK},
        "numbers": {"converted": 3, "dense": 8, "small": 2, "live_difference": 0.0},
    }
    theirs = {"answers": {"torch_pruning": "no"}, "numbers": {}}
    said = models.MARK + json.dumps({"layers": 4, "ours": ours, "theirs": theirs})
    asked = []

    def run(words, **_):
        asked.append(words[words.index("--in-process") + 1])
        code = -signal.SIGXCPU if asked[-1] == "vgg11_bn" else 0
        return SimpleNamespace(returncode=code, stdout="noise\n" + said * (not code), stderr="noise")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(models, "header", lambda *_: {"command": "here"})
    monkeypatch.setattr(models, "commit", lambda: "abc1234")
    files = ["--json", str(tmp_path / "m.json"), "--md", str(tmp_path / "m.md")]
    assert models.main(["--only", "vgg11_bn", "resnet18", "--threads", "1", *files]) == 1  # one failed
    assert models.main(["--only", "vgg11_bn", "resnet18", "--threads", "1", "--resume", *files]) == 1
    assert asked == ["vgg11_bn", "resnet18"]
    rows, missing = models.MODELS.read(tmp_path / "m.json")
    assert [(r.model, r.left, r.torch_pruning_left, r.differences) for r in rows] == [
        ("resnet18", 0.25, None, {"live_difference": 0.0})
    ]
    assert missing.failed == {"vgg11_bn": "RuntimeError: not done in 240 s of processor time"}


def test_both_sides_of_a_network(monkeypatch):
    entry = Entry("tiny", "here", tiny)
    monkeypatch.setattr(checks, "check_onnx", lambda *_: None)
    found = models.look_at(entry, 10)
    assert found["layers"] == 3 and found["ours"]["answers"]["onnx"] == checks.OK
    assert found["theirs"]["answers"]["torch_pruning"] == checks.OK or "torch_pruning" in str(found["theirs"])
    assert json.loads(json.dumps(found)) == found


def test_the_catalog():
    assert len(ENTRIES) >= 40 and len({entry.library for entry in ENTRIES.values()}) == 5
    assert all(" " not in name for name in ENTRIES)
