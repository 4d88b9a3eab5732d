"""MaskedStep: checks, batching and the frozen rows, which both masked optimizers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..nn.sharding import is_split
from .binding import Binding
from .dead_rows import check_freeze

Closure = Callable[[], Any]


class MaskedStep(torch.optim.Optimizer):
    """Mixin for a subclass of a torch optimizer; groups, state and state dicts stay those of the torch optimizer."""

    _binding: Binding | None = None
    updates: dict[Tensor, tuple[Tensor, Tensor]] = {}  # noqa: RUF012 - replaced, never written to

    def _expect(self, holds: bool, argument: str, expected: str, got: object) -> None:
        if not holds:
            raise ValueError(f"{type(self).__name__}: {argument}: expected {expected}, got {got}")

    def _expect_number(self, argument: str, value: object) -> None:
        is_number = isinstance(value, (int, float)) and value >= 0
        self._expect(is_number, argument, "a number, at least 0", "a tensor" if isinstance(value, Tensor) else value)

    def _set_freeze(self, freeze: str) -> None:
        """Sets freeze where a group has none. Called last in a constructor: torch's own builds the groups."""
        self.defaults["freeze"] = freeze
        for group in self.param_groups:
            check_freeze(type(self).__name__, group.setdefault("freeze", freeze))
            expected = "whole tensors (a torch.optim optimizer takes split ones)"
            split = any(map(is_split, group["params"]))
            self._expect(not split, "params", expected, "one that fully_shard has split over ranks")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a state dict of torch's own optimizer has none
            group.setdefault("freeze", self.defaults.get("freeze", "hard"))

    def track_updates(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Makes each step measure how far it moves every filter.

        After a step `updates[parameter]` holds two float32 tensors [rows]: the sums over each row (filter) of |change|
        and of its square.

        Args:
            parameters: What to measure, of two or more dimensions each. None: all such parameters; an empty list stops
                the measuring.

        Examples:
            >>> layer = pk.MaskedConv2d(3, 8, 3)
            >>> optimizer = pk.optim.MaskedSGD(layer.parameters(), lr=0.1)
            >>> optimizer.track_updates()
            >>> layer(torch.randn(2, 3, 6, 6)).sum().backward()
            >>> optimizer.step()
            >>> [tuple(sums.shape) for sums in optimizer.updates[layer.weight]]
            [(8,), (8,)]
        """
        if parameters is None:
            parameters = [p for group in self.param_groups for p in group["params"] if p.dim() >= 2]
        self.updates = {}
        for p in parameters:
            self._expect(p.dim() >= 2, "parameters", "two or more dimensions", list(p.shape))
            self.updates[p] = (p.new_zeros(len(p), dtype=torch.float32), p.new_zeros(len(p), dtype=torch.float32))

    def _loss_of(self, closure: Closure | None) -> Any:
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def _check_group(self, group: dict[str, Any], unsupported: tuple[str, ...]) -> None:
        for name in unsupported:
            self._expect(not group.get(name), name, "False", group.get(name))
        self._expect_number("lr", group["lr"])

    def _tables_of(self, group: dict[str, Any]) -> Mapping[Tensor, Tensor]:
        return self._binding.tables(group["freeze"]) if self._binding is not None else {}

    def _batches(self, group: dict[str, Any]) -> list[list[Tensor]]:
        """The parameters that have a gradient, one list for each device and dtype."""
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return []
        device, dtype = params[0].device, params[0].dtype
        if all([p.dtype is dtype and p.device == device for p in params]):  # a list: this loop is a step's overhead
            return [params]
        batches: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for p in params:
            batches.setdefault((p.device, p.dtype), []).append(p)
        return list(batches.values())

    def _call(self, operator: Callable[..., None], group: dict[str, Any], params: list[Tensor], *rest: Any) -> None:
        grads: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]
        try:
            operator(params, torch._foreach_neg(grads) if group["maximize"] else grads, *rest)
        except NotImplementedError:  # the dispatcher's error for sparse gradients
            for grad in grads:
                self._expect(grad.layout == torch.strided, "params", "dense gradients", grad.layout)
            raise

    def _updates_of(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Where the operator writes the sums of track_updates(); an empty tensor for a parameter not measured."""
        if not self.updates:
            return [], []
        unasked = (torch.empty(0), torch.empty(0))
        pairs = [self.updates.get(p, unasked) for p in params]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
