"""ChannelMasks: masks for a filter, the norms behind it and the inputs that read it, so that its whole channel dies."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..graph import Group, coupled_groups
from ..nn.example import Example
from ..nn.lost_masks import check_no_mask_lost
from ..nn.masked_filters import MaskedFilters
from ..nn.masked_norm import MaskedNorm

OUTPUT = "its channels are outputs of the network (see prune_outputs)"
IN_GROUPS = "it is a transposed convolution in groups, whose filters are not pruned"
MAYBE_OUTPUT = "without example_input it is not known whether its channels are outputs of the network"


class NormFinder:
    """Watches forward passes for the masked norms that get a convolution's output as it is.

    Hooks note each convolution's output tensor with its version counter; a norm whose input is that very tensor, or a
    view of all of it, unchanged since, belongs to the convolution.
    """

    def __init__(self, model: nn.Module) -> None:
        self._outputs: dict[int, tuple[weakref.ref[Tensor], tuple[Any, ...], str]] = {}
        self._sources: dict[str, set[str | None]] = {}
        self._hooks: list[Any] = []
        for name, module in model.named_modules():
            if isinstance(module, MaskedFilters):
                self._hooks.append(
                    module.register_forward_hook(lambda *args, name=name: self._note_output(name, args[2]))
                )
            elif isinstance(module, MaskedNorm):
                self._hooks.append(
                    module.register_forward_pre_hook(lambda *args, name=name: self._note_input(name, args[1]))
                )

    def _note_output(self, conv: str, y: Tensor) -> None:
        root = _root(y)
        self._outputs[id(root)] = (weakref.ref(root), _place(y), conv)

    def _note_input(self, norm: str, args: tuple[Any, ...]) -> None:
        x = args[0] if args else None
        root = _root(x)
        known, place, conv = self._outputs.get(id(root), (None, (), ""))
        is_same = known is not None and known() is root and _place(x) == place  # type: ignore[arg-type]
        self._sources.setdefault(norm, set()).add(conv if is_same else None)

    def stop(self) -> dict[str, list[str]]:
        """Removes the hooks. Returns by convolution the names of the norms that saw its output and no other."""
        for hook in self._hooks:
            hook.remove()
        norms: dict[str, list[str]] = {}
        for norm, sources in self._sources.items():
            conv = next(iter(sources))
            if len(sources) == 1 and conv is not None:
                norms.setdefault(conv, []).append(norm)
        return norms


def _root(x: Any) -> Any:
    """The tensor that x is a view of, or x. A full backward hook makes its module return a view of the output."""
    base = x._base if type(x) is Tensor else None
    return x if base is None else base


def _place(x: Tensor) -> tuple[Any, ...]:
    """What two views of one tensor share if they are the same, and nothing was written since."""
    version = 0 if x.is_inference() else x._version
    return (version,) if type(x) is not Tensor else (version, x.shape, x.stride(), x.storage_offset())


@torch.no_grad()
def find_norms(model: nn.Module, example: Example) -> dict[str, list[str]]:
    """Finds the norms behind each convolution by one forward pass in eval mode, which changes nothing."""
    finder = NormFinder(model)
    was_training = {module: module.training for module in model.modules()}
    try:
        example.call(model.eval())
    finally:
        for module, training in was_training.items():
            module.training = training
        norms = finder.stop()
    return norms


class ChannelMasks:
    """Sets the masks of convolutions, and those that follow from them in norms and readers.

    Attributes:
        norms: By convolution, the masked norms that see its output as it is; None until that is known.
        groups: The network's groups, where example_input gave its graph. Norms and inputs behind an add are then masked
            where every convolution that meets there is dead.
    """

    def __init__(self, model: nn.Module, example_input: Any = None) -> None:
        check_no_mask_lost("Method", model)
        self.model = model
        self.norms: dict[str, list[str]] | None = None
        self.groups: list[Group] = []
        if example_input is not None:
            self.groups = coupled_groups(model, example_input)
            self.norms = find_norms(model, Example.of("find_norms", example_input))

    @torch.no_grad()
    def set_masks(self, live: Mapping[str, Tensor], not_hard: Mapping[str, Tensor], with_norms: bool) -> None:
        """Sets all masks, leaving alone those that are right already.

        Args:
            live: By convolution, bool [K] on the CPU: the filters to compute.
            not_hard: By convolution, bool [K] on the CPU: the filters that are not hard-dead.
            with_norms: Whether norms and readers follow.
        """
        check_no_mask_lost("Method", self.model)
        for name, keep in live.items():
            layer = self.model.get_submodule(name)
            assert isinstance(layer, MaskedFilters)
            new = {"filter": keep & not_hard[name], "hard": not_hard[name]}
            new = {kind: mask.to(layer.weight.device) for kind, mask in new.items()}
            if any(not torch.equal(mask, getattr(layer, f"{kind}_mask")) for kind, mask in new.items()):
                layer.set_masks(**new)
        if not with_norms:
            return
        seen = set()
        for name, norms in (self.norms or {}).items():
            if name in live:
                seen.update(norms)
                for norm in norms:
                    self._set_norm(norm, live[name])
        for group in self.groups:
            self._set_beyond(group, live, seen)

    def _set_beyond(self, group: Group, live: Mapping[str, Tensor], seen: Iterable[str]) -> None:
        """Masks what sees the sum of a group: a channel is live where one of its convolutions has it live."""
        if not any(name in live for name in group.filters):
            return
        keep = torch.zeros(group.width, dtype=torch.bool)
        for name, channels in group.filters.items():
            keep[channels[live[name]] if name in live else channels] = True
        for name, channels in group.norms.items():
            if name not in seen:
                norm = self.model.get_submodule(name)
                if isinstance(norm, MaskedNorm):
                    self._set_norm(name, Group._spread(keep, channels, norm.channel_mask))
        for name, channels in group.readers.items():
            layer = self.model.get_submodule(name)
            if isinstance(layer, MaskedFilters):
                mask = Group._spread(keep, channels, layer.input_mask)
                if not torch.equal(mask, layer.input_mask):
                    layer.set_masks(input=mask)

    def _set_norm(self, name: str, keep: Tensor) -> None:
        norm = self.model.get_submodule(name)
        assert isinstance(norm, MaskedNorm)
        keep = keep.to(norm.channel_mask.device)
        if not torch.equal(keep, norm.channel_mask):
            norm.set_mask(keep)


def units_of(
    layers: Mapping[str, MaskedFilters],
    groups: list[Group],
    skip: Iterable[str],
    *,
    joint: bool,
    prune_outputs: bool | Iterable[str],
) -> tuple[list[Group], dict[str, str]]:
    """The filters that are pruned together, and by name why other layers are left out.

    joint: whether the groups are pruned as they are; otherwise every layer is a unit by itself.
    """
    kept = _outputs(groups, prune_outputs, joint) | {name: "skip" for name in skip}
    kept = {name: IN_GROUPS for name, layer in layers.items() if _is_transposed_in_groups(layer)} | kept
    known = {name for group in groups for name in group.layers}
    if not joint:
        kept = _unknown_linears(layers, known, prune_outputs) | kept
    left_out: dict[str, str] = {}
    if not joint:
        alone = {name: torch.arange(layer.out_channels) for name, layer in layers.items() if name not in kept}
        return [Group(len(c), {n: c}, {}, {}) for n, c in alone.items()], _among(layers, kept)
    units = []
    for group in groups:
        stays = {name: kept[name] for name in group.layers if name in kept}
        stays |= {name: "it is not masked" for name in group.layers if name not in layers}
        if stays:
            left_out |= {name: stays.get(name, f"it meets {next(iter(stays))}") for name in group.layers}
        else:
            units.append(Group(group.width, group.filters, {}, {}))
    left_out |= {name: "the graph does not follow it" for name in layers if name not in known}
    return units, _among(layers, left_out)


def _outputs(groups: Iterable[Group], prune_outputs: bool | Iterable[str], joint: bool) -> dict[str, str]:
    """By layer whose channels are outputs of the network and are not to be pruned: why it is left out.

    joint: whether the name of one layer of a group stands for all of them.
    """
    if prune_outputs is True:
        return {}
    kept: dict[str, str] = {}
    wanted = set(prune_outputs or ())
    for group in groups:
        if group.is_output and not (joint and wanted & set(group.layers)):
            kept |= {name: OUTPUT for name in group.layers if name not in wanted}
    return kept


def _is_transposed_in_groups(layer: nn.Module) -> bool:
    return isinstance(layer, nn.ConvTranspose2d) and layer.groups > 1


def _unknown_linears(
    layers: Mapping[str, MaskedFilters], known: Collection[str], prune_outputs: bool | Iterable[str]
) -> dict[str, str]:
    """Linear layers that no group tells about: most networks end with one, so they are not pruned unasked."""
    wanted = set(layers) if prune_outputs is True else set(prune_outputs or ())
    linears = (name for name, layer in layers.items() if isinstance(layer, nn.Linear))
    return {name: MAYBE_OUTPUT for name in linears if name not in known and name not in wanted}


def _among(layers: Mapping[str, MaskedFilters], reasons: Mapping[str, str]) -> dict[str, str]:
    return {name: why for name, why in reasons.items() if name in layers}
