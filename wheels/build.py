"""make wheel: the source archive, the wheel for any machine, and a CPU wheel for each Python of this machine, in dist/

One torch serves all of them: what is compiled knows nothing of Python, but for two files, which are compiled for each.
PRUNEKERNELS_CUDA=1 builds wheels with CUDA kernels instead.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pythons
import repair

ROOT = Path(__file__).resolve().parents[1]


def setup(*commands: str, **env: str) -> None:
    """Runs setup.py, silent unless it fails."""
    command = [sys.executable, "setup.py", "-q", *commands]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def source_archive(out: Path) -> Path:
    with tempfile.TemporaryDirectory() as made:
        setup("sdist", "--dist-dir", made, PRUNEKERNELS_NO_EXT="1")
        return _take(Path(made), "*.tar.gz", out)


def wheel(out: Path, python: pythons.Python | None) -> Path:
    """For a Python, or without the extension for any. Built in a folder of its own: nothing of other builds gets in."""
    env = {"PRUNEKERNELS_NO_EXT": "1"}
    if python:
        env = {"PRUNEKERNELS_NO_EXT": "0", "PRUNEKERNELS_WHEEL": "1", "PRUNEKERNELS_PYTHON": str(python.path)}
        env["PRUNEKERNELS_CUDA"] = os.environ.get("PRUNEKERNELS_CUDA") or "0"
    with tempfile.TemporaryDirectory() as made:
        packed = ("bdist_wheel", "--skip-build", "--dist-dir", made, "--bdist-dir", f"{made}/whl")
        setup("build", "--build-lib", f"{made}/lib", *packed, **env)
        if python and sys.platform == "linux":
            (raw,) = Path(made).glob("*.whl")
            return repair.repair(raw, out)
        return _take(Path(made), "*.whl", out)


def _take(folder: Path, pattern: str, out: Path) -> Path:
    (made,) = folder.glob(pattern)
    out.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(made, out / made.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=ROOT / "dist", help="folder; what it holds of this project goes (dist)"
    )
    parser.add_argument("--only", nargs="*", metavar="TAG", help="the Pythons to build for, such as cp311 (all)")
    given = parser.parse_args()
    found = pythons.find()
    unknown = set(given.only or ()) - {python.tag for python in found}
    if unknown:
        parser.error(f"--only: expected some of {', '.join(p.tag for p in found)}, got {', '.join(sorted(unknown))}")
    for old in given.out.glob("prunekernels-*"):
        old.unlink()
    made = [source_archive(given.out), wheel(given.out, None)]
    made += [wheel(given.out, python) for python in found if not given.only or python.tag in given.only]
    for path in made:
        print(f"{path.stat().st_size / 1e6:6.1f} MB  {path.name}")


if __name__ == "__main__":
    main()
