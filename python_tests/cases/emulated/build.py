"""Compiles a family of kernels, its exports and the emulator with the host's compiler, and calls them.

The library of a family holds csrc/cuda/emulator/exports_FAMILY.cpp and every kernel file that implements a header which
the exports include, so a family that does not compile fails alone.
"""

import ctypes
import fcntl
import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np

from . import arrays

ROOT = pathlib.Path(__file__).resolve().parents[3]
CSRC = ROOT / "csrc"
EMULATOR = CSRC / "cuda" / "emulator"
CXX = os.environ.get("CXX", "g++")
FLAGS = f"-std=c++17 -g1 -fPIC -DPK_EMULATED -I{CSRC} -Wall -Wno-unknown-pragmas -ffp-contract=off"
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"


def machine_sources() -> list[pathlib.Path]:
    own = sorted(p for p in EMULATOR.glob("*.cpp") if not p.name.startswith("exports_"))
    return own + sorted((CSRC / "core").glob("*.cpp"))


def _own_sources(family: str) -> list[pathlib.Path]:
    return [EMULATOR / f"exports_{family}.cpp", *(EMULATOR.glob("*.cu") if family == "emulator" else ())]


def _includes(source: pathlib.Path) -> set[str]:
    """The headers of launchers that it includes."""
    return set(re.findall(r'^#include "cuda/kernels/(\w+\.h)"', source.read_text(), re.MULTILINE)) - {"stream.h"}


def family_sources(family: str) -> list[pathlib.Path]:
    kernels = {p: _includes(p) for p in (CSRC / "cuda" / "kernels").glob("*.cu")}
    found = _own_sources(family)
    for source in found:  # grows meanwhile
        named = _includes(source)
        found += [p for p, headers in sorted(kernels.items()) if headers & named and p not in found]
    return found


COUNTED = "-fsanitize=thread -O2"  # inlined, so that each access of the source has a place of its own in the code


def _ninja_file(families: list[str], variant: str) -> str:
    sanitizers = SANITIZERS if variant == "sanitized" else ""
    lines = [
        "rule compile",
        f"  command = {CXX} {FLAGS} {sanitizers} $level -MD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {CXX} -shared {sanitizers} $in -o $out $libraries",
    ]
    compiled = set()

    def objects(sources: list[pathlib.Path], level: str) -> str:
        names = []
        for source in sources:
            names.append(str(source.relative_to(CSRC)).replace("/", "-") + ".o")
            if source not in compiled:
                compiled.add(source)
                lines.extend([f"build {names[-1]}: compile {source}", f"  level = {level}"])
        return " ".join(names)

    # with sanitizers -O1 compiles four times as long and runs no faster
    level = {"": "-O1", "sanitized": "-O0", "counted": COUNTED}[variant]
    machine = f"machine{variant}"  # the loader takes libraries of one name for one library
    lines += [f"build lib{machine}.so: link {objects(machine_sources(), '-O2')}"]
    for family in families:
        lines += [
            f"build lib{family}.so: link {objects(family_sources(family), level)} | lib{machine}.so",
            f"  libraries = -L. -l{machine} -Wl,-rpath,'$$ORIGIN' -Wl,-z,defs",
        ]
    return "\n".join(lines) + "\n"


def _ninja(folder: pathlib.Path, *arguments: str) -> str:
    """Runs ninja. Returns its output if it fails, else an empty string."""
    beside = pathlib.Path(sys.executable).with_name("ninja")
    command = [str(beside) if beside.exists() else shutil.which("ninja") or "ninja", "-C", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr if done.returncode else ""


class Broken(Exception):
    """A family that does not compile, with the output of the compiler."""


def build(families: list[str], sanitized: bool = False, counted: bool = False) -> dict[str, pathlib.Path | Broken]:
    """Brings the libraries of families up to date. Returns the path of each, or why it does not compile.

    counted: with the hooks of emulator/traffic.cpp.
    """
    variant = "sanitized" if sanitized else "counted" if counted else ""
    folder = ROOT / "build" / ("emulated" + (variant and f"_{variant}"))
    folder.mkdir(parents=True, exist_ok=True)
    libraries: dict[str, pathlib.Path | Broken] = {f: folder / f"lib{f}.so" for f in families}
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        plan, text = folder / "build.ninja", _ninja_file(families, variant)
        if not plan.exists() or plan.read_text() != text:
            plan.write_text(text)
        if _ninja(folder, "-k0"):
            for family in families:
                if why := _ninja(folder, f"lib{family}.so"):
                    libraries[family] = Broken(why)
    return libraries


_WIDE = dict.fromkeys(("int64_t", "uint64_t", "size_t", "long"), ctypes.c_int64)
_C_TYPES = _WIDE | {"float": ctypes.c_float, "double": ctypes.c_double, "bool": ctypes.c_bool}


def _prototypes(family: str) -> dict[str, list]:
    """The argument types of each function `int pk_...(...)` that the family exports."""
    found = {}
    for source in _own_sources(family):
        text = re.sub(r"//.*", "", source.read_text())
        for name, arguments in re.findall(r"\bint (pk_\w+)\(([^(){};]*)\)\s*\{", text):
            found[name] = [
                ctypes.c_void_p if "*" in a else _C_TYPES.get(a.replace("const ", "").split()[0], ctypes.c_int)
                for a in filter(None, map(str.strip, arguments.split(",")))
            ]
    return found


class Library:
    """Calls exported functions: call("pk_name", ...) with numbers, contiguous numpy arrays, bytes, None for null."""

    def __init__(self, path: pathlib.Path):
        self._library = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
        self._types = _prototypes(path.stem.removeprefix("lib"))
        self.machine = ctypes.CDLL(
            str(path.with_name(f"libmachine{path.parent.name.removeprefix('emulated').strip('_')}.so"))
        )
        self._take_report = self.machine.pk_take_report
        self._take_report.restype = ctypes.c_char_p

    def call(self, name: str, *arguments) -> None:
        """Asserts that the function returns cudaSuccess and that the emulator has nothing to report."""
        status, report = self.status(name, *arguments)
        assert status == 0 and not report, f"{name} returned cudaError_t {status}: {report or 'no report'}"

    def status(self, name: str, *arguments) -> tuple[int, str]:
        function = self._library[name]
        types = self._types.get(name, [None] * len(arguments))
        assert len(types) == len(arguments), f"{name} takes {len(types)} arguments, got {len(arguments)}"
        status = function(*(_convert(name, a, t) for a, t in zip(arguments, types, strict=True)))
        report = _with_lines(self._take_report().decode())
        for array in arguments:
            if isinstance(array, np.ndarray):
                arrays.check_surroundings(name, array)
        return status, report


_NOT_TOLD = {"launch.cuh", "shared_memory.h", "simt.h", "ptx_host.h"}


def _with_lines(report: str) -> str:
    """The report with lines of source files in place of offsets in libraries, if addr2line is installed."""

    def lines(place: re.Match) -> str:
        command = ["addr2line", "-i", "-e", place[1], place[2]]
        found = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        paths = [pathlib.Path(line.split(" ")[0]) for line in found if line.startswith(f"{CSRC}/")]
        return "".join(f"\n  at {p.relative_to(CSRC)}" for p in paths if p.name.split(":")[0] not in _NOT_TOLD)

    if not shutil.which("addr2line"):
        return report
    return re.sub(r"\n  at (\S+)\+(0x[0-9a-f]+)", lines, report)


def _convert(name: str, value, c_type):
    if value is None:
        return ctypes.c_void_p()
    if isinstance(value, bytes):
        return ctypes.c_char_p(value)
    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous, f"{name}: an array is not contiguous"
        assert c_type in (None, ctypes.c_void_p), f"{name}: an array where a number belongs"
        return ctypes.c_void_p(value.ctypes.data)
    assert c_type is not ctypes.c_void_p, f"{name}: {value!r} where an array belongs"
    if c_type is None:
        c_type = ctypes.c_float if isinstance(value, (float, np.floating)) else ctypes.c_int64
    return c_type(value)


library = functools.cache(Library)


def load(family: str, sanitized: bool = False, counted: bool = False) -> Library:
    """The library of a family, built if it is not up to date. Raises Broken."""
    path = build([family], sanitized, counted)[family]
    if isinstance(path, Broken):
        raise path
    return library(path)
