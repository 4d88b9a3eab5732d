"""MaskBuffers: what both masked layers share. Mask buffers may be edited in place or be missing in a checkpoint."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..masks import check_mask

Layer = TypeVar("Layer", bound="MaskBuffers")
Plain = TypeVar("Plain", bound=nn.Module)


def _version(mask: Tensor) -> int:
    """The count of in-place edits; inference tensors have none."""
    return 0 if mask.is_inference() else mask._version


def _same_as(module: nn.Module, cls: type[Plain]) -> Plain:
    """A module of class cls with the same parameters, buffers, hooks and attributes, in dictionaries of its own."""
    other = cls.__new__(cls)
    for name, value in module.__dict__.items():
        other.__dict__[name] = value.copy() if isinstance(value, (dict, set)) else value
    return other


class MaskBuffers(nn.Module):
    """Mixin of the masked layers.

    A subclass names its mask buffers; its `_derive` computes from them the tables and counts that forward reads.
    """

    _mask_names: tuple[str, ...] = ()
    _own_state: tuple[str, ...] = ()  # every buffer and attribute the plain layer does not have
    _seen: tuple[int, ...]  # versions of the masks that the derived state belongs to
    _flow: bool = False  # live mode: passes on live tensors

    def _init_masks(self) -> None:
        """Adds masks with everything live to a layer that has its parameters."""
        raise NotImplementedError

    def _derive(self) -> None:
        """Computes anew what depends on the masks."""
        raise NotImplementedError

    def _refresh(self) -> None:
        with torch.no_grad():
            self._derive()
        self._seen = self._versions()

    def _versions(self) -> tuple[int, ...]:
        buffers = self._buffers
        return tuple([_version(buffers[name]) for name in self._mask_names])  # type: ignore[arg-type]

    def _refresh_if_edited(self) -> None:
        if not torch.compiler.is_compiling() and self._seen != self._versions():
            self._refresh()

    def _parse(self, op: str, name: str, mask: Tensor | str | None, buffer: Tensor) -> Tensor | None:
        """The new mask that an argument asks for (a mask, which is checked, or "all"); None for no change."""
        if mask is None:
            return None
        if isinstance(mask, str):
            if mask != "all":
                raise ValueError(f"{op}: {name}: expected a bool tensor, 'all' or None, got {mask!r}")
            return torch.ones_like(buffer)
        return check_mask(op, name, mask, buffer.shape, buffer.device)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in self._mask_names:  # the checkpoint of a plain layer has no masks: all live
            state_dict.setdefault(prefix + name, torch.ones_like(self._buffers[name]))  # type: ignore[arg-type]
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._refresh()

    @classmethod
    def _over(cls: type[Layer], plain: nn.Module) -> Layer:
        """A masked layer over the parameters and buffers of a plain one, which stays as it is."""
        layer = _same_as(plain, cls)
        layer._init_masks()
        return layer

    def _plain_copy(self, plain: type[Plain]) -> Plain:
        """An independent plain layer with copies of the parameters and buffers."""
        copy = _same_as(self, type(self))
        copy._drop_masks()
        for name, parameter in copy._parameters.items():
            if parameter is not None:
                copy._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        for name, buffer in copy._buffers.items():
            copy._buffers[name] = None if buffer is None else buffer.clone()
        return _same_as(copy, plain)

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script asks for what it should compile in place of the layer."""
        raise TypeError(
            f"torch.jit.script: {type(self).__name__}: expected a layer of torch.nn, got a masked one: script what "
            "pk.shrink returns, or a copy of the network after pk.restore; torch.jit.trace takes it as it is"
        )

    def _drop_masks(self) -> None:
        """Removes every buffer and attribute that the plain layer does not have."""
        for name in (*self._own_state, "_flow"):
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)
            self.__dict__.pop(name, None)
