"""FilterTensors: the parameters and the optimizer state that belong to a layer's filters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nn.masked_filters import MaskedFilters
from ..nn.masked_norm import MaskedNorm
from .channel_masks import ChannelMasks, NormFinder
from .filter_states import FilterStates


class FilterTensors:
    """Base of Method: finds what has a row per filter of a layer, and zeroes rows of it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    layers: dict[str, MaskedFilters]
    filters: FilterStates
    channel_masks: ChannelMasks
    with_norms: bool
    _finder: NormFinder | None

    def _zero(self, name: str, rows: Tensor) -> None:
        """Zeroes filters (rows: int64 indices) that became hard-dead, with bias, norm and optimizer state."""
        if len(rows):
            self._zero_rows(name, rows)

    def _zero_rows(self, name: str, rows: Tensor) -> None:
        """Zeroes filters in every parameter that has them and in the optimizer's state of these."""
        for parameter in self.parameters_of(name):
            for tensor in (parameter, *self.optimizer_states(parameter)):
                self.by_filter(name, tensor)[rows] = 0

    def norms_of(self, name: str) -> list[MaskedNorm]:
        """The masked norms that see a layer's output as it is and die with its filters."""
        names = (self.channel_masks.norms or {}).get(name, []) if self.with_norms else []
        return [m for n in names if isinstance(m := self.model.get_submodule(n), MaskedNorm)]

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """The parameters with a row per filter of a layer: its own and those of its norms."""
        modules = [self.layers[name], *self.norms_of(name)]
        return [p for m in modules for p in (m.weight, m.bias) if isinstance(p, nn.Parameter)]

    def by_filter(self, name: str, tensor: Tensor) -> Tensor:
        """A view with filters first of a tensor that has the shape of one of a layer's parameters.

        It is the tensor itself, but for transposed convolutions. What is written to it is written to the tensor.
        """
        return self.layers[name].filters_first(tensor) if tensor.dim() > 1 else tensor

    def optimizer_states(self, parameter: Tensor) -> list[Tensor]:
        """The tensors of the optimizer's state (momentum, averages) that have the parameter's shape."""
        states = self.optimizer.state.get(parameter, {}).values()
        return [state for state in states if isinstance(state, Tensor) and state.shape == parameter.shape]

    def forget(self, parameter: nn.Parameter, rows: Tensor) -> None:
        """Zeroes the optimizer's state (momentum, averages) of some rows of a parameter."""
        for state in self.optimizer_states(parameter):
            state[rows] = 0

    @property
    def _has_soft(self) -> bool:
        """Whether any filter is soft-dead: only then do phases differ."""
        return any(bool(soft.any()) for soft in self.filters.soft)

    @property
    def _on_device(self) -> Tensor:
        """A tensor on the network's device."""
        return next(iter(self.layers.values())).weight

    def _rows(self, by_unit: list[Tensor], name: str) -> Tensor:
        """int64: indices of a layer's filters that are True in these unit masks, on the layer's device."""
        return self.filters.of_layer(by_unit, name).nonzero().flatten().to(self.layers[name].weight.device)

    def _find_norms(self) -> bool:
        """Ends the search for norms; True if there was one and they are now known."""
        if self._finder is None:
            return False
        self.channel_masks.norms, self._finder = self._finder.stop(), None
        return True
