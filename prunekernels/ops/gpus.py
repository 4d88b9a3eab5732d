"""GPUs that the kernels of this build were not compiled for: once torch starts CUDA, pure torch computes there."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import extension, fallback, fallback_parts, fallback_steps

_kept: list[torch.library.Library] = []  # its implementations end with it


def unserved() -> list[str]:
    """The compute capabilities, such as "8.0", of GPUs that run no kernel of this build. Starts CUDA."""
    runs_on = getattr(extension._C, "runs_on_gpu", None)
    if runs_on is None or not extension.build_info()["cuda"]:
        return []
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return [f"{major}.{minor}" for major, minor in sorted(found) if not runs_on(major, minor)]


def mend(capabilities: Sequence[str]) -> str:
    """The command that builds the kernels for GPUs of these compute capabilities too."""
    wanted = ";".join(capability + "a" * capability.startswith("9.") for capability in capabilities)
    return f'export PRUNEKERNELS_CUDA=1 TORCH_CUDA_ARCH_LIST="{wanted}" && {extension.build_command()}'


@functools.cache
def _is_compiled(operator: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"prunekernels::{operator}", "CUDA")


def has_kernel(operator: str) -> bool:
    """Whether this build has an operator for CUDA that has no fallback, and every GPU runs it."""
    return not _kept and _is_compiled(operator)


def use_fallbacks(key: str = "CUDA") -> None:
    """Puts pure torch in the place of the compiled operators of a dispatch key."""
    operators: list[Callable[..., Any]] = [
        *fallback.OPERATORS,
        *fallback_steps.OPERATORS,
        *fallback_parts.OPERATORS,
    ]
    library = torch.library.Library("prunekernels", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there was a kernel before
        for operator in operators:
            library.impl(operator.__name__, operator, key)
    _kept.append(library)


def _check() -> None:
    found = unserved()
    if found:
        use_fallbacks()
        warnings.warn(
            f"prunekernels: this build has CUDA kernels for {extension.build_info()['cuda_architectures']}, and a GPU "
            f"here has compute capability {', '.join(found)} ({mend(found)}); pure torch computes on CUDA, slowly",
            RuntimeWarning,
            stacklevel=2,
        )


if extension._C is not None and _is_compiled("masked_conv2d"):
    torch.cuda._lazy_call(_check)  # at once where CUDA has started
