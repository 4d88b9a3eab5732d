"""Python in a process without the compiled extension."""

import os
import pathlib
import subprocess
import sys

import prunekernels as pk

ROOT = pathlib.Path(pk.__file__).resolve().parents[1]


def python(code, **env):
    path = os.pathsep.join([str(ROOT), str(ROOT / "python_tests"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PRUNEKERNELS_NO_EXT": "1", "PYTHONPATH": path} | env
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, timeout=240)
