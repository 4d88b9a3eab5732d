"""--config: settings from a file, under those of the command line."""

import json
import sys

import pytest

from prunekernels import cli
from prunekernels.train.config import Config

pytest.importorskip("yaml")
TEXT = """
out: runs/a
method: ghfp
lr: 1e-2
weight-decay: 1e-4
epochs: 3
amp: true
report: false
beside: runs/dense
seed:
set: {coupling: joint, strength: 1e-3, rates: {"stage1*": 2.5e-1}, budget: {flops: 0.5}}
"""
SETTINGS = {
    "out": "runs/a", "method": "ghfp", "lr": 0.01, "weight_decay": 1e-4, "epochs": 3, "amp": True, "report": False,
    "beside": ["runs/dense"],
    "options": {"coupling": "joint", "strength": 1e-3, "rates": {"stage1*": 0.25}, "budget": {"flops": 0.5}},
}  # fmt: skip


@pytest.fixture
def trained(monkeypatch):
    """What the command would train."""
    given = []
    monkeypatch.setattr(cli.run, "train", lambda settings, **flags: given.append((settings, flags)))
    return given


def train(path, *arguments):
    return cli.main(["train", "--config", str(path), *arguments])


def written(tmp_path, text, suffix=".yaml"):
    path = tmp_path / f"run{suffix}"
    path.write_text(text)
    return path


def test_yaml(tmp_path, trained):
    assert train(written(tmp_path, TEXT)) == 0
    assert trained == [(SETTINGS, {"resume": False, "overwrite": False})]
    Config(**trained[0][0])


def test_json_and_toml(tmp_path, trained):
    whole = {name: value for name, value in SETTINGS.items() if name != "options"} | {"set": SETTINGS["options"]}
    assert train(written(tmp_path, json.dumps(whole), ".json")) == 0
    if sys.version_info >= (3, 11):
        text = (
            'out = "runs/a"\nmethod = "ghfp"\nlr = 1e-2\nweight-decay = 1e-4\nepochs = 3\namp = true\nreport = false\n'
        )
        text += 'beside = ["runs/dense"]\n[set]\ncoupling = "joint"\nbudget = {flops = 0.5}\nstrength = 1e-3\n'
        text += '[set.rates]\n"stage1*" = 0.25\n'
        assert train(written(tmp_path, text, ".toml")) == 0
    assert all(settings == SETTINGS for settings, _ in trained)


def test_options_come_first(tmp_path, trained):
    given = (
        "--out",
        "runs/b",
        "--lr",
        "1",
        "--set",
        "coupling=independent",
        "--set",
        "floor=0.1",
        "--report",
        "--resume",
    )
    assert train(written(tmp_path, TEXT), *given) == 0
    options = SETTINGS["options"] | {"coupling": "independent", "floor": 0.1}
    changed = {"out": "runs/b", "lr": 1.0, "report": True, "options": options}
    assert trained == [(SETTINGS | changed, {"resume": True, "overwrite": False})]


def test_an_empty_file_and_all_by_options(tmp_path, trained):
    assert train(written(tmp_path, "# nothing\n"), "--out", "a") == 0
    assert trained[0][0] == {"out": "a"}


BAD = {
    "unknown": ("out: a\nlearning-rate: 1", "learning-rate: expected a setting of train, got an unknown one"),
    "near": ("out: a\nepoch: 1", "epoch: expected a setting of train, got an unknown one; do you mean epochs?"),
    "of the method": ("out: a\ncoupling: joint", "coupling: expected a setting of train, got an unknown one"),
    "only given": ("out: a\nresume: true", "resume: expected a setting of train, got an unknown one"),
    "twice": ("out: a\nweight-decay: 1\nweight_decay: 2", "weight_decay: expected it once, got it twice"),
    "kind": ("out: a\nepochs: many", "epochs: expected an integer, got 'many'"),
    "a share of an epoch": ("out: a\nepochs: 1.5", "epochs: expected an integer, got 1.5"),
    "no integer": ("out: a\nepochs: true", "epochs: expected an integer, got True"),
    "no number": ("out: a\nlr: high", "lr: expected a number, got 'high'"),
    "no flag": ("out: a\namp: 1", "amp: expected true or false, got 1"),
    "no table": ("out: a\nset: joint", "set: expected names and values, got 'joint'"),
    "a list": ("- out", "expected names and values, got list"),
    "broken": ("out: [", "expected YAML, got an error: "),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(tmp_path, trained, capsys, case):
    text, error = BAD[case]
    path = written(tmp_path, text)
    assert train(path) == 2 and not trained
    assert capsys.readouterr().err.startswith(f"error: --config: {path}: {error}")


def test_other_files(tmp_path, trained, capsys):
    assert train(written(tmp_path, "", ".ini")) == 2
    assert "--config: expected a .yaml, .yml, .json or .toml file, got " in capsys.readouterr().err
    assert train(tmp_path / "none.yaml") == 2
    assert "--config: expected a file, got " in capsys.readouterr().err


def test_packages_that_are_missing(tmp_path, monkeypatch, capsys):
    for name in ("yaml", "tomllib"):
        monkeypatch.setitem(sys.modules, name, None)
    assert train(written(tmp_path, TEXT)) == 2
    assert 'expected PyYAML: pip install "prunekernels[cli]"' in capsys.readouterr().err
    assert train(written(tmp_path, "", ".toml")) == 2
    assert "expected Python 3.11 (or a .json file)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error"), [((), "--out, here or in --config"), (("--resume", "--overwrite"), "not allowed")]
)
def test_errors_of_arguments(tmp_path, capsys, arguments, error):
    with pytest.raises(SystemExit) as ended:
        train(written(tmp_path, "lr: 1"), *arguments)
    assert ended.value.code == 2 and error in capsys.readouterr().err
