"""Exports networks whose forward depends on values, such as detectors that choose boxes: on the example's path."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..nn.example import Example


class _FloorDivision(TorchFunctionMode):
    """Divides by other operators: those that the exporter makes of it fail on sizes that depend on values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.div, torch.Tensor.div) and kwargs.get("rounding_mode") == "floor" and len(args) == 2:
            a, b = args
            return torch.div(a - torch.remainder(a, b), b, rounding_mode="trunc")
        return func(*args, **kwargs)


def export_by_values(plain: nn.Module, inputs: Example) -> Any | None:
    """The exported program; where the forward asks for a value, that of the example decides. None: it fails.

    As torch.export.draft_export, without its reports. Sizes that depend on values have those of the example as hints.
    """
    from torch._functorch import config

    given = inputs.map(torch.clone)
    choose = config.patch(fake_tensor_propagate_real_tensors=True, generate_fake_kernels_from_real_mismatches=True)
    with choose, quiet(), warnings.catch_warnings(), torch.no_grad(), _FloorDivision():
        warnings.simplefilter("ignore")
        try:
            return torch.export.export(plain, given.args, given.kwargs, strict=False)
        except Exception:
            return None


def asks_for_values(error: BaseException | None) -> bool:
    """Whether the exporter failed at a value that a path or a size depends on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if "DataDependent" in type(error).__name__ or "data-dependent" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the exporter, which warns and prints graphs: one of several attempts may fail without harm."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
