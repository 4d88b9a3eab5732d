"""Builds prunekernels._C. Everything else about the package stands in pyproject.toml.

PRUNEKERNELS_CUDA=0|1   force the CUDA kernels off or on (default: on when nvcc and a CUDA build of torch are there)
PRUNEKERNELS_DEBUG=1    -O0 -g
PRUNEKERNELS_SANITIZE   address (with undefined behaviour) or thread: see csrc/sanitize/sanitize.py
PRUNEKERNELS_NO_EXT=1   no extension: the package runs in pure torch, or build_ext builds it later; needs no torch
PRUNEKERNELS_WHEEL=1    a wheel to give away: its version and its requirements name the torch that it was built for
PRUNEKERNELS_PYTHON     the Python that the extension is for (default: the one that runs this)
TORCH_CUDA_ARCH_LIST    as in torch.utils.cpp_extension; default: ARCHITECTURES of csrc/build_extension.py
MAX_JOBS                as in torch.utils.cpp_extension
"""

import os
import re
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
REQUIREMENTS = ["torch>=2.8", "numpy"]


def is_set(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def version() -> str:
    (found,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / "prunekernels" / "__init__.py").read_text(), re.MULTILINE)
    return found


def compiled() -> dict:
    """What setup() needs for the extension."""
    sys.path.insert(0, str(ROOT / "csrc"))
    import build_extension

    given = {"ext_modules": [build_extension.extension()], "cmdclass": build_extension.commands()}
    if is_set("PRUNEKERNELS_WHEEL"):
        release, device = build_extension.built_for()
        given["version"] = f"{version()}+torch{release}.{device}"
        given["install_requires"] = [f"torch=={release}.*", *REQUIREMENTS[1:]]
    return given


given = {"version": version(), "install_requires": REQUIREMENTS}
setup(**given | ({} if is_set("PRUNEKERNELS_NO_EXT") else compiled()))
