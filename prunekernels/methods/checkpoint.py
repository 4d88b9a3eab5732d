"""Checkpoints: a method's state, and whether it belongs to the method, and the weights, that it is loaded into."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..graph import Group
from ..nn.mask_buffers import MaskBuffers
from ..nn.masked_filters import MaskedFilters
from ..nn.saved_state import dead_values, put_dead_values
from .channel_masks import ChannelMasks
from .criteria import Criterion
from .filter_states import FilterStates
from .first_pruning import FirstPruning
from .phases import Phases
from .ranking import Counts
from .uniform_rate import Left


class Checkpoints:
    """Base of Method: its state as plain values and tensors, and the way back."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    layers: dict[str, MaskedFilters]
    filters: FilterStates
    channel_masks: ChannelMasks
    criterion: Criterion
    phases: Phases
    generator: torch.Generator
    history: list[dict[str, Counts]]
    rate: float
    epoch: int
    steps: int
    _left: Left | None
    _first: FirstPruning | None
    _fixed_steps: bool

    if TYPE_CHECKING:  # Method has these

        @property
        def units(self) -> list[Group]: ...

        def write_back(self) -> None: ...

        def leave(self) -> None: ...

        def _find_norms(self) -> bool: ...

        def _set_masks(self) -> None: ...

        def _set_rate(self, rate: float) -> None: ...

    def _identity(self) -> dict[str, Any]:
        """What must be the same in the method that a state is loaded into."""
        layers = {name: layer.out_channels for name, layer in self.layers.items()}
        return {"method": type(self).__name__, "layers": layers, "units": [list(unit.layers) for unit in self.units]}

    def state_dict(self) -> dict[str, Any]:
        """Returns all that training needs to go on where it stopped, as plain values and tensors."""
        self.write_back()
        return self._identity() | {
            "rate": self.rate,
            "epoch": self.epoch,
            "steps": self.steps,
            **self.phases.state_dict(),
            "dead": [dead.clone() for dead in self.filters.dead],
            "hard": [hard.clone() for hard in self.filters.hard],
            "history": [{name: list(counts) for name, counts in epoch.items()} for epoch in self.history],
            "norms": self.channel_masks.norms,
            "generator": self.generator.get_state(),
            "criterion": self.criterion.state_dict(),
            "dead_values": dead_values_of(self.model),
            "checksums": checksums(self.layers, self.optimizer),
        }

    def _check_masks(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError unless a state has the entries that every state has, and masks of this method's sizes."""
        op = f"{type(self).__name__}.load_state_dict"
        for key in ("epoch", "steps", "dead", "hard", "history", "norms", "generator", "criterion"):
            if key not in state_dict:
                raise ValueError(f"{op}: {key}: expected it in a state of this method, got none")
        for key, own in (("dead", self.filters.dead), ("hard", self.filters.hard)):
            expected, masks = [tuple(mask.shape) for mask in own], state_dict[key]
            got = [tuple(mask.shape) if isinstance(mask, Tensor) else mask for mask in masks]
            if got != expected:
                raise ValueError(f"{op}: {key}: expected masks of the sizes {expected}, got {str(got)[:200]}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what state_dict returned and reapplies the masks.

        Args:
            state_dict: That of the same method over the same network. Any other raises ValueError and changes nothing.
        """
        check_identity(type(self).__name__, self._identity(), state_dict)
        self._check_masks(state_dict)
        self.leave()
        if self._first is not None:
            self._first.take_back(state_dict.get("checksums", {}), checksums(self.layers, self.optimizer))
            self._first = None
        if self._left is not None and "rate" in state_dict:  # weights and times may be others than they were
            self._set_rate(state_dict["rate"])
        self.epoch, self.steps = state_dict["epoch"], state_dict["steps"]
        self.phases.load_state_dict(state_dict, keeps_length=self._fixed_steps)
        self.filters.dead = [dead.cpu().clone() for dead in state_dict["dead"]]
        self.filters.hard = [hard.cpu().clone() for hard in state_dict["hard"]]
        self.history = [{name: Counts(*row) for name, row in epoch.items()} for epoch in state_dict["history"]]
        if state_dict["norms"] is not None and self.channel_masks.norms is None:
            self._find_norms()
            self.channel_masks.norms = {name: list(norms) for name, norms in state_dict["norms"].items()}
        self.generator.set_state(state_dict["generator"].cpu())
        self.criterion.begin_epoch()
        self.criterion.load_state_dict(state_dict["criterion"])
        put_back_dead_values(self.model, self.layers, state_dict)
        self._set_masks()


def check_identity(op: str, identity: dict[str, Any], state: object) -> None:
    """Raises ValueError unless all entries of identity are in state, naming the first difference."""
    for key, expected in identity.items():
        got = state.get(key) if isinstance(state, dict) else None
        if got != expected:
            expected, got = _first_difference(expected, got)
            raise ValueError(f"{op}.load_state_dict: {key}: expected {expected}, got {got}")


def _first_difference(a: Any, b: Any) -> tuple[Any, Any]:
    """The first entries in which two lists or dictionaries differ: as short as an error should be."""
    if type(a) is not type(b) or isinstance(a, str):
        return a, b
    a, b = (list(value.items()) if isinstance(value, dict) else value for value in (a, b))
    where = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    first, second = (value[where] if where < len(value) else f"{len(value)} of them" for value in (a, b))
    return first, second


def dead_values_of(model: nn.Module) -> dict[str, Any]:
    """By name of a masked layer, what its dead entries hold, where that is not zero: files may have zeros there."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, MaskBuffers))
    return {name: values for name, layer in layers if (values := dead_values(layer))}


def put_back_dead_values(model: nn.Module, layers: Mapping[str, MaskedFilters], state: Mapping[str, Any]) -> None:
    """Writes what dead entries held into a network that was loaded from a file without it.

    It does so only if the network then has the weights that the state was saved with; any other stays as it is. Norms
    are no part of these: behind filters of zeros, which every file has, theirs may be all that is missing.
    """
    values = state.get("dead_values", {})
    saved = state.get("checksums", {}).get("weights")
    weights = {name: layer.weight.detach() for name, layer in layers.items()}
    if not values or saved is None:
        return
    for name in weights.keys() & values.keys():
        if "weight" in values[name]:
            dead, entries = values[name]["weight"]
            weights[name] = weights[name].clone()
            weights[name][dead.to(weights[name].device).expand_as(weights[name])] = entries.to(weights[name])
    if _checksum(weights.values()) == saved:
        for name, of_layer in values.items():
            put_dead_values(model.get_submodule(name), of_layer)


def checksums(layers: Mapping[str, MaskedFilters], optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """By part, a number that tells whether the layers' tensors are those that a state was saved with."""
    weights = [layer.weight for layer in layers.values()]
    states = [value for weight in weights for value in optimizer.state.get(weight, {}).values()]
    return {"weights": _checksum(weights), "momenta": _checksum(s for s in states if isinstance(s, Tensor))}


def _checksum(tensors: Iterable[Tensor]) -> int:
    value = 0
    for tensor in tensors:
        flat = tensor.detach().cpu().flatten().view(torch.uint8)
        value = zlib.crc32(memoryview(flat.numpy()), value)  # type: ignore[arg-type]
    return value
