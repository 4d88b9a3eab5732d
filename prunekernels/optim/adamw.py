"""MaskedAdamW: torch.optim.AdamW in one pass over what is live."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.fallback_steps import ops
from .dead_rows import check_freeze
from .step import Closure, MaskedStep

OPERATOR = ops.masked_adamw_.default


class MaskedAdamW(MaskedStep, torch.optim.AdamW):
    """torch.optim.AdamW, except that frozen rows and their averages stay exactly as they are.

    `prunekernels.optim.bind` says which rows are dead. State dicts interchange with those of `torch.optim.AdamW`; the
    step count of a parameter goes on while some of its rows are frozen. `amsgrad` and `capturable` are not offered.

    On the CPU the averages have torch's bits, and so have the weights beside torch's fused AdamW. Beside its other
    forms 2 % of the weights differ in the last bit after a step, because torch's square root is not always the
    correctly rounded one.

    Args:
        params: Parameters or groups of them, as in `torch.optim.AdamW`. A group may have its own `freeze`.
        lr: Learning rate, a number.
        betas: As in `torch.optim.AdamW`, two numbers in [0, 1).
        eps: As in `torch.optim.AdamW`.
        weight_decay: As in `torch.optim.AdamW`.
        maximize: As in `torch.optim.AdamW`.
        freeze: "hard" or "dead", as in `MaskedSGD`.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> report = pk.convert(model)
        >>> optimizer = pk.optim.MaskedAdamW(model.parameters(), lr=1e-3, freeze="dead")
        >>> binding = pk.optim.bind(optimizer, model)
        >>> model[0].set_masks(filter=torch.arange(8) > 3)
        >>> model(torch.randn(2, 3, 6, 6)).sum().backward()
        >>> optimizer.step()  # filters 0 to 3 stay as they are
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        freeze: str = "hard",
    ) -> None:
        check_freeze("MaskedAdamW", freeze)
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            self._expect_number(name, value)
        self._expect(all(0 <= beta < 1 for beta in betas), "betas", "two numbers in [0, 1)", betas)
        super().__init__(params, lr, (float(betas[0]), float(betas[1])), eps, weight_decay, maximize=maximize)
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
            self._check_group(group, ("amsgrad", "capturable", "differentiable"))
            tables = self._tables_of(group)
            numbers = [group["lr"], *group["betas"], group["eps"], group["weight_decay"]]
            for params in self._batches(group):
                state = [self._state_of(p) for p in params]
                averages = [[s[name] for s in state] for name in ("exp_avg", "exp_avg_sq", "step")]
                masks, updates = [tables.get(p) for p in params], self._updates_of(params)
                self._call(OPERATOR, group, params, *averages, masks, *updates, *numbers)
        return loss

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            is_double = torch.get_default_dtype() == torch.float64  # as in torch's AdamW
            state["step"] = torch.zeros((), dtype=torch.float64 if is_double else torch.float32)
            state |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        elif not state["step"].is_cpu:  # from a checkpoint of a fused or capturable AdamW
            state["step"] = state["step"].cpu()
        return state
