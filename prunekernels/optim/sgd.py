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
    """torch.optim.SGD, to the bit, except that frozen rows and their momentum stay exactly as they are.

    Weight decay does not move a frozen row either. `prunekernels.optim.bind` says which rows are dead. A weight that
    comes back finds the momentum it left. State dicts interchange with those of `torch.optim.SGD`. A step calls one
    operator for each group, device and dtype; `maximize` adds a pass over the gradients.

    Args:
        params: Parameters or groups of them, as in `torch.optim.SGD`. A group may have its own `freeze`.
        lr: Learning rate, a number.
        momentum: As in `torch.optim.SGD`.
        dampening: As in `torch.optim.SGD`.
        weight_decay: As in `torch.optim.SGD`.
        nesterov: As in `torch.optim.SGD`.
        maximize: As in `torch.optim.SGD`.
        freeze: "hard" freezes the filters that `hard_mask` drops; other dead filters move by momentum and weight
            decay, as `torch.optim` moves them. "dead" freezes every filter, kernel and input column that the masks
            drop: they are neither read nor written, and the step costs what is live. Dead channels of a norm are
            frozen under either.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> report = pk.convert(model)
        >>> optimizer = pk.optim.MaskedSGD(model.parameters(), lr=0.1, momentum=0.9, freeze="dead")
        >>> binding = pk.optim.bind(optimizer, model)
        >>> model[0].set_masks(filter=torch.arange(8) > 3)
        >>> model(torch.randn(2, 3, 6, 6)).sum().backward()
        >>> optimizer.step()  # filters 0 to 3 stay as they are
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
        """Takes one step.

        Args:
            closure: If given, computes the loss anew, gradients included, before the step.

        Returns:
            What the closure returned; None without one.
        """
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
        """Splits parameters by whether this is their first step: yields (first step?, parameters, their momenta)."""
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
