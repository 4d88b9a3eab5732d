"""Loads the compiled operators. Without them it defines the same operators in pure torch and warns once."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import fallback

_C: ModuleType | None = None
PACKAGE = Path(__file__).parents[1]
BUILD = "python setup.py build_ext --inplace"


def _load() -> str:
    """Imports the extension into _C. Returns why that failed, or an empty string."""
    global _C
    if os.environ.get("PRUNEKERNELS_NO_EXT", "0") not in ("", "0"):
        return "PRUNEKERNELS_NO_EXT is set"
    spec = importlib.util.find_spec("prunekernels._C")
    if spec is None or spec.origin is None:
        return _why_missing()
    if not os.path.samefile(Path(spec.origin).parent, PACKAGE):
        return f"the one in {spec.origin} is of another tree than {PACKAGE}, where `{BUILD}` makes one that fits"
    try:
        _C = importlib.import_module("prunekernels._C")
    except ImportError as error:
        return f"{error}; if it was built for another version of torch, build it again"
    return ""


def _why_missing() -> str:
    """What Python found instead of a package with its extension, and what to do."""
    if not (PACKAGE.parent / "setup.py").exists():
        return f"{PACKAGE} is without it, install prunekernels again where there is a C++ compiler"
    found = f"Python found the source tree {PACKAGE.parent}, in which it is not built: `{BUILD}` there builds it"
    for distribution in importlib.metadata.distributions(name="prunekernels"):
        installed = Path(str(distribution.locate_file("prunekernels")))
        if any(installed.glob("_C*")):
            return f"{found}, and from another directory Python finds the installed package {installed}"
    return found


_reason = _load()
if _C is None:
    warnings.warn(
        f"prunekernels: the compiled extension is not in use ({_reason}); pure torch computes the same numbers, slowly",
        RuntimeWarning,
        stacklevel=3,
    )
    _library = fallback.define()
else:
    _library = torch.library.Library("prunekernels", "FRAGMENT")
    fallback.implement(_library, "CUDA")  # for operators without CUDA kernels in this build

ops = torch.ops.prunekernels


def register(schemas: Sequence[str], operators: Sequence[Callable]) -> None:
    """Operators, each with its schema, in pure torch where the extension has none, or has none for CUDA."""
    for schema, operator in zip(schemas, operators, strict=True):
        compiled = hasattr(ops, operator.__name__)
        if not compiled:  # no extension, or one of an older source
            _library.define(schema)
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
        A dict of strings, among them the compiler and the versions of torch and CUDA ("" for none); {} without the
        extension.

    Examples:
        >>> all(isinstance(value, str) for value in pk.build_info().values())
        True
    """
    return dict(_C.build_info()) if _C else {}


def kernels() -> list[dict[str, Any]]:
    """The kernel table of the extension.

    Returns:
        A dict for each kernel: "name", "operation", "device", "element", "isa" (CPU) or "arch" (CUDA: the oldest that
        has it), and "compiled" (whether this build holds it); [] without the extension.

    Examples:
        >>> all({"name", "operation", "device", "compiled"} <= kernel.keys() for kernel in pk.kernels())
        True
    """
    return list(_C.kernels()) if _C else []


def cap_isa(name: str | None) -> None:
    """Caps the instruction set of the CPU kernels: "scalar", "avx2", "avx512", "avx512vbmi2", "avx512bf16" or "amx".
    None lifts the cap."""
    if _C:
        _C.cap_isa(name or "")
