"""Makes an optimizer for the small network out of the one that trained the masked network."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.adapted import computed_layers
from ..optim.unwrap import unwrap
from .channels import Index, take

Origin = tuple[str, Index | None]


def gather_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, small: nn.Module, origins: Mapping[int, Origin]
) -> torch.optim.Optimizer:
    """An optimizer of the same class, groups and options; state shaped like its parameter is cut to the kept part.

    Of a wrapper, the class is that of the optimizer inside.

    origins: by id of a small parameter, its name in model and the kept index of each dimension (None: a new bias, which
    has no state).
    """
    if computed := computed_layers(model):
        raise ValueError(f"shrink: optimizer: expected weights that are parameters, got computed ones in "
                         f"{', '.join(computed)}: shrink without optimizer and make a new one")  # fmt: skip
    optimizer = unwrap("shrink", optimizer, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    successors: dict[str, list[nn.Parameter]] = {}
    for parameter in small.parameters():
        successors.setdefault(origins[id(parameter)][0], []).append(parameter)
    groups = []
    for i, group in enumerate(optimizer.param_groups):
        foreign = [tuple(p.shape) for p in group["params"] if id(p) not in names]
        if foreign:
            raise ValueError(f"shrink: optimizer: expected parameters of the model, got {foreign} in group {i}")
        parts = [part for p in group["params"] for part in successors.get(names[id(p)], [])]
        groups.append({**group, "params": parts})
    result = _same_class(optimizer, groups)
    old = {name: p for name, p in model.named_parameters()}
    for parameter in small.parameters():
        name, index = origins[id(parameter)]
        state = optimizer.state.get(old[name]) if name in old else None  # a norm may have got factors of its own
        if state and index is not None:
            kept = {key: _gather(value, old[name], index) for key, value in state.items()}
            result.state[parameter] = kept
    return result


def _gather(value: Any, parameter: Tensor, index: Index) -> Any:
    if not isinstance(value, Tensor):
        return value
    return (take(value, index) if value.shape == parameter.shape else value).clone()


def _same_class(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    kind = type(optimizer)
    takes = inspect.signature(kind).parameters
    options = {name: value for name, value in optimizer.defaults.items() if name in takes}
    try:
        return kind(groups, **options)  # type: ignore[arg-type]
    except Exception as error:
        raise TypeError(
            f"shrink: optimizer: expected one that its param_groups and defaults can make, got {kind.__name__}: {error}"
        ) from error
