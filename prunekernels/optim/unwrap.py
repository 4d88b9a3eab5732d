"""unwrap: the optimizer that steps, inside the wrappers of training libraries."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_ELSEWHERE = ("optim", "base_optimizer", "_base_optimizer")  # where some optimizers keep another one, with the state


def unwrap(op: str, optimizer: Any, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer inside wrappers that have it in `.optimizer` (Accelerate, Lightning, DeepSpeed, one's own).

    A wrapper has no hooks and perhaps no state, so a binding or a method works on what it returns. What would move dead
    weights or their state all the same raises, naming op: weights written by the wrapper itself, a step without hooks,
    state or parameters that are kept elsewhere.
    """
    expected = "expected a torch.optim.Optimizer or a wrapper with one in .optimizer"
    wrappers = []
    while (inner := getattr(optimizer, "optimizer", None)) is not None and inner is not optimizer:
        wrappers.append(optimizer)
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"{op}: optimizer: {expected}, got {_name(optimizer)}")
    for wrapper in wrappers:
        if getattr(wrapper, "state", optimizer.state) is not optimizer.state:
            raise TypeError(
                f"{op}: optimizer: {expected} that leaves the weights to it, got {_name(wrapper)}, which has a state "
                f"of its own: train with its {_name(optimizer)} alone"
            )
    _check_step(f"{op}: optimizer: {expected}", optimizer)
    own = set(model.parameters())
    if wrappers and not any(p in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"{op}: optimizer: expected the model's own parameters, got copies of them in {_name(wrappers[0])}: masks "
            "do not reach those; train in float32, with autocast for speed"
        )
    return optimizer


def _check_step(expected: str, optimizer: torch.optim.Optimizer) -> None:
    """Raises unless hooks around a step see the whole of it, and `state` is the state of the step."""
    if not getattr(type(optimizer).step, "hooked", False):  # Optimizer.__init__ makes it so
        raise TypeError(f"{expected}, got {_name(optimizer)}, whose step runs no hooks, so nothing can freeze rows")
    for name in _ELSEWHERE:
        inner = getattr(optimizer, name, None)
        if isinstance(inner, torch.optim.Optimizer) and inner.state is not optimizer.state:
            raise TypeError(
                f"{expected}, got {_name(optimizer)}, whose state is in .{name}: train with {_name(inner)} itself"
            )


def _name(value: object) -> str:
    return type(value).__name__
