"""Builds prunekernels._C. Everything else about the package stands in pyproject.toml.

PRUNEKERNELS_CUDA=0|1   force the CUDA kernels off or on (default: on when nvcc and a CUDA build of torch are there)
PRUNEKERNELS_DEBUG=1    -O0 -g
PRUNEKERNELS_NO_EXT=1   no extension: the package runs in pure torch, or build_ext builds it later
TORCH_CUDA_ARCH_LIST    as in torch.utils.cpp_extension; default: ARCHITECTURES below
MAX_JOBS                as in torch.utils.cpp_extension
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent
# Machine code for the A100 and the H100 kind (every sm_8x runs the first), and PTX for whatever comes after them.
ARCHITECTURES = "8.0+PTX;9.0a"


def wants_cuda() -> bool:
    asked = os.environ.get("PRUNEKERNELS_CUDA", "").strip()
    if asked not in ("", "0", "1"):
        sys.exit(f"PRUNEKERNELS_CUDA: expected 0 or 1, got {asked!r}")
    missing = [
        what for what, there in (("nvcc", CUDA_HOME), ("a CUDA build of torch", torch.version.cuda)) if not there
    ]
    if asked == "1" and missing:
        sys.exit(f"PRUNEKERNELS_CUDA=1, but {' and '.join(missing)} cannot be found")
    return not missing and asked != "0"


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


def extension():
    debug = os.environ.get("PRUNEKERNELS_DEBUG", "0") == "1"
    flags = ["-O0", "-g"] if debug else ["-O3", "-g0", "-fvisibility=hidden"]
    if sys.platform == "win32":
        flags = ["/Od", "/Zi"] if debug else ["/O2"]
    files = [file for room in ("", "core/", "plan/", "ops/", "cpu/**/") for file in sources(f"{room}*.cpp")]
    # at::parallel_for is a plain loop without it. The runtime is the one torch has loaded by then.
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    common = {
        "name": "prunekernels._C",
        "include_dirs": [str(ROOT / "csrc")],
        "extra_link_args": openmp,
        "define_macros": [("PRUNEKERNELS_TORCH_VERSION", f'"{torch.__version__}"')],
    }
    cuda = sources("cuda/*.cpp") + sources("cuda/kernels/*.cu")
    if not (cuda and wants_cuda()):
        return CppExtension(sources=files, extra_compile_args={"cxx": flags + openmp}, **common)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    common["define_macros"].append(("PRUNEKERNELS_WITH_CUDA", f'"{torch.version.cuda}"'))
    return CUDAExtension(
        sources=files + cuda, extra_compile_args={"cxx": flags + openmp, "nvcc": ["-O3", "-lineinfo"]}, **common
    )


class QuietBuild(BuildExtension):
    """BuildExtension, silent unless it fails: torch has ninja print every command."""

    def build_extensions(self) -> None:
        sys.stdout.flush()
        terminal = os.dup(1)
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            os.dup2(log.fileno(), 1)
            try:
                super().build_extensions()
            except RuntimeError as error:
                log.seek(0)
                sys.exit(re.sub(r"^\[\d+/\d+\] .*\n", "", log.read(), flags=re.MULTILINE) + str(error))
            finally:
                os.dup2(terminal, 1)
                os.close(terminal)


without = os.environ.get("PRUNEKERNELS_NO_EXT", "0") not in ("", "0")
setup(ext_modules=[] if without else [extension()], cmdclass={"build_ext": QuietBuild})
