"""What `python -m prunekernels doctor` finds: build and machine, what is missing or wrong, and what mends it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from . import plan_file
from .ops import extension, gpus
from .train.optional_deps import EXTRAS

OLDEST_TORCH = (2, 8)
TESTED_TORCH = ("2.8", "2.11", "2.13", "2.14")  # wheels/versions.json, which `make versions` writes
TESTED_PYTHON = ("3.10", "3.11", "3.12", "3.13")
OLDEST_CAPABILITY = (8, 0)  # of a GPU, as in setup.py


class Finding(NamedTuple):
    """What one check found. state: "ok", "note" (not in use, and nothing is wrong) or "wrong"."""

    name: str
    state: str
    found: str
    mend: str = ""  # a command or what to do, where that is known


def findings() -> list[Finding]:
    """Runs all checks; a check that raises is a finding itself."""
    return [_run(check) for check in (_torch, _extension, _isa, _threads, _cuda, _plans, _optional)]


def report(found: list[Finding]) -> str:
    """As text, one finding a line, each with what mends it below."""
    width = max(len(finding.name) for finding in found)
    lines = []
    for finding in found:
        lines.append(f"{finding.state:5} {finding.name:{width}}  {finding.found}")
        if finding.mend:
            lines.append(f"{'':5} {'':{width}}  -> {finding.mend}")
    wrong = sum(finding.state == "wrong" for finding in found)
    return "\n".join([*lines, f"{wrong} of {len(found)} checks found something wrong" if wrong else "nothing is wrong"])


def _run(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # whatever is broken, the other checks are told
        return Finding(check.__name__.strip("_"), "wrong", f"{type(error).__name__}: {error}")


def _torch() -> Finding:
    running, python = torch.__version__, platform.python_version()
    found = f"{running} in Python {python}"
    if extension.has_extension():
        found += f"; the extension was built for {extension.build_info()['torch']}"
    oldest = ".".join(map(str, OLDEST_TORCH))
    if tuple(map(int, extension.release(running).split("."))) < OLDEST_TORCH:
        return Finding(
            "torch", "wrong", f"{found}; {oldest} is the oldest that works", f'pip install "torch>={oldest}"'
        )
    untested = [
        f"{name} {version} was not tested, but {', '.join(tested)}"
        for name, version, tested in (
            ("torch", extension.release(running), TESTED_TORCH),
            ("Python", extension.release(python), TESTED_PYTHON),
        )
        if version not in tested
    ]
    return Finding("torch", "note" if untested else "ok", "; ".join([found, *untested]))


def _extension() -> Finding:
    if extension.missing:
        reason, mend = extension.missing
        if os.environ.get("PRUNEKERNELS_NO_EXT", "0") not in ("", "0"):
            return Finding("extension", "note", f"not in use, {reason}: pure torch", mend)
        if not any(map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++", "cl"))):
            reason += "; no C++ compiler is on the PATH (Debian: apt-get install g++)"
        return Finding("extension", "wrong", f"not in use: {reason}", mend)
    where = getattr(extension._C, "__file__", "")
    if extension.outdated:
        lacks = f"{where} is of an older source: without {', '.join(extension.outdated)}"
        return Finding("extension", "wrong", lacks, extension.build_command())
    return Finding("extension", "ok", f"{where}; compiler {extension.build_info().get('compiler', 'unknown')}")


def _isa() -> Finding:
    name = "instructions"
    if not extension.has_extension():
        return Finding(
            name, "note", f"torch uses {torch.backends.cpu.get_cpu_capability()}; no kernels of this package"
        )
    cpu = extension.cpu_isa()
    try:
        used = extension.build_info()["isa"]
    except ValueError as error:
        return Finding(name, "wrong", f"the CPU has {cpu}; {error}", "unset PRUNEKERNELS_ISA")
    if used == cpu:
        return Finding(name, "ok", f"{used}, the best that this CPU has")
    cap = os.environ.get("PRUNEKERNELS_ISA")
    if cap:
        return Finding(name, "note", f"{used} of {cpu}: PRUNEKERNELS_ISA={cap}", "unset PRUNEKERNELS_ISA")
    return Finding(name, "note", f"{used} of {cpu}: the system does not permit more")


def _threads() -> Finding:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    used = torch.get_num_threads()
    if used > available:
        mend = f"export OMP_NUM_THREADS={available}"
        return Finding("threads", "wrong", f"{used} threads on the {available} cores of this process", mend)
    return Finding("threads", "ok", f"{used} threads on {available} cores")


def _cuda() -> Finding:
    if not torch.version.cuda:
        if Path("/proc/driver/nvidia").exists():
            return Finding("CUDA", "wrong", "there is an NVIDIA GPU, and torch is a build without CUDA",
                           "install a CUDA build of torch, then prunekernels for it")  # fmt: skip
        return Finding("CUDA", "note", "torch is a build without CUDA")
    if not torch.cuda.is_available():
        return Finding("CUDA", "note", f"torch is built for CUDA {torch.version.cuda}, and finds no GPU")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    built_for = extension.build_info().get("cuda", "")
    build = f"export PRUNEKERNELS_CUDA=1 && {extension.build_command()}"
    if not built_for:
        return Finding("CUDA", "wrong", f"{', '.join(names)}; this build has no CUDA kernels: pure torch there", build)
    if built_for.split(".")[0] != torch.version.cuda.split(".")[0]:
        versions = f"built for CUDA {built_for}, torch has {torch.version.cuda}"
        return Finding("CUDA", "wrong", f"{', '.join(names)}; {versions}", build)
    if min(torch.cuda.get_device_capability(index) for index in range(len(names))) < OLDEST_CAPABILITY:
        return Finding("CUDA", "note", f"{', '.join(names)}; kernels are for compute capability 8.0 and later")
    if unserved := gpus.unserved():
        has = f"no kernel for compute capability {', '.join(unserved)}: pure torch there"
        return Finding("CUDA", "wrong", f"{', '.join(names)}; {has}", gpus.mend(unserved))
    return Finding("CUDA", "ok", f"{', '.join(names)}; kernels for CUDA {built_for}")


def _plans() -> Finding:
    variable = plan_file.VARIABLE
    given = os.environ.get(variable)
    if not given:
        default = Path.home() / ".cache" / "prunekernels.json"
        return Finding("plans", "note", f"{variable} is not set: each process finds out its plans anew",
                       f"export {variable}={default}")  # fmt: skip
    path = Path(given).expanduser()
    try:
        here, machines = plan_file.known(path)
    except plan_file.DAMAGED as error:
        return Finding("plans", "wrong", f"{path}: {str(error).splitlines()[0]}", f"rm {path}")
    folder = next(parent for parent in path.parents if parent.exists())
    if not os.access(path if path.exists() else folder, os.W_OK) or not folder.is_dir():
        return Finding("plans", "wrong", f"{path}: cannot be written", f"export {variable}=another file")
    return Finding("plans", "ok", f"{path}: {here} plans of this machine and torch, {machines} machines")


def _optional() -> Finding:
    """Packages that commands and exports need, and that nobody has to have."""
    found, extras = [], []
    for package, extra in EXTRAS.values():
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {package}")
            extras.append(extra)
    mend = f'pip install "prunekernels[{",".join(sorted(set(extras)))}]"' if extras else ""
    return Finding("optional", "note" if extras else "ok", ", ".join(found), mend)
