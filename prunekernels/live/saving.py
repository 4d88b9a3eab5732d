"""Hooks that save tensors, and what live tensors keep.

A checkpoint saves tensors by a hook, and saves the same again when it runs for the second time. What a live tensor
keeps from the first run, such as its full width, is found in the second one: so it is made past the hook.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

_top_hooks: Callable[[bool], Any] = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_tracing: None
)


def is_hooked() -> bool:
    """Whether hooks save tensors now."""
    return _top_hooks(False) is not None


def unhooked() -> AbstractContextManager[object]:
    """A block in which tensors are saved as they are."""
    return saved_tensors_hooks(_itself, _itself) if is_hooked() else nullcontext()


def _itself(saved: Any) -> Any:
    return saved
