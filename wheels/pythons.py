"""The interpreters of this machine that a wheel can be built for: CPython 3.10 or later, with its headers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

OLDEST = (3, 10)
PROBE = """import json, os, platform, sys, sysconfig
header = os.path.join(sysconfig.get_path("include"), "Python.h")
tag = "cp%d%d" % sys.version_info[:2] + ("t" if sysconfig.get_config_var("Py_GIL_DISABLED") else "")
print(json.dumps([platform.python_implementation(), list(sys.version_info[:3]), tag, os.path.exists(header)]))"""


class Python(NamedTuple):
    path: Path
    version: tuple[int, ...]
    tag: str


def find(folders: Iterable[Path] | None = None) -> list[Python]:
    """One interpreter for each tag, that of the latest patch: on the PATH, and among the versions of pyenv.

    folders: where to look instead.
    """
    found: dict[str, Python] = {}
    for path in _candidates(_folders() if folders is None else folders):
        python = probe(path)
        if python and (python.tag not in found or python.version > found[python.tag].version):
            found[python.tag] = python
    return sorted(found.values(), key=lambda python: (python.version, python.tag))


def probe(path: Path) -> Python | None:
    """None if it does not run, is of another kind or too old, or has no headers."""
    try:
        done = subprocess.run([path, "-I", "-c", PROBE], capture_output=True, text=True, timeout=60)
        kind, version, tag, has_headers = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):  # a shim of a version that is not there prints no JSON
        return None
    if kind != "CPython" or tuple(version) < OLDEST or not has_headers:
        return None
    return Python(path, tuple(version), tag)


def _folders() -> Iterator[Path]:
    yield Path(sys.base_prefix) / "bin"
    yield from map(Path, os.environ.get("PATH", "").split(os.pathsep))
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from sorted((root / "versions").glob("*/bin"))


def _candidates(folders: Iterable[Path]) -> Iterator[Path]:
    seen = set()
    for folder in folders:
        for path in sorted(folder.glob("python3.*")):
            if re.fullmatch(r"python3\.\d+t?", path.name) and path not in seen:
                seen.add(path)
                yield path
