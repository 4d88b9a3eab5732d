"""What a masked layer puts into a state dict: zeros in dead entries, so that a plain layer that loads them computes
the same.

A state dict of torch holds the parameters' own memory. So does ours, as long as dead entries are zero. Where they are
not (soft-dead filters keep their weights), it holds a copy with zeros there, and the true values go into the state
dict's metadata. Tools write into the tensors of a state dict, or keep them for the whole training (averages of weights
do both), so a copy behaves like the memory it stands for: what is written to it goes into the parameter, and it follows
the parameter, as long as anything holds it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

DEAD_VALUES = "dead_values"  # the key in a layer's metadata
DeadValues = dict[str, tuple[Tensor, Tensor]]  # by parameter: which entries are dead (bool), and their values in order
_OWN_REFERENCES = 2  # of a copy that nothing else holds: the record's, and the one of the call that counts

_layers: WeakSet[Any] = WeakSet()  # those with copies
_hooks: list[Any] = []  # the handle of the hook behind every optimizer's step, while there are copies


@torch.no_grad()
def dead_values(layer: Any) -> DeadValues:
    """The values of the dead entries of a masked layer, for parameters where not all of them are zero."""
    found: DeadValues = {}
    for name, dead in layer._dead_entries().items():
        parameter = layer._parameters.get(name)
        if parameter is not None and not hasattr(parameter, "full_tensor"):  # a part of a tensor knows no masks
            values = parameter.detach()[dead.expand_as(parameter)]
            if bool((values != 0).any()):
                found[name] = (dead, values)
    return found


@torch.no_grad()
def put_dead_values(layer: nn.Module, values: DeadValues) -> None:
    """Writes into a layer what dead_values returned."""
    for name, (dead, entries) in values.items():
        parameter = layer._parameters.get(name)
        if parameter is None or parameter.is_meta or dead.shape[:2] != parameter.shape[:2]:
            continue  # of another size: load_state_dict says so
        at, entries = dead.to(parameter.device).expand_as(parameter), entries.to(parameter)
        if not torch.equal(parameter[at], entries):  # a write moves the version, although nothing changed
            parameter[at] = entries


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@dataclass
class _Copy:
    tensor: Tensor
    parameter: Tensor
    dead: Tensor  # bool: the entries that are zero in the copy whatever they are in the parameter
    versions: tuple[int, int] = (0, 0)  # of both tensors, when they last agreed

    def agree(self) -> None:
        self.versions = (_version(self.tensor), _version(self.parameter))


class StateCopies:
    """The copies of a layer's parameters that are in state dicts."""

    def __init__(self) -> None:
        self._by_name: dict[str, _Copy] = {}

    def copy_of(self, layer: Any, name: str) -> Tensor:
        """The copy of a parameter that a state dict gets: one at a time, as there is one parameter."""
        if name not in self._by_name:
            parameter, dead = layer._parameters[name], layer._dead_entries()[name]
            with torch.inference_mode(False):  # it outlives the mode that it is made in
                known = self._by_name[name] = _Copy(parameter.detach().masked_fill(dead, 0), parameter, dead)
            known.agree()
            _layers.add(layer)
            if not _hooks:
                _hooks.append(register_optimizer_step_post_hook(_after_step))
        return self._by_name[name].tensor

    @torch.no_grad()
    def look(self, layer: Any, force: bool = False) -> None:
        """Brings parameters and copies into agreement, and forgets copies that nothing else holds any more.

        force: the masks have changed.
        """
        for name, known in list(self._by_name.items()):
            copy, old = known.tensor, known.parameter
            if _version(copy) != known.versions[0]:  # written to: a zero in a dead entry was there before
                old.copy_(torch.where(known.dead & (copy == 0), old, copy))
            del copy
            if sys.getrefcount(known.tensor) <= _OWN_REFERENCES:
                del self._by_name[name]
                continue
            known.parameter = layer._parameters[name]
            now = (_version(known.tensor), _version(known.parameter))
            if force or now != known.versions or known.parameter is not old:
                dead = layer._dead_entries().get(name)
                known.dead = torch.zeros_like(known.dead) if dead is None else dead
                known.tensor.copy_(known.parameter.masked_fill(known.dead, 0))
                known.agree()
        if not self._by_name:
            layer._copies = None
            _layers.discard(layer)
            if not _layers and _hooks:
                _hooks.pop().remove()


def _after_step(*_: Any) -> None:
    for layer in list(_layers):
        if layer._copies is not None:
            layer._copies.look(layer)
