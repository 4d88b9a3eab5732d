"""before_step: work on the gradients that an optimizer is about to use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def before_step(optimizer: torch.optim.Optimizer, work: Callable[[], None]) -> Any:
    """Registers work to run before each step, when the gradients are there: of a step with a closure, after that.

    Lightning makes all its steps with one. Returns the hook's handle.
    """

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        closure = (*args[1:], kwargs.get("closure"))[0]
        if closure is None:
            work()
            return None

        def then_work() -> Any:
            loss = closure()
            work()
            return loss

        return args[:1], {**kwargs, "closure": then_work}

    return optimizer.register_step_pre_hook(hook)
