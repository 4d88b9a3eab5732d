"""Plans: forcing, the environment variable, and what is chosen when nothing is forced."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

import prunekernels as pk

LARGE = {"x_shape": (16, 256, 28, 28), "weight_shape": (256, 256, 3, 3), "padding": (1, 1)}
DIRECTIONS = ["forward", "grad_input", "grad_weight"]
needs_extension = pytest.mark.skipif(not pk.has_extension(), reason="without the extension there is one plan only")


def mask(live):
    return pk.ConvMask(torch.arange(256) < live, input_mask=torch.arange(256) < live)


@needs_extension
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("live", "plan"), [(256, "dense"), (255, "dense"), (64, "compact"), (1, "compact")])
def test_choice(live, plan, direction):
    assert pk.plan.choose(direction, mask=mask(live), **LARGE) == plan


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_mask_is_dense(direction):
    assert pk.plan.choose(direction, mask=None, **LARGE) == "dense"


@needs_extension
@pytest.mark.parametrize("plan", ["dense", "compact"])
def test_force_decides_and_nests(plan):
    with pk.plan.force(plan):
        assert pk.plan.choose("forward", mask=mask(255), **LARGE) == plan
        with pk.plan.force("dense" if plan == "compact" else "compact"):
            assert pk.plan.choose("forward", mask=mask(64), **LARGE) != plan
        assert pk.plan.choose("forward", mask=mask(64), **LARGE) == plan
    assert pk.plan.choose("forward", mask=mask(255), **LARGE) == "dense"


def test_unknown_direction():
    with pytest.raises(ValueError, match="direction.*expected.*got 'backward'"):
        pk.plan.choose("backward", mask=mask(3), **LARGE)


CODE = """
import torch, prunekernels as pk
live = torch.arange(64) < 63
print(pk.plan.choose("forward", (2, 64, 8, 8), (64, 64, 1, 1), pk.ConvMask(live, in_channels=64)))
"""


def run(plan):
    env = os.environ | {"PRUNEKERNELS_PLAN": plan, "PYTHONPATH": str(pathlib.Path(pk.__file__).resolve().parents[1])}
    return subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True)


@needs_extension
@pytest.mark.parametrize(("variable", "plan"), [("compact", "compact"), ("dense", "dense"), ("auto", "dense")])
def test_environment_variable(variable, plan):
    done = run(variable)
    assert done.stdout.strip() == plan, done.stderr


def test_unknown_environment_variable():
    done = run("fast")
    assert done.returncode != 0 and "PRUNEKERNELS_PLAN" in done.stderr and "got 'fast'" in done.stderr
