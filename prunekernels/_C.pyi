from collections.abc import Sequence
from typing import Any

import numpy as np

def build_info() -> dict[str, str]: ...
def kernels() -> list[dict[str, Any]]: ...
def cap_isa(name: str) -> None: ...
def choose_plan(
    plan: str,
    direction: str,
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    table: np.ndarray,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: str,
    channels_last: bool,
    device: str,
) -> str: ...
def plan_table() -> list[dict[str, Any]]: ...
def clear_plans() -> None: ...
def has_pixel_kernels() -> bool: ...
