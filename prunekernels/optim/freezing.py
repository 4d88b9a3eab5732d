"""bind: makes the steps of an optimizer leave the dead rows of a model alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.masked_filters import MaskedFilters
from ..nn.masked_norm import MaskedNorm
from ..nn.sharding import check_whole
from ..ops import mask_table
from .binding import Binding
from .dead_rows import MaskedLayer, check_freeze
from .step import MaskedStep
from .unwrap import unwrap

Index = tuple[Tensor, ...]


def _masked_layers(model: nn.Module) -> dict[str, MaskedLayer]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (MaskedFilters, MaskedNorm))}
    if not layers:
        raise ValueError("bind: model: expected masked layers (see pk.convert), got none")
    owner: dict[Tensor, str] = {}
    for name, layer in layers.items():
        check_whole("bind", name, layer)
        for parameter in layer.parameters(recurse=False):
            if owner.setdefault(parameter, name) != name:
                raise ValueError(
                    f"bind: model: expected parameters of their own, got one of {owner[parameter]} and {name}"
                )
    return layers


def bind(optimizer: torch.optim.Optimizer, model: nn.Module, *, freeze: str | None = None) -> Binding:
    """Makes an optimizer's steps leave the dead rows of a model's masked layers, and their state, exactly as they are.

    A masked optimizer skips dead rows and has a `freeze` of its own. Any other optimizer gets hooks that put the dead
    entries back after each step, at the cost of a copy of those entries; state that the first step creates for them
    becomes zero. Every step looks at the masks anew, so they may change at any time. Binding an optimizer again
    replaces its former binding.

    Args:
        optimizer: A `torch.optim.Optimizer` with parameters of the model's masked layers, or a wrapper with one in
            `.optimizer` (Accelerate's, Lightning's).
        model: A network with masked layers (see `prunekernels.convert`).
        freeze: For an optimizer that is not a masked one: "hard" (the default) freezes the filters that `hard_mask`
            drops, "dead" everything that the masks drop. A norm has no hard mask: its dead channels are frozen under
            either.

    Returns:
        The `Binding`, whose `remove()` undoes it.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
        >>> report = pk.convert(model)
        >>> model[0].set_masks(filter=torch.arange(8) > 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
        >>> binding = pk.optim.bind(optimizer, model, freeze="dead")
        >>> before = model[0].weight.detach().clone()
        >>> model(torch.randn(2, 3, 6, 6)).sum().backward()
        >>> optimizer.step()
        >>> torch.equal(model[0].weight[:4], before[:4]), torch.equal(model[0].weight[4:], before[4:])
        (True, False)
    """
    optimizer = unwrap("bind", optimizer, model)
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
    if not isinstance(optimizer, MaskedStep):
        keeper = _FrozenEntries(binding)
        binding.hooks.append(optimizer.register_step_pre_hook(keeper.before))
        binding.hooks.append(optimizer.register_step_post_hook(keeper.after))
    return binding


def freeze_dead(optimizer: torch.optim.Optimizer, model: nn.Module) -> Binding:
    """bind with freeze="dead", which a masked optimizer takes over into its groups."""
    if not isinstance(optimizer, MaskedStep):
        return bind(optimizer, model, freeze="dead")
    for group in (optimizer.defaults, *optimizer.param_groups):  # defaults: for groups added later
        group["freeze"] = "dead"
    return bind(optimizer, model)


class _FrozenEntries:
    """Hooks around a step of an optimizer that is not masked: they save the frozen entries and put them back."""

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
        """Saves the frozen entries of every parameter and of its state."""
        self._refresh()
        self._kept = []
        for p, index in self._frozen.items():
            state = {name: s[index] for name, s in optimizer.state.get(p, {}).items() if _has_entries_of(s, p)}
            self._kept.append((p, index, p[index], state))

    @torch.no_grad()
    def after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Puts back what `before` saved; state that this step created becomes zero there."""
        for p, index, values, state in self._kept:
            p[index] = values
            for name, s in optimizer.state.get(p, {}).items():
                if _has_entries_of(s, p):
                    s[index] = state.get(name, s.new_zeros(()))
        self._kept = []


def _has_entries_of(state: object, parameter: Tensor) -> bool:
    """Whether a value of the optimizer's state has one number for each of the parameter's."""
    return isinstance(state, Tensor) and state.shape == parameter.shape


def _frozen_index(parameter: Tensor, table: Tensor) -> Index:
    """Index of the frozen entries: (rows,) where whole rows are frozen, otherwise (rows, channels)."""
    K, C, groups = table[1:4].tolist()
    if parameter.dim() == 1:
        return ((~mask_table.live_filters(table, K)).nonzero().flatten(),)
    dead = ~mask_table.live_kernels(table, K, C, C // groups)
    rows = dead.all(1)
    if int(dead.sum()) == int(rows.sum()) * dead.shape[1]:
        return (rows.nonzero().flatten(),)
    return dead.nonzero(as_tuple=True)
