"""Compiles the model of AMX's instructions, and a program that runs convolutions by the instructions themselves."""

import ctypes
import fcntl
import functools
import pathlib

import numpy as np

from cases.emulated import build

HERE = pathlib.Path(__file__).parent
KERNELS = build.CSRC / "cpu" / "kernels"
FLAGS = f"-std=c++17 -O2 -g0 -fPIC -Wall -ffp-contract=off -I{build.CSRC}"
CORE = ["mask_table", "result_blocks", "tile_lists"]
PARTS = ["amx", "amx_model", "avx512bf16", "pixel_axis", "pixel_conv", "pixel_grad_weight", "pixel_kernels"]


def _ninja_file() -> str:
    lines = [
        "rule compile",
        f"  command = {build.CXX} {FLAGS} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {build.CXX} $shared $in -o $out",
    ]
    sources = [build.CSRC / "core" / f"{part}.cpp" for part in CORE]
    sources += [*(KERNELS / f"{part}.cpp" for part in PARTS), HERE / "check.cpp", HERE / "model.cpp"]
    lines += [f"build {source.stem}.o: compile {source}" for source in sources]
    program = " ".join(f"{part}.o" for part in (*CORE, *PARTS, "check"))
    return "\n".join([*lines, f"build check: link {program}", "build model.so: link model.o", "  shared = -shared", ""])


def _built(name: str) -> pathlib.Path:
    folder = build.ROOT / "build" / "amx"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        plan, text = folder / "build.ninja", _ninja_file()
        if not plan.exists() or plan.read_text() != text:
            plan.write_text(text)
        if why := build._ninja(folder, name):
            raise build.Broken(why)
    return folder / name


@functools.cache
def program() -> pathlib.Path:
    return _built("check")


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_built("model.so")))
    for name in ("configure", "zero", "load", "store", "dot"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


class Tiles:
    """The model's tiles. What an instruction does not allow raises ValueError."""

    def __init__(self, rows=(), row_bytes=(), **other):
        _library().release()
        if rows:
            self.configure(config(rows, row_bytes, **other))

    def configure(self, config: np.ndarray) -> None:
        self._run("configure", config.ctypes.data_as(ctypes.c_void_p))

    def configuration(self) -> np.ndarray:
        stored = np.zeros(64, np.uint8)
        _library().configuration(stored.ctypes.data_as(ctypes.c_void_p))
        return stored

    def release(self) -> None:
        _library().release()

    def zero(self, t: int) -> None:
        self._run("zero", t)

    def load(self, t: int, array: np.ndarray, stride: int | None = None) -> None:
        stride = array.strides[0] if stride is None else stride
        self._run("load", t, array.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(stride))

    def store(self, t: int, array: np.ndarray) -> np.ndarray:
        self._run("store", t, array.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(array.strides[0]))
        return array

    def dot(self, c: int, a: int, b: int) -> None:
        self._run("dot", c, a, b)

    @staticmethod
    def _run(name: str, *arguments) -> None:
        if wrong := getattr(_library(), name)(*arguments):
            raise ValueError(wrong.decode())


def config(rows, row_bytes, palette=1, start_row=0) -> np.ndarray:
    made = np.zeros(64, np.uint8)
    made[:2] = palette, start_row
    made[16 : 16 + 2 * len(row_bytes)].view(np.uint16)[:] = row_bytes
    made[48 : 48 + len(rows)] = rows
    return made


def cpu_has(what: str) -> bool:
    return bool(getattr(_library(), f"has_{what}")())


def arithmetic(name: str, *arrays: np.ndarray, result=np.float32) -> np.ndarray:
    """Element by element: add, multiply_add, narrow; cpu_add, ... are the CPU's own."""
    to = np.zeros(arrays[0].size, result)
    pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (*arrays, to)]
    getattr(_library(), name)(*pointers, ctypes.c_int64(to.size))
    return to
