"""bind: tells an optimizer which rows of a model's parameters are dead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.batch_norm import MaskedBatchNorm2d
from ..nn.conv import MaskedConv2d
from ..ops import mask_table
from .dead_rows import DeadRows, MaskedLayer, check_freeze
from .step import MaskedStep

Index = tuple[Tensor, ...]


class Binding:
    """The tie between an optimizer and a model's masks; remove() cuts it."""

    def __init__(self, optimizer: torch.optim.Optimizer, layers: list[MaskedLayer], freeze: str) -> None:
        self.optimizer = optimizer
        self._layers, self._freeze = layers, freeze
        self._by_freeze: dict[str, DeadRows] = {}
        self._hooks: list[Any] = []
        if not isinstance(optimizer, MaskedStep):
            keeper = _Keeper(self)
            self._hooks.append(optimizer.register_step_pre_hook(keeper.before))
            self._hooks.append(optimizer.register_step_post_hook(keeper.after))

    def tables(self, freeze: str | None = None) -> Mapping[Tensor, Tensor]:
        """By parameter, the mask table of what a step leaves alone; parameters with nothing dead are absent."""
        freeze = freeze or self._freeze
        if freeze not in self._by_freeze:
            self._by_freeze[freeze] = DeadRows(self._layers, freeze)
        return self._by_freeze[freeze].tables()

    def remove(self) -> None:
        """From now on the optimizer steps as if nothing was dead."""
        for hook in self._hooks:
            hook.remove()
        if self.optimizer.__dict__.get("_binding") is self:
            del self.optimizer.__dict__["_binding"]


def _masked_layers(model: nn.Module) -> dict[str, MaskedLayer]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (MaskedConv2d, MaskedBatchNorm2d))}
    if not layers:
        raise ValueError("bind: model: expected masked layers (see pk.convert), got none")
    owner: dict[Tensor, str] = {}
    for name, layer in layers.items():
        for parameter in layer.parameters(recurse=False):
            if owner.setdefault(parameter, name) != name:
                raise ValueError(
                    f"bind: model: expected parameters of their own, got one of {owner[parameter]} and {name}"
                )
    return layers


def bind(optimizer: torch.optim.Optimizer, model: nn.Module, *, freeze: str | None = None) -> Binding:
    """Makes an optimizer's steps leave the dead rows of a model's masked layers, and their state, exactly as they are.

    A masked optimizer skips them and knows by itself what to freeze; any other gets hooks that put them back after each
    step (of state that the step has just made, zeros), at the cost of a copy of the dead entries. freeze, for such an
    optimizer: "hard" (default; filters that hard_mask drops) or "dead" (all that the masks drop); a norm has no hard
    mask, and its dead channels are frozen under either.

    Masks are looked at in each step, so change them as you like. Binding again replaces the former binding.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"bind: optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, MaskedStep) and freeze is not None:
        raise ValueError(f"bind: freeze: expected None, as {type(optimizer).__name__} has its own, got {freeze!r}")
    check_freeze("bind", freeze or "hard")
    layers = _masked_layers(model)
    held = {p for group in optimizer.param_groups for p in group["params"]}
    if not any(p in held for layer in layers.values() for p in layer.parameters(recurse=False)):
        raise ValueError("bind: optimizer: expected parameters of the model's masked layers, got only others")
    former = optimizer.__dict__.get("_binding")
    if former is not None:
        former.remove()
    binding = optimizer.__dict__["_binding"] = Binding(optimizer, list(layers.values()), freeze or "hard")
    return binding


class _Keeper:
    """Keeps frozen entries over a step of an optimizer that knows nothing of them."""

    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self._tables: Mapping[Tensor, Tensor] | None = None
        self._frozen: dict[Tensor, Index] = {}
        self._kept: list[tuple[Tensor, Index, Tensor, dict[str, Tensor]]] = []

    def _refresh(self) -> None:
        tables = self._binding.tables()
        if tables is not self._tables:
            held = {p for group in self._binding.optimizer.param_groups for p in group["params"]}
            self._frozen = {p: _frozen_index(p, table) for p, table in tables.items() if p in held}
            self._tables = tables

    @torch.no_grad()
    def before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._refresh()
        self._kept = []
        for p, index in self._frozen.items():
            state = {name: s[index] for name, s in optimizer.state.get(p, {}).items() if _is_beside(s, p)}
            self._kept.append((p, index, p[index], state))

    @torch.no_grad()
    def after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for p, index, values, state in self._kept:
            p[index] = values
            for name, s in optimizer.state.get(p, {}).items():
                if _is_beside(s, p):
                    s[index] = state.get(name, s.new_zeros(()))
        self._kept = []


def _is_beside(state: object, parameter: Tensor) -> bool:
    return isinstance(state, Tensor) and state.shape == parameter.shape


def _frozen_index(parameter: Tensor, table: Tensor) -> Index:
    """Rows of a vector, or where all of a row's kernels are dead; else (rows, channels)."""
    K, C, groups = table[1:4].tolist()
    if parameter.dim() == 1:
        return ((~mask_table.live_filters(table, K)).nonzero().flatten(),)
    dead = ~mask_table.live_kernels(table, K, C, C // groups)
    rows = dead.all(1)
    if int(dead.sum()) == int(rows.sum()) * dead.shape[1]:
        return (rows.nonzero().flatten(),)
    return dead.nonzero(as_tuple=True)
