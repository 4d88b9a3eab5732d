"""Loads the compiled operators. Without them it defines the same operators in pure torch and warns once."""

from __future__ import annotations

import importlib
import os
import warnings
from types import ModuleType
from typing import Any

import torch

from . import fallback

_C: ModuleType | None = None


def _load() -> str:
    """Imports the extension into _C. Returns why that failed, or an empty string."""
    global _C
    if os.environ.get("PRUNEKERNELS_NO_EXT", "0") not in ("", "0"):
        return "PRUNEKERNELS_NO_EXT is set"
    try:
        _C = importlib.import_module("prunekernels._C")
    except ImportError as error:
        return str(error)
    return ""


_reason = _load()
if _C is None:
    warnings.warn(
        f"prunekernels: the compiled extension is not in use ({_reason}); pure torch computes the same numbers, slowly",
        RuntimeWarning,
        stacklevel=3,
    )
    _library = fallback.define()
else:
    _library = torch.library.Library("prunekernels", "IMPL")
    fallback.implement(_library, "CUDA")  # for operators without CUDA kernels in this build

ops = torch.ops.prunekernels


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
    """Caps the instruction set of the CPU kernels: "scalar", "avx2", "avx512" or "avx512vbmi2". None lifts the cap."""
    if _C:
        _C.cap_isa(name or "")
