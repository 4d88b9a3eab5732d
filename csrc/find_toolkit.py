"""Where the CUDA toolkit is. As a program it prints that folder, or fails: python csrc/find_toolkit.py"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path


def find_toolkit() -> Path | None:
    """The folder with bin/nvcc and include/, from CUDA_HOME, CUDA_PATH, PATH (nvcc may be a wrapper) or
    /usr/local/cuda.
    """
    homes = [home for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    candidates = [shutil.which("nvcc", path=os.path.join(home, "bin")) for home in homes]
    candidates += [shutil.which("nvcc"), shutil.which("nvcc", path="/usr/local/cuda/bin")]
    for nvcc in filter(None, candidates):
        told = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.+)$", told.stderr, re.MULTILINE)
        root = Path(top[1]) if top else Path(nvcc).parent.parent
        if (root / "include" / "cuda_runtime.h").exists():
            return root.resolve()
    return None


if __name__ == "__main__":
    found = find_toolkit()
    print(found or "nvcc with its headers cannot be found (CUDA_HOME, PATH, /usr/local/cuda)")
    sys.exit(not found)
