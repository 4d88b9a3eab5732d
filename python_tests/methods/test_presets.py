"""The papers' numbers: complete, what constructors take, and what the documentation shows."""

import inspect
import re
from functools import partial

import pytest
import torch

from cases.methods import assert_same, chain, run, sgd, snapshot
from cases.pages import ROOT
from cases.train import tiny_config, tiny_data, tiny_run
from prunekernels import methods
from prunekernels.methods.presets import EVIDENCE, PAPER
from prunekernels.train.config import DEFAULTS, DUTY, Config
from prunekernels.train.setup import known_methods

COMMANDS = {cls.__name__: name for name, cls in known_methods().items() if cls is not None}
IMAGES = torch.randn(2, 3, 6, 6)
SOFT = ["SFP", "ASFP", "SRFP", "ASRFP", "GHFP"]


def test_every_method_has_one():
    assert list(PAPER) == [name for name in PAPER if name in COMMANDS] and set(PAPER) == set(COMMANDS)


@pytest.mark.parametrize("name", PAPER)
def test_names_are_those_of_constructor_and_config(name):
    preset = PAPER[name]
    assert set(preset.method) <= set(inspect.signature(getattr(methods, name)).parameters)
    assert set(preset.training) <= {"augment", *DEFAULTS}
    assert preset.evidence.keys() == preset.method.keys() | preset.training.keys()
    assert set(preset.evidence.values()) <= set(EVIDENCE) and preset.left_out


@pytest.mark.parametrize("name", SOFT)
def test_the_method_of_a_preset_is_that_of_duty_1(name):
    """Bit for bit."""
    with_preset, plain = (run(getattr(methods, name), 4, total=4, **options) for options in ({"preset": "paper"}, {}))
    assert_same(snapshot(*with_preset[:2]), snapshot(*plain[:2]))
    assert with_preset[2].history == plain[2].history


@pytest.mark.parametrize("name", PAPER)
def test_methods_are_made_with_it(name):
    net = chain()
    more = {"data": [(IMAGES, torch.tensor([0, 1]))]} if name == "CoarsePruning" else {}
    method = getattr(methods, name)(net, sgd(net), epochs=9, preset="paper", example_input=IMAGES, **more)
    assert method.duty == 1 and method.clip is None and method.preset == "paper"
    given = PAPER[name].method
    for key in ("alpha", "remove", "strength", "masks", "taylor", "adaptive"):
        if key in given:
            assert getattr(method, key) == given[key]


def test_an_unknown_method_of_the_users():
    class Mine(methods.Method):
        pass

    net = chain()
    expected = "Mine: preset: expected None, as only SFP, .*, FPAGL have papers, got 'paper'"
    with pytest.raises(ValueError, match=expected):
        Mine(net, sgd(net), preset="paper")


def test_a_subclass_has_its_parents():
    class Mine(methods.CSGD):
        pass

    net = chain()
    assert Mine(net, sgd(net), preset="paper", example_input=IMAGES).strength == 3e-3


# ---- the training command


def test_settings_that_are_open_are_the_papers():
    config = Config("runs/a", method="ghfp", preset="paper")
    assert (config.epochs, config.batch, config.lr, config.weight_decay) == (200, 128, 0.1, 5e-4)
    assert (config.duty, config.augment, config.measure) == (1.0, "shift+flip", False)
    config = Config("runs/a", method="csgd", preset="paper", epochs=8, lr=0.1)
    assert (config.epochs, config.lr, config.weight_decay) == (8, 0.1, 1e-4)
    assert Config("runs/a", method="pgp", preset="paper").measure
    assert not Config("runs/a", method="pgp", preset="paper", measure=False).measure
    config = Config("runs/a", method="prune-while-training", preset="paper")
    assert (config.epochs, config.lr, config.duty) == (DEFAULTS["epochs"], DEFAULTS["lr"], 1.0)


def test_without_a_preset_nothing_is_another():
    config = Config("runs/a", method="ghfp")
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert (config.duty, config.augment, config.preset) == (DUTY, None, None)


def test_what_is_refused():
    with pytest.raises(ValueError, match="train: preset: expected one of paper, got 'mine'"):
        Config("runs/a", method="ghfp", preset="mine")
    with pytest.raises(ValueError, match="train: method: expected one that prunes"):
        tiny_run("runs/a", preset="paper")
    with pytest.raises(ValueError, match="train: ghfp: expected options among .*, got 'preset'"):
        tiny_run("runs/a", method="ghfp", options={"preset": "paper"})


@pytest.mark.parametrize("method", ["ghfp", "pgp", "prune-while-training"])
def test_runs(tmp_path, method):
    made = tiny_run(tmp_path, method=method, preset="paper", mode="dense", epochs=1, options={"fine_tune": 0})
    assert made.method.duty == 1 and made.method.preset == "paper" and made.config.epochs == 1
    made.run()
    resumed = type(made).resumed(tmp_path, data=tiny_data())
    assert resumed.config.as_dict() == made.config.as_dict()


def test_a_run_stays_what_it_was(tmp_path):
    saved = tiny_config(tmp_path, method="ghfp").as_dict()
    del saved["preset"]  # as in checkpoints of old
    assert Config.resumed(saved, {}, "c.pt").preset is None
    with pytest.raises(ValueError, match="train: preset: expected None, as in c.pt, got 'paper'"):
        Config.resumed(saved, {"preset": "paper"}, "c.pt")


# ---- the documentation


def shown(value):
    """A value as the table has it."""
    if isinstance(value, partial):
        return f"{value.func.__name__}({', '.join(f'{k}={v}' for k, v in value.keywords.items())})"
    return value.__name__ if callable(value) else repr(value).replace('"', "").replace("'", "")


def cell(values, evidence):
    """By evidence, the values."""
    tags = dict.fromkeys(evidence[name] for name in values)
    return "; ".join(
        f"{EVIDENCE[tag]}: " + ", ".join(f"`{n}={shown(v)}`" for n, v in values.items() if evidence[n] == tag)
        for tag in tags
    )


def test_the_table_in_the_documentation_is_the_data():
    rows = ["| method | keywords | training | not done by the command |", "|---|---|---|---|"]
    for name, preset in PAPER.items():
        both = (cell(values, preset.evidence) or "-" for values in (preset.method, preset.training))
        rows.append(f"| `{name}` | {' | '.join(both)} | {preset.left_out} |")
    text = (ROOT / "docs" / "methods" / "presets.md").read_text().partition("## What each method has")[2]
    found = re.findall(r"^\|.*\|$", text, re.MULTILINE)
    assert found == rows, "\n" + "\n".join(rows)
