"""Tree: the user's modules once more, with plain layers in place of masked ones, over tensors that are exchanged."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.narrow import adjust_sizes
from ..nn.adapted import keep_channels
from ..nn.fixed_norm import FixedChannels
from ..nn.flow import flow
from ..nn.mask_buffers import MaskBuffers
from ..nn.masked_filters import MaskedFilters
from ..nn.masked_norm import MaskedNorm
from ..nn.reparametrized import deep_copy, set_layer_class
from .cut import Cut

HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs"),
    *("_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks"),
)
SIMPLE = frozenset((int, float, bool, str, type(None), torch.dtype))
_HELD = ("_parameters", "_buffers")
Names = dict[str, Tensor]


class Restructured(Exception):
    """The model has other modules or parameters than when the tree was made."""


class _Pair:
    """A module of the model and its counterpart in the tree."""

    def __init__(self, name: str, module: nn.Module, twin: nn.Module, hooks: Mapping[int, Any]) -> None:
        self.name, self.twin = name, twin
        self._module = weakref.ref(module)
        self.hooks = hooks  # by id of a hook that the copy has bound to the tree's own modules, that one
        self.children = [(key, id(child)) for key, child in module._modules.items()]
        own = module._own_state if isinstance(module, MaskBuffers) else ()
        self.tensors = [
            (kind, key, id(tensor), f"{name}.{key}" if name else key)
            for kind in _HELD for key, tensor in getattr(module, kind).items() if key not in own
        ]  # fmt: skip
        self.forms = [_form(getattr(module, kind)[key]) for kind, key, _, _ in self.tensors]
        # The numbers, flags and names that a module holds, apart from what masks need.
        self.keys = [key for key, value in module.__dict__.items()
                     if (type(value) in SIMPLE or _is_simple_tuple(value)) and key in twin.__dict__]  # fmt: skip
        self.set: list[Any] = []  # attributes as they were taken over

    @property
    def module(self) -> nn.Module:
        module = self._module()
        assert module is not None
        return module

    def check(self) -> None:
        values = self.module.__dict__
        if [(key, id(child)) for key, child in values["_modules"].items()] != self.children:
            raise Restructured
        for (kind, key, identity, _), form in zip(self.tensors, self.forms, strict=True):
            tensor = values[kind].get(key)
            if id(tensor) != identity or _form(tensor) != form:
                raise Restructured

    def take_over(self) -> None:
        module, twin = self.module, self.twin
        values, own_values = module.__dict__, twin.__dict__
        for key in self.keys:
            own_values[key] = values.get(key)
        for name in HOOKS:
            hooks, own = values[name], own_values[name]
            if hooks or own:
                own.clear()
                own.update((k, self.hooks.get(id(hook), hook)) for k, hook in hooks.items() if not _is_ours(hook))

    def remember(self) -> None:
        values = self.twin.__dict__
        self.set = [values[key] for key in self.keys]

    def give_back(self) -> None:
        """Attributes that training changed, such as a forward's own counters."""
        values = self.twin.__dict__
        for key, before in zip(self.keys, self.set, strict=True):
            if values[key] is not before and values[key] != before and key != "training":
                self.module.__dict__[key] = values[key]


def _is_simple_tuple(value: Any) -> bool:
    return type(value) is tuple and all(type(entry) in SIMPLE for entry in value)


def _is_ours(hook: Any) -> bool:
    """Whether a hook is of this package: those serve masked layers."""
    return str(getattr(hook, "__module__", type(hook).__module__)).startswith("prunekernels.")


class Tree:
    """A copy of a network's modules without tensors of its own, in which layers are plain.

    stays: names of masked layers that stay what they are; the tree has the layer itself.
    """

    def __init__(self, model: nn.Module, stays: Collection[str]) -> None:
        modules = dict(model.named_modules())
        self._also = _other_names(model)
        aliased = {id(m) for module in modules.values() for m in _modules_in(module.__dict__)}
        self._shared = {id(m) for m in modules.values() if _is_shared(m) and id(m) not in aliased}
        memo: dict[int, Any] = {id(modules[name]): modules[name] for name in stays}
        for module in modules.values():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                memo[id(tensor)] = tensor
            if id(module) in self._shared:
                memo[id(module)] = module
            for kind in HOOKS:
                memo.update((id(h), h) for h in getattr(module, kind).values() if _is_ours(h))
        self.network = deep_copy(model, memo)
        flow_off(self.network)
        twins = dict(self.network.named_modules())
        self.pairs = []
        for name, module in modules.items():
            twin = twins.get(name)
            if twin is None or twin is module:
                continue
            if isinstance(twin, (MaskedFilters, MaskedNorm)):
                cls = twin.plain_class
                twin._drop_masks()
                set_layer_class(twin, cls)
            hooks = {}
            for kind in HOOKS:
                for key, hook in getattr(module, kind).items():
                    if (copied := getattr(twin, kind).get(key)) is not None and copied is not hook:
                        hooks[id(hook)] = copied
            self.pairs.append(_Pair(name, module, twin, hooks))
        # Leaves that are in the tree themselves as long as masks leave them whole: by name, they and their copies.
        self.leaves = self._copy_leaves(modules, stays)
        leaves = {id(pair.module) for pair in self.leaves}
        self._parents: dict[int, list[tuple[_Pair, str]]] = {identity: [] for identity in leaves}
        self._modes: list[tuple[nn.Module, bool, nn.Module, bool]] = []  # shared leaves, a parent of each: in training?
        for pair in self.pairs:
            for key, identity in pair.children:
                if identity in leaves:
                    self._parents[identity].append((pair, key))

    def _copy_leaves(self, modules: Mapping[str, nn.Module], stays: Collection[str]) -> list[_Pair]:
        found = []
        for name, module in modules.items():
            if id(module) in self._shared and name not in stays:
                memo = {id(t): t for t in module._parameters.values() if t is not None}
                found.append(_Pair(name, module, deep_copy(module, memo), {}))
        return found

    def named_tensors(self) -> dict[str, Tensor]:
        """By name, the model's parameters and buffers that its plain layers have; a tensor in two places twice."""
        return {
            f"{name}.{key}" if name else key: tensor for pair in (*self.pairs, *self.leaves)
            for kind, key, _, _ in pair.tensors if (tensor := getattr(pair.module, kind)[key]) is not None
            for name in (pair.name, *self._also.get(id(pair.module), ()))
        }  # fmt: skip

    def check(self) -> None:
        """Raises Restructured if the model has other modules or tensors than it had."""
        for pair in self.pairs:
            pair.check()
        for pair in self.leaves:
            pair.check()

    def fill(self, cut: Cut) -> None:
        """Puts small tensors in place of the model's (by their ids), and takes over attributes and hooks."""
        narrowed: list[nn.Module] = []
        small = cut.small()
        for pair in self.pairs:
            pair.take_over()
            module, twin = pair.module, pair.twin
            changed = False
            for kind, key, identity, _ in pair.tensors:
                part = small.get(identity)
                twin.__dict__[kind][key] = module.__dict__[kind][key] if part is None else part
                changed |= part is not None
            if changed:
                narrowed.append(twin)
            if changed or isinstance(twin, FixedChannels):
                _adjust_norm(pair, twin, cut)
        self._modes = []
        for pair in self.leaves:
            own: nn.Module = pair.module
            if any(identity in small for _, _, identity, _ in pair.tensors):
                own = pair.twin
                pair.take_over()
                for kind, key, identity, _ in pair.tensors:
                    getattr(own, kind)[key] = small.get(identity, getattr(pair.module, kind)[key])
                narrowed.append(own)
                _adjust_norm(pair, own, cut)
            else:
                above = self._parents[id(own)][0][0].module
                self._modes.append((own, own.training, above, above.training))
            for parent, key in self._parents[id(pair.module)]:
                parent.twin._modules[key] = own
        for (path, attribute), number in cut.numbers.items():
            setattr(self.network.get_submodule(path), attribute, number)
        for module in narrowed:
            adjust_sizes(module)
        for pair in self.pairs:
            pair.remember()

    def restore_modes(self) -> None:
        """Modules that are in both networks get back the mode that they had, or that of the module they are in."""
        for module, mode, above, mode_above in self._modes:
            module.training = mode if above.training == mode_above else above.training
        self._modes = []

    def give_back(self, small: Mapping[int, Tensor]) -> None:
        """Gives the model the attributes that training changed, and buffers that it put in the place of shared ones."""
        for pair in self.pairs:
            pair.give_back()
            for kind, key, identity, _ in pair.tensors:
                held = pair.twin.__dict__[kind][key]
                if kind == "_buffers" and identity not in small and held is not None and id(held) != identity:
                    held_by: Any = pair.module._buffers[key]
                    if held_by is not None and held_by.shape == held.shape:
                        held_by.copy_(held)
                    else:
                        raise RuntimeError(f"compacted: {pair.name}.{key}: expected a buffer that keeps its shape")


def _adjust_norm(pair: _Pair, norm: nn.Module, cut: Cut) -> None:
    """Makes a norm over several channels one of those that are live and kept."""
    if isinstance(norm, nn.GroupNorm) or (isinstance(norm, nn.LayerNorm) and len(norm.normalized_shape) == 1):
        keep_channels(norm, cut.norm_channels(pair.name, pair.module))


def _other_names(model: nn.Module) -> dict[int, list[str]]:
    """By id of a module, its names beyond the first one."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), []).append(name)
    return {identity: names[1:] for identity, names in found.items() if len(names) > 1}


def _modules_in(value: Any, depth: int = 3) -> Iterator[nn.Module]:
    """Modules that a module's attributes hold beside its children, in lists say: a forward may reach them there."""
    named = value.items() if isinstance(value, dict) else ((None, held) for held in value)
    for name, held in named:
        if isinstance(held, nn.Module):
            yield held
        elif isinstance(held, (list, tuple, set, dict)) and name != "_modules" and depth:
            yield from _modules_in(held, depth - 1)


def _form(tensor: Tensor | None) -> tuple[torch.dtype, torch.device] | None:
    """What module.to() changes of a parameter, which stays the same object."""
    return None if tensor is None else (tensor.dtype, tensor.device)


def flow_off(network: nn.Module) -> None:
    if any(isinstance(module, MaskBuffers) for module in network.modules()):
        flow(network, False)


def _is_shared(module: nn.Module) -> bool:
    """Whether a module may be in both networks: a plain leaf that does the same in training and in evaluation."""
    plain = not module._modules and not module._buffers and not isinstance(module, MaskBuffers)
    return plain and any(p is not None for p in module._parameters.values())
