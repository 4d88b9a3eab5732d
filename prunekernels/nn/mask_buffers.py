"""MaskBuffers: what both masked layers share. Masks are edited in place, averaged, moved, missing in a checkpoint.

A mask has two forms. The *stored* form is a buffer: float32, 1 live, 0 dead. State dicts, broadcasts and averages see
it; an average of masks that differ leaves a number between 0 and 1, which shows. The *public* form is the attribute: a
bool tensor to read and to edit in place. Each is brought up to date when the other has changed, at the latest when the
layer runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..masks import check_mask
from ..ops.transforms import is_recorded_or_transformed
from .ddp import watch_broadcasts
from .reparametrized import is_reparametrized
from .saved_state import DEAD_VALUES, StateCopies, dead_values, put_dead_values
from .unserved import why_unserved

Layer = TypeVar("Layer", bound="MaskBuffers")
Plain = TypeVar("Plain", bound=nn.Module)
_REPLACED = (
    "the masks of a network were replaced through .data, as Lightning's WeightAveraging does by those of its average: "
    "filters may have come back to life. Give the averaged network to the pruning method (followers=[...])"
)
_TOLERANCE = 1e-6  # an average of equal masks is off by less, one step of an average of different ones by more


def _version(mask: Tensor) -> int:
    """The count of in-place edits; inference tensors have none."""
    return 0 if mask.is_inference() else mask._version


def _same_as(module: nn.Module, cls: type[Plain]) -> Plain:
    """A module of class cls with the same parameters, buffers, hooks and attributes, in dictionaries of its own."""
    other = cls.__new__(cls)
    for name, value in module.__dict__.items():
        other.__dict__[name] = value.copy() if isinstance(value, (dict, set)) else value
    return other


def _agree(stored: Tensor, mask: Tensor) -> bool:
    """Whether a stored mask says what a public one does. Waits for the device."""
    return stored.device == mask.device and (mask.is_meta or torch.equal(stored, mask.to(stored.dtype)))


def _decode(op: str, name: str, stored: Tensor) -> Tensor:
    """The public form of a stored mask; raises where different masks were averaged."""
    if stored.is_meta or not stored.is_floating_point():
        return stored.to(torch.bool)
    live = stored > 0.5
    wrong = ~((stored - live.to(stored.dtype)).abs() <= _TOLERANCE)  # also where it is NaN
    if bool(wrong.any()):
        raise ValueError(
            f"{op}: {name}: expected 0 or 1, got {stored[wrong][0].item():.7g}, as averages of different masks have. "
            "Give the averaged network to the pruning method (followers=[...]), or call pk.copy_masks(model, average) "
            "when the masks of the model have changed"
        )
    return live


def public_mask(name: str) -> Any:
    """The attribute of a mask: a bool tensor, the same one as long as the layer stays on its device."""

    return property(lambda self: self._public_mask(name))


def _check_plain(about: str, layer: nn.Module, cls: type[nn.Module]) -> None:
    """Raises ValueError unless a layer computes what cls does with parameters that it stores."""
    got = type(layer).__name__
    if unserved := why_unserved(layer):
        raise ValueError(f"{about}: expected {cls.__name__}, got {got}, which {unserved.removeprefix(f'{got} ')}")
    if type(layer).forward is not cls.forward or "forward" in layer.__dict__:
        raise ValueError(f"{about}: expected {cls.__name__}, got {got} with a forward of its own: see pk.convert")
    if is_reparametrized(layer):
        raise ValueError(f"{about}: expected weights that are stored, got {got} that computes them: see pk.convert")


class MaskBuffers(nn.Module):
    """Mixin of the masked layers.

    A subclass names its masks, with a `public_mask` for each; its `_derive` computes from them the tables and counts
    that forward reads.
    """

    _mask_names: tuple[str, ...] = ()
    _own_state: tuple[str, ...] = ()  # every buffer and attribute the plain layer does not have
    _masks: dict[str, Tensor]  # the public form
    _seen: list[tuple[str, Tensor, int, Tensor, int]]  # of each mask both forms and versions, when they last agreed
    _unsure: bool = False  # whether forward compares contents: a write through .data leaves the version as it was
    _copies: StateCopies | None = None  # of parameters, in state dicts
    _flow: bool = False  # live mode: passes on live tensors
    _align: int | None = None  # in live mode, what numbers of live channels are padded to; None: by the device

    def _init_masks(self) -> None:
        """Adds masks with everything live to a layer that has its parameters."""
        raise NotImplementedError

    def _derive(self) -> None:
        """Computes anew what depends on the public masks."""
        raise NotImplementedError

    def _dead_entries(self) -> dict[str, Tensor]:
        """By parameter, bool: which of its entries are dead, in a shape that expands to the parameter's."""
        raise NotImplementedError

    def _device_of_parameters(self) -> torch.device:
        tensors = (*self.parameters(), *self.buffers())
        return tensors[0].device if tensors else torch.empty(0).device

    # ---- the two forms of a mask

    def _add_masks(self, shapes: tuple[tuple[int, ...], ...], device: torch.device) -> None:
        """Adds masks of these shapes with everything live."""
        made = [torch.ones(shape, dtype=torch.bool, device=device) for shape in shapes]
        self._masks = dict(zip(self._mask_names, made, strict=True))
        for name, mask in self._masks.items():
            self._buffers[name] = mask.to(torch.float32)
        self._note_seen()
        self._derive_anew()

    def _public_mask(self, name: str) -> Tensor:
        """The attribute of this name, in whose place strict export of torch 2.8 takes the buffer."""
        if is_recorded_or_transformed():
            return self._recorded_mask(name)
        self._refresh_if_edited()
        return self._masks[name]

    def _recorded_mask(self, name: str) -> Tensor:
        """A mask by its buffer, in whose place functional_call may have put another, maybe batched."""
        if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
            if any(name == edited and _version(mask) != version for edited, _, _, mask, version in self._seen):
                return self._masks[name]  # edited in place since the layer last ran
        return self._buffers[name] > 0.5  # type: ignore[operator,return-value]

    def _stored(self) -> list[Tensor]:
        return [self._buffers[name] for name in self._mask_names]  # type: ignore[misc]

    @property
    def _on_meta(self) -> bool:
        return self._masks[self._mask_names[0]].is_meta

    def _note_seen(self) -> None:
        pairs = zip(self._stored(), self._masks.items(), strict=True)
        self._seen = [(name, stored, _version(stored), mask, _version(mask)) for stored, (name, mask) in pairs]
        self.__dict__["_unsure"] = False

    def _is_edited(self) -> bool:
        """Whether a mask was written to in either form, or has another tensor as its stored form."""
        buffers = self._buffers
        try:
            for name, stored, version, mask, mask_version in self._seen:
                if stored._version != version or mask._version != mask_version or buffers[name] is not stored:
                    return True
        except RuntimeError:  # inference tensors have no versions
            return any(
                _version(stored) != version or _version(mask) != mask_version or buffers[name] is not stored
                for name, stored, version, mask, mask_version in self._seen
            )
        return False

    def _refresh_if_edited(self) -> None:
        if not is_recorded_or_transformed():
            self._bring_up_to_date()

    def _bring_up_to_date(self) -> None:
        """What every forward pass begins with, where torch neither compiles nor transforms it."""
        if self._copies is not None:
            self._copies.look(self)
        watch_broadcasts()
        if self._unsure:
            self._look()
        elif self._is_edited():
            self._refresh()

    def _look(self) -> None:
        """What _refresh_if_edited does, by the contents of the masks. Waits for the device."""
        if self._copies is not None:
            self._copies.look(self)
        if self._is_edited():
            self._refresh()
        elif not all(map(_agree, self._stored(), self._masks.values())):
            self._refresh()
            if DistributedDataParallel._active_ddp_module is None:
                warnings.warn(_REPLACED, stacklevel=2)
        self.__dict__["_unsure"] = False

    @torch.no_grad()
    def _refresh(self, edits_count: bool = True) -> None:
        """Brings each form of the masks up to date with the other: an edit of the public form wins, if edits count."""
        stored = self._stored()
        if len({s.is_meta for s in stored}) > 1:  # a loader is on its way through the buffers
            return
        edited = [edits_count and _version(mask) != version for *_, mask, version in self._seen]
        names, op = self._mask_names, type(self).__name__
        live = [None if own else _decode(op, n, s) for n, s, own in zip(names, stored, edited, strict=True)]
        changed = False
        for name, mask in zip(names, live, strict=True):
            changed |= self._store(name) if mask is None else self._adopt(name, mask)
        self._note_seen()
        if changed:
            self._derive_anew()

    def _store(self, name: str) -> bool:
        """Makes the public mask the stored one."""
        stored, mask = self._buffers[name], self._masks[name]
        if stored is None or stored.dtype != torch.float32 or stored.device != mask.device:
            self._buffers[name] = mask.to(torch.float32)
        else:
            stored.copy_(mask)
        return True

    def _adopt(self, name: str, live: Tensor) -> bool:
        """Makes what was read from the stored mask the public one. Whether that is a change."""
        stored: Tensor = self._buffers[name]  # type: ignore[assignment]
        if stored.dtype != torch.float32:
            self._buffers[name] = live.to(torch.float32)
        elif not stored.is_meta and not _agree(stored, live):  # rounding of averages must not add up
            stored.copy_(live)
        mask = self._masks[name]
        if mask.device != live.device:
            self._masks[name] = live.clone()
        elif mask.is_meta or torch.equal(mask, live):
            return False
        else:
            mask.copy_(live)
        return True

    @torch.no_grad()
    def _store_all(self) -> None:
        """Brings what is stored, and what follows from the masks, up to date with the public masks."""
        for name in self._mask_names:
            self._store(name)
        self._note_seen()
        self._derive_anew()

    @torch.no_grad()
    def _take_masks(self, source: MaskBuffers) -> None:
        """The masks of another layer; what is dead becomes zero, what comes back to life takes the other's values."""
        source._look()
        before = self._dead_entries()
        for name, mask in self._masks.items():
            mask.copy_(source._masks[name])
        self._store_all()
        now = self._dead_entries()
        for name in before.keys() | now.keys():
            parameter, other = self._parameters.get(name), source._parameters.get(name)
            if parameter is None or other is None:
                continue
            dead = now.get(name)
            if name in before:
                back = before[name] if dead is None else before[name] & ~dead
                parameter.copy_(torch.where(back, other.to(parameter), parameter))
            if dead is not None:
                parameter.masked_fill_(dead, 0)

    def _derive_anew(self) -> None:
        with torch.no_grad():
            self._derive()
        if self._copies is not None:
            self._copies.look(self, force=True)

    def _parse(self, op: str, name: str, mask: Tensor | str | None, buffer: Tensor) -> Tensor | None:
        """The new mask that an argument asks for (a mask, which is checked, or "all"); None for no change."""
        if mask is None:
            return None
        if isinstance(mask, str):
            if mask != "all":
                raise ValueError(f"{op}: {name}: expected a bool tensor, 'all' or None, got {mask!r}")
            return torch.ones_like(buffer)
        return check_mask(op, name, mask, buffer.shape, buffer.device)

    # ---- what torch does with modules

    def train(self: Layer, mode: bool = True) -> Layer:
        if mode != self.training:  # the moment when tools swap weights and buffers through .data
            self._unsure = True
        return super().train(mode)

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]
        if "_masks" in self.__dict__:  # not from the constructor of the plain layer
            with torch.no_grad():
                for mask in self._masks.values():
                    mask.fill_(True)
            self._store_all()

    def _apply(self: Layer, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Layer:
        """The stored form stays float32. Masks that leave the meta device, where they have no values, are all live."""
        self._look()
        was_meta = self._on_meta
        super()._apply(fn, recurse)
        for name, stored in zip(self._mask_names, self._stored(), strict=True):
            mask, device = self._masks[name], stored.device
            self._masks[name] = torch.ones_like(mask, device=device) if was_meta else mask.to(device)
        self._store_all()
        return self

    def _replicate_for_data_parallel(self: Layer) -> Layer:
        replica: Layer = super()._replicate_for_data_parallel()  # its buffers are copies on another device
        replica._masks, replica._copies = dict(self._masks), None
        return replica

    def __getstate__(self) -> dict[str, Any]:
        self._look()
        left = ("_seen", "_ddp", "_copies", "_compiled_call_impl")  # the last would call this layer, not the copy
        return {name: value for name, value in self.__dict__.items() if name not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_masks" in self.__dict__:
            self._note_seen()
            return
        masks: dict[str, Any] = {}  # pickled when they were bool buffers, and the tables were buffers too
        for name in self._own_state:
            if name in self._buffers:
                (masks if name in self._mask_names else self.__dict__)[name] = self._buffers.pop(name)
                self._non_persistent_buffers_set.discard(name)
        shapes = tuple([tuple(masks[name].shape) for name in self._mask_names])
        self._add_masks(shapes, masks[self._mask_names[0]].device)
        self._buffers.update(masks)
        self._refresh()

    # ---- state dicts

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Dead entries are zero, unless keep_vars asks for the parameters themselves."""
        self._look()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        dead = {} if keep_vars or self._on_meta else dead_values(self)
        if dead:
            if self._copies is None:
                self._copies = StateCopies()
            for name in dead:
                destination[prefix + name] = self._copies.copy_of(self, name)
            if hasattr(destination, "_metadata"):
                destination._metadata.setdefault(prefix[:-1], {})[DEAD_VALUES] = dead

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, *args: Any) -> None:
        if self._copies is not None:
            self._copies.look(self)
        for name, *_, mask, version in self._seen:
            if _version(mask) != version:  # an edit from before
                self._store(name)
        own = [n for n, t in (*self._parameters.items(), *self._buffers.items()) if t is not None]
        own = [prefix + n for n in own if n not in (*self._mask_names, "num_batches_tracked")]
        one_by_one = not prefix and len(state_dict) == 1 and "version" not in metadata  # as transformers 4 loads
        if all(key in state_dict for key in own) and not one_by_one:
            # Without masks it is the layer of a plain network: all live.
            assigned = own and metadata.get("assign_to_params_buffers")
            for name, stored in zip(self._mask_names, self._stored(), strict=True):
                device = state_dict[own[0]].device if assigned else stored.device
                state_dict.setdefault(prefix + name, torch.ones_like(stored, device=device))
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)
        self._refresh(edits_count=False)
        put_dead_values(self, metadata.get(DEAD_VALUES, {}))
        if self._copies is not None:
            self._copies.look(self, force=True)

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
        self._masks.clear()
        for name in (*self._own_state, "_masks", "_seen", "_unsure", "_ddp", "_copies", "_flow", "_align"):
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)
            self.__dict__.pop(name, None)
