"""The extension, and how it is compiled: what setup.py gives to setuptools unless PRUNEKERNELS_NO_EXT=1."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from find_toolkit import find_toolkit

TOOLKIT = find_toolkit()
if TOOLKIT:  # torch takes the folder above that of nvcc, which may be a wrapper without headers beside it
    os.environ["CUDA_HOME"] = str(TOOLKIT)

from torch.utils import cpp_extension  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
# Machine code for the A100 and the H100 kind (every sm_8x runs the first), and PTX for whatever comes after them.
ARCHITECTURES = "8.0+PTX;9.0a"
# PRUNEKERNELS_SANITIZE: what g++ compiles in. vptr needs type information that torch keeps to itself.
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
# torch's own function, not public: where a version of torch lacks it, nothing is precompiled.
COMPILE_OBJECTS = "_write_ninja_file_and_compile_objects"


def wants_cuda() -> bool:
    asked = os.environ.get("PRUNEKERNELS_CUDA", "").strip()
    if asked not in ("", "0", "1"):
        sys.exit(f"PRUNEKERNELS_CUDA: expected 0 or 1, got {asked!r}")
    missing = [
        what
        for what, there in (("nvcc with its headers", TOOLKIT), ("a CUDA build of torch", torch.version.cuda))
        if not there
    ]
    if asked == "1" and missing:
        sys.exit(f"PRUNEKERNELS_CUDA=1, but {' and '.join(missing)} cannot be found")
    return not missing and asked != "0"


def sanitizer() -> str:
    """address, thread, or "" for none."""
    asked = os.environ.get("PRUNEKERNELS_SANITIZE", "").strip()
    if asked not in ("", *SANITIZERS):
        sys.exit(f"PRUNEKERNELS_SANITIZE: expected one of {', '.join(SANITIZERS)}, got {asked!r}")
    return asked


def architectures() -> str:
    """What nvcc will compile for TORCH_CUDA_ARCH_LIST, such as sm_80,compute_80,sm_90a."""
    if not hasattr(cpp_extension, "_get_cuda_arch_flags"):
        return ""  # not known
    return ",".join(re.findall(r"code=(\w+)", " ".join(cpp_extension._get_cuda_arch_flags())))


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


def extension():
    debug = os.environ.get("PRUNEKERNELS_DEBUG", "0") == "1"
    flags = ["-O0", "-g"] if debug else ["-O3", "-g0", "-fvisibility=hidden"]
    if sys.platform == "win32":
        flags = ["/Od", "/Zi"] if debug else ["/O2"]
    sanitized = SANITIZERS.get(sanitizer(), [])
    if sanitized:
        flags = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fvisibility=hidden", "-D_GLIBCXX_ASSERTIONS", *sanitized]
    files = [file for room in ("", "core/", "plan/", "ops/", "cpu/**/") for file in sources(f"{room}*.cpp")]
    # at::parallel_for is a plain loop without it. The runtime is the one torch has loaded by then.
    openmp = ["-fopenmp"] if sys.platform == "linux" and sanitizer() != "thread" else []
    shadows = [str(ROOT / "csrc" / "sanitize")] if sanitizer() == "thread" else []
    common = {
        "name": "prunekernels._C",
        "include_dirs": [*shadows, str(ROOT / "csrc")],
        "extra_link_args": [*openmp, *sanitized],
        "define_macros": [("PRUNEKERNELS_TORCH_VERSION", f'"{torch.__version__}"')],
    }
    cuda = sources("cuda/*.cpp") + sources("cuda/kernels/*.cu")
    if not (cuda and wants_cuda()):
        return CppExtension(sources=files, extra_compile_args={"cxx": flags + openmp}, **common)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    common["define_macros"] += [
        ("PRUNEKERNELS_WITH_CUDA", f'"{torch.version.cuda}"'),
        ("PRUNEKERNELS_CUDA_ARCHITECTURES", f'"{architectures()}"'),
    ]
    return CUDAExtension(
        sources=files + cuda, extra_compile_args={"cxx": flags + openmp, "nvcc": ["-O3", "-lineinfo"]}, **common
    )


class Target(NamedTuple):
    include: str  # folder of Python.h
    suffix: str  # of extension modules
    tag: str  # of wheels, such as cp312


@functools.cache
def target() -> Target:
    """The Python that the extension is for: PRUNEKERNELS_PYTHON, or the one that builds it."""
    command = [os.environ.get("PRUNEKERNELS_PYTHON") or sys.executable, "-c", ASK]
    return Target(*json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))


ASK = """import json, sys, sysconfig
tag = "cp%d%d" % sys.version_info[:2] + ("t" if sysconfig.get_config_var("Py_GIL_DISABLED") else "")
print(json.dumps([sysconfig.get_path("include"), sysconfig.get_config_var("EXT_SUFFIX"), tag]))"""


class FastBuild(BuildExtension):
    """BuildExtension, silent unless it fails (torch has ninja print every command), and with torch's headers parsed
    once: csrc/precompiled.h is compiled while ninja compiles the files without torch, and serves all others.

    Two files know Python. They are compiled for each Python, everything else once.
    """

    def get_ext_filename(self, name: str) -> str:
        own = sysconfig.get_config_var("EXT_SUFFIX")
        return super().get_ext_filename(name).removesuffix(own) + target().suffix

    def build_extensions(self) -> None:
        sys.stdout.flush()
        terminal, compile_objects = os.dup(1), getattr(cpp_extension, COMPILE_OBJECTS, None)
        if compile_objects is not None:
            setattr(cpp_extension, COMPILE_OBJECTS, functools.partial(compile_parts, compile_objects))
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
                if compile_objects is not None:
                    setattr(cpp_extension, COMPILE_OBJECTS, compile_objects)


def compile_parts(compile_objects, *, sources, objects, cflags, post_cflags, build_directory, **others):
    """torch's function that compiles with ninja: first for the files without torch, then for those that include it, at
    last for those that know Python.
    """
    parts: dict[str, list] = {"plain": [], "torch": [], target().tag: []}
    for pair in zip(sources, objects, strict=True):
        name = str(pair[0])
        without_torch = re.search(r"csrc/(core|plan|cpu/kernels)/", name)
        parts[target().tag if name.endswith("binding.cpp") else "plain" if without_torch else "torch"].append(pair)
    header = PrecompiledHeader(Path(build_directory), cflags, post_cflags)
    own = f"-I{sysconfig.get_path('include')}"
    for name, pairs in parts.items():
        folder, flags = os.path.join(build_directory, name), cflags
        built = [object for _, object in pairs]
        if name == "torch":
            flags = cflags + header.flags()
        elif name == target().tag:  # each Python's objects stay, so that they are not compiled again
            flags = [f"-I{target().include}" if flag == own else flag for flag in cflags]
            built = [os.path.join(folder, os.path.basename(object)) for object in built]
        compile_objects(
            sources=[source for source, _ in pairs],
            objects=built,
            cflags=flags,
            post_cflags=post_cflags,
            build_directory=folder,
            **others,
        )
        for made, (_, expected) in zip(built, pairs, strict=True):
            if made != expected:
                shutil.copyfile(made, expected)


class PrecompiledHeader:
    """Starts to compile csrc/precompiled.h, unless it was compiled with the same flags, compiler and torch before."""

    def __init__(self, folder: Path, cflags: list[str], post_cflags: list[str]) -> None:
        compiler = cpp_extension.get_cxx_compiler()
        source = (ROOT / "csrc" / "precompiled.h").read_text()
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
        self.made_of = "\n".join([source, version, torch.__version__, *cflags, *post_cflags])
        self.header, self.stamp, self.running = folder / "torch.h", folder / "torch.h.made_of", None
        if self.stamp.exists() and self.stamp.read_text() == self.made_of:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.stamp.unlink(missing_ok=True)
        self.header.write_text(source)
        command = [compiler, *cflags, *post_cflags, "-x", "c++-header", str(self.header), "-o", f"{self.header}.gch"]
        self.running = subprocess.Popen(" ".join(command), shell=True, stderr=subprocess.DEVNULL)

    def flags(self) -> list[str]:
        """Waits for it. [] where it does not compile: then each file includes what it needs by itself."""
        if self.running is not None and self.running.wait() == 0:
            self.stamp.write_text(self.made_of)
        return ["-include", str(self.header)] if self.stamp.exists() else []


def commands() -> dict:
    """setuptools' commands: the build, and wheels whose name tells which Python they are for."""
    try:
        from setuptools.command.bdist_wheel import bdist_wheel
    except ImportError:  # setuptools before 70.1
        from wheel.bdist_wheel import bdist_wheel

    class WheelForTarget(bdist_wheel):
        def get_tag(self) -> tuple[str, str, str]:
            return target().tag.removesuffix("t"), target().tag, super().get_tag()[2]

    return {"build_ext": FastBuild, "bdist_wheel": WheelForTarget}


def built_for() -> tuple[str, str]:
    """Major and minor version of the torch that the extension is built for, and cpu or, say, cu130."""
    release = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    return release, f"cu{torch.version.cuda.replace('.', '')}" if wants_cuda() else "cpu"
