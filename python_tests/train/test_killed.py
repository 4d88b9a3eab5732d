"""A training run that is killed at any moment: its checkpoint is whole, and it goes on to the same bits."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import prunekernels as pk

ALWAYS, TESTS = 3, pathlib.Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("mode", ["masked", "live", "compacted"])
def test_a_killed_run_goes_on(tmp_path, mode, request):
    """After each kill the checkpoint is, to the bit, that of an epoch of the undisturbed run, and the last one too."""
    wanted = request.config.getoption("kills")
    if wanted is None and mode != "masked":
        pytest.skip("with --kills N")
    moments = ALWAYS if wanted is None else -(-wanted // 3)
    paths = [str(pathlib.Path(pk.__file__).parents[1]), str(TESTS)]
    command = [sys.executable, "-m", "cases.killed", str(tmp_path), mode, str(moments), str(moments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    print(f"{mode}: {found}")
    assert found["moments"] == moments
