"""Loads the compiled operators; without them defines the same operators in pure torch and says so once."""

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
    """Imports the extension; returns why it could not."""
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
    fallback.implement(_library, "CUDA")  # what the build has no CUDA kernels for still works, at no gain

ops = torch.ops.prunekernels


def has_extension() -> bool:
    """Whether the compiled operators are loaded."""
    return _C is not None


def build_info() -> dict[str, str]:
    """Compiler, torch and CUDA version ('': none), the CPU instruction set in force; {} without the extension."""
    return dict(_C.build_info()) if _C else {}


def kernels() -> list[dict[str, Any]]:
    """The kernel table: name, operation, device, element, "isa" (CPU) or "arch" (CUDA: the oldest that has it), and
    whether this build holds it ("compiled"); [] without the extension."""
    return list(_C.kernels()) if _C else []


def cap_isa(name: str | None) -> None:
    """Caps the instruction set of the CPU kernels ("scalar", "avx2", "avx512", "avx512vbmi2"); None lifts the cap."""
    if _C:
        _C.cap_isa(name or "")
