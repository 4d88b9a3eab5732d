"""Loads the compiled operators. Without them it defines the same operators in pure torch and warns once."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import mmap
import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from . import fallback

_C: ModuleType | None = None
PACKAGE = Path(__file__).parents[1]
BUILD = "python setup.py build_ext --inplace"
INSTALL = "pip install --force-reinstall --no-deps --no-build-isolation --no-binary prunekernels prunekernels"
BUILT_FOR = re.compile(rb"prunekernels built for torch=([\w.+-]+)")  # as csrc/binding.cpp writes it


class Missing(NamedTuple):
    """Why the extension is not in use, and what to do about it."""

    reason: str
    mend: str


def _load() -> Missing | None:
    """Imports the extension into _C. Returns why that failed."""
    global _C
    if os.environ.get("PRUNEKERNELS_NO_EXT", "0") not in ("", "0"):
        return Missing("PRUNEKERNELS_NO_EXT is set", "unset PRUNEKERNELS_NO_EXT")
    spec = importlib.util.find_spec("prunekernels._C")
    if spec is None or spec.origin is None:
        return _not_built()
    if not os.path.samefile(Path(spec.origin).parent, PACKAGE):
        reason = f"the one in {spec.origin} is of another tree than {PACKAGE}"
        return Missing(reason, f"`{BUILD}` there makes one that fits")
    built_for = torch_of(Path(spec.origin))
    if built_for and release(built_for) != release(torch.__version__):
        reason = f"it was built for torch {built_for}, and this is torch {torch.__version__}"
        return Missing(reason, f'`pip install "torch=={release(built_for)}.*"`, or {_build()}')
    try:
        _C = importlib.import_module("prunekernels._C")
    except ImportError as error:
        return Missing(str(error), f"if it was built for another version of torch, build it again: {_build()}")
    return None


def torch_of(library: Path) -> str:
    """The version of torch that an extension was built for, read without loading it. "" if it does not say."""
    if not library.stat().st_size:
        return ""
    with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = BUILT_FOR.search(content)
        return found[1].decode() if found else ""


def release(version: str) -> str:
    """Major and minor of a version: torch keeps its ABI in the patches of one release."""
    return ".".join(version.split("+")[0].split(".")[:2])


def build_command() -> str:
    """What builds the extension for the torch that is installed."""
    return f"cd {PACKAGE.parent} && {BUILD}" if _is_checkout() else INSTALL


def _is_checkout() -> bool:
    return (PACKAGE.parent / "setup.py").exists()


def _build() -> str:
    return f"`{build_command()}` where there is a C++ compiler"


def _not_built() -> Missing:
    """What Python found instead of a package with its extension, and what to do."""
    if not _is_checkout():
        return Missing(f"{PACKAGE} is without it, as the wheel for any machine is", _build())
    mend = f"`{BUILD}` there builds it"
    for distribution in importlib.metadata.distributions(name="prunekernels"):
        installed = Path(str(distribution.locate_file("prunekernels")))
        if any(installed.glob("_C*")):
            mend += f", and from another directory Python finds the installed package {installed}"
            break
    return Missing(f"Python found the source tree {PACKAGE.parent}, in which it is not built", mend)


missing = _load()
if missing:
    warnings.warn(
        f"prunekernels: the compiled extension is not in use ({missing.reason}: {missing.mend}); "
        "pure torch computes the same numbers, slowly",
        RuntimeWarning,
        stacklevel=3,
    )
    _library = fallback.define()
else:
    _library = torch.library.Library("prunekernels", "FRAGMENT")
    fallback.implement(_library, "CUDA")  # for operators without CUDA kernels in this build

ops = torch.ops.prunekernels
outdated: list[str] = []  # operators that the extension should have, and lacks: it is of an older source


def register(schemas: Sequence[str], operators: Sequence[Callable]) -> None:
    """Operators, each with its schema, in pure torch where the extension has none, or has none for CUDA."""
    for schema, operator in zip(schemas, operators, strict=True):
        compiled = hasattr(ops, operator.__name__)
        if not compiled:  # no extension, or one of an older source
            _library.define(schema)
            if _C is not None:
                outdated.append(operator.__name__)
        key = "CUDA" if compiled else "CompositeExplicitAutograd"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"prunekernels::{operator.__name__}", key):
            _library.impl(operator.__name__, operator, key)


def has_extension() -> bool:
    """Whether the compiled operators are loaded. Without them pure torch computes the same numbers, slowly.

    Returns:
        True or False.

    Examples:
        >>> pk.has_extension() == bool(pk.build_info())
        True
    """
    return _C is not None


def build_info() -> dict[str, str]:
    """How the extension was built, and the CPU instruction set that it uses.

    Returns:
        A dict of strings, among them the compiler, the versions of torch and CUDA ("" for none) and the GPU
        architectures compiled for, such as "sm_80,compute_80,sm_90a"; {} without the extension.

    Examples:
        >>> all(isinstance(value, str) for value in pk.build_info().values())
        True
    """
    return dict(_C.build_info()) if _C else {}


def kernels() -> list[dict[str, Any]]:
    """The kernel table of the extension.

    Returns:
        A dict for each kernel: "name", "operation", "device", "element", "isa" (CPU) or "arch" (CUDA: the oldest that
        has it) and "architectures" (CUDA: those that this build is for), and "compiled" (whether this build holds it);
        [] without the extension.

    Examples:
        >>> all({"name", "operation", "device", "compiled"} <= kernel.keys() for kernel in pk.kernels())
        True
    """
    return list(_C.kernels()) if _C else []


def cpu_isa() -> str:
    """The best instruction set that this CPU has, of those that cap_isa() names. "" without the extension."""
    return _C.cpu_isa() if _C else ""


def cap_isa(name: str | None) -> None:
    """Caps the instruction set of the CPU kernels: "scalar", "avx2", "avx512", "avx512vbmi2", "avx512bf16" or "amx".
    None lifts the cap."""
    if _C:
        _C.cap_isa(name or "")
