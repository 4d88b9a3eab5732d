"""MaskedSGD: torch.optim.SGD in one pass over what is live."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..ops.fallback_steps import ops
from .dead_rows import check_freeze
from .step import Closure, MaskedStep

OPERATOR = ops.masked_sgd_.default


class MaskedSGD(MaskedStep, torch.optim.SGD):
    """torch.optim.SGD, to the bit, that leaves frozen rows and their momentum exactly as they are, weight decay or not.

    Which rows are dead it learns from pk.optim.bind. freeze (a group may have its own): "hard" freezes the filters that
    hard_mask drops; other dead filters move by momentum and weight decay, as torch.optim moves them. "dead" freezes
    every filter, kernel and input column that the masks drop, neither reads nor writes them, and costs only what is
    live; a weight that comes back finds the momentum it left. A norm's dead channels are frozen under either.

        >>> optimizer = pk.optim.MaskedSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, freeze="dead")
        >>> pk.optim.bind(optimizer, model)

    State dicts interchange with torch.optim.SGD's. One operator per group, device and dtype; maximize costs one pass
    over the gradients more.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        freeze: str = "hard",
    ) -> None:
        check_freeze("MaskedSGD", freeze)
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            self._expect_number(name, value)
        plain = not nesterov or (momentum > 0 and dampening == 0)
        self._expect(plain, "nesterov", "a momentum and no dampening with it", f"{momentum} and {dampening}")
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize)
        self._set_freeze(freeze)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        """One step; closure, if given, computes the loss anew, and its value is returned."""
        loss = self._loss_of(closure)
        for group in self.param_groups:
            self._check_group(group, ("differentiable",))
            tables, remembers = self._tables_of(group), group["momentum"] != 0
            numbers = [group[name] for name in ("lr", "momentum", "dampening", "weight_decay", "nesterov")]
            for batch in self._batches(group):
                for first, params, momenta in self._with_momenta(batch) if remembers else [(False, batch, [])]:
                    masks, updates = [tables.get(p) for p in params], self._updates_of(params)
                    self._call(OPERATOR, group, params, momenta, masks, *updates, *numbers, first)
        return loss

    def _with_momenta(self, params: list[Tensor]) -> Iterator[tuple[bool, list[Tensor], list[Tensor]]]:
        """Those that have a momentum and those that get one in this step: (first step?, parameters, momenta)."""
        state = self.state
        momenta = [state[p].get("momentum_buffer") for p in params]
        new = [p for p, momentum in zip(params, momenta, strict=True) if momentum is None]
        if new:
            params = [p for p, momentum in zip(params, momenta, strict=True) if momentum is not None]
            for p in new:
                state[p]["momentum_buffer"] = torch.zeros_like(p)
            yield True, new, [state[p]["momentum_buffer"] for p in new]
        if params:
            yield False, params, [momentum for momentum in momenta if momentum is not None]
