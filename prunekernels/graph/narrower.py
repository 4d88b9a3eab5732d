"""Narrower: which channels a small network keeps, again and again, for whatever masks the layers have by then."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..nn.masked_filters import MaskedFilters
from ..nn.masked_norm import MaskedNorm
from .analysis import ChannelAnalysis
from .channel_program import Bools, MaskArrays
from .channels import in_groups, missing_in_groups
from .compile_channels import Compiler, Ints, weights_without_masks
from .narrow import Narrowing, hold_forward
from .rules.layers import LayerRule
from .trace import Traced


def read_masks(model: nn.Module, layers: Iterable[tuple[str, nn.Module]] | None = None) -> dict[str, MaskArrays]:
    """What the masks of a model leave live, by layer name; shares their memory where it can. Waits for the device.

    layers: its masked layers with their names, where the caller has them.
    """
    masks: dict[str, MaskArrays] = {}
    wanted: list[tuple[MaskArrays, str, Tensor]] = []
    convs: list[tuple[MaskArrays, MaskedFilters]] = []
    for name, layer in model.named_modules() if layers is None else layers:
        if not isinstance(layer, (MaskedFilters, MaskedNorm)):
            continue
        layer._refresh_if_edited()
        of, own = MaskArrays(), layer._masks
        masks[name] = of
        if isinstance(layer, MaskedFilters):
            convs.append((of, layer))
            wanted.append((of, "rows", own["filter_mask"] & own["hard_mask"]))
            wanted.append((of, "columns", own["input_mask"]))
        else:
            wanted.append((of, "rows", own["channel_mask"]))
    _fetch(wanted)
    _fetch([(of, "kernels", layer._masks["kernel_mask"]) for of, layer in convs if _has_dead_kernels(of, layer)])
    return masks


def _has_dead_kernels(masks: MaskArrays, layer: MaskedFilters) -> bool:
    """Whether single kernels are dead, beyond those of dead filters and inputs."""
    assert masks.rows is not None and masks.columns is not None
    rows, columns = (mask.reshape(layer.groups, -1).sum(1) for mask in (masks.rows, masks.columns))
    return layer._live[2] != int((rows * columns).sum())


def _fetch(wanted: Sequence[tuple[MaskArrays, str, Tensor]]) -> None:
    """Puts tensors into attributes, as arrays; with one transfer from a device."""
    tensors = [tensor for *_, tensor in wanted]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        flat = torch.cat([tensor.flatten() for tensor in tensors]).cpu().split([tensor.numel() for tensor in tensors])
        tensors = [part.view(tensor.shape) for part, tensor in zip(flat, tensors, strict=True)]
    for (masks, attribute, _), tensor in zip(wanted, tensors, strict=True):
        setattr(masks, attribute, tensor.numpy())


class _Lists:
    """Lists of classes of channels, [any] or [groups, any], each once."""

    def __init__(self, roots: Tensor) -> None:
        found, self._class_of = np.unique(roots.numpy(), return_inverse=True)
        self.classes = found.size
        self.lists: list[Ints] = []
        self._known: dict[tuple[Any, bytes], int] = {}

    def __call__(self, ids: Tensor) -> Ints:
        return self._class_of[ids.numpy()]

    def number(self, ids: Tensor) -> int:
        classes = self(ids)
        number = self._known.setdefault((classes.shape, classes.tobytes()), len(self.lists))
        if number == len(self.lists):
            self.lists.append(classes)
        return number


class Narrower:
    """Says for any masks what makes a network small enough for them: what Narrowing.of says after a new analysis.

    The small network is to train, so it has the live channels of norms, whose statistics move, even if nothing reads
    them. The rules run once, to compile them. No tensor of the traced network is held.
    """

    def __init__(self, traced: Traced, model: nn.Module, stays: Collection[str], literal: int) -> None:
        analysis = ChannelAnalysis(traced, weights_without_masks(traced), constants=False)
        hold_forward(analysis, literal)
        compiler = Compiler(analysis, model)
        self.program, ids = compiler.compile()
        self._masks, self._sharing = compiler.masks, compiler.sharing
        lists = _Lists(analysis.classes.roots())
        self._classes, self._lists = lists.classes, lists.lists
        self._class_at = lists(ids)
        self._pinned = lists(analysis.classes.pinned)
        self._tied = [(name, dim, lists.number(ids)) for (name, dim), ids in analysis.tied.items()]
        self._numbers = {where: lists.number(ids) for where, ids in analysis.numbers.items()}
        self._alike = [[lists(ids) for ids in parts] for parts in analysis.alike]
        self._groups = [(lists(inputs), lists(filters)) for inputs, filters in analysis.groups]
        self._by_group = {classes.tobytes(): classes for sides in self._groups for classes in sides}
        self._ends: dict[str, list[Ints]] = {}
        self._note_layers(analysis, lists)
        tracked = [value for node in traced.graph.nodes if (value := analysis.tracked(node)) is not None and len(value)]
        values = [self._lists[number] for number in sorted({lists.number(value.ids) for value in tracked})]
        self._values = np.concatenate(values) if values else np.zeros(0, dtype=np.int64)
        self._starts = np.cumsum([0, *map(len, values)])[:-1]
        self._stays = tuple(stays)

    @classmethod
    def of(cls, traced: Traced, model: nn.Module, stays: Collection[str] = (), literal: int = 0) -> Narrower:
        """Compiles the rules.

        Args:
            traced: A trace of model.
            model: The masked network.
            stays: Names of layers that keep their full width.
            literal: As in Rule.hold.
        """
        return cls(traced, model, stays, literal)

    def narrow(self, masks: Mapping[str, MaskArrays], stays: Iterable[str] = (), align: int = 1) -> Narrowing:
        """What is kept under masks of the traced layers; see read_masks.

        Args:
            masks: Of every masked layer.
            stays: Names of more layers that keep their width.
            align: Layers keep channels that are dead too, until their number is a multiple of it, if they have as many.
        """
        kept = self._hold(self._kept(self._needed(masks), self._pinned, stays), align)
        rows = [torch.from_numpy(_positions(kept[classes])) for classes in self._lists]
        indices: dict[str, dict[int, Tensor]] = {}
        for name, dim, number in self._tied:
            indices.setdefault(name, {})[dim] = rows[number]
        return Narrowing(indices, {where: len(rows[number]) for where, number in self._numbers.items()})

    def _note_layers(self, analysis: ChannelAnalysis, lists: _Lists) -> None:
        """Writes down which channels each layer has, by its names."""
        traced = analysis.traced
        holders = {id(p): name for name, module in traced.modules.items() for p in module._parameters.values()}
        for node, rule in analysis.rules.items():
            if not isinstance(rule, LayerRule) or analysis.states[node] is None:
                continue
            x, out = rule.ends(analysis, node)
            parameters = [traced.tensors[traced.names[p]] for p in node.all_input_nodes if p in traced.names]
            for name in {rule.name(traced, node), *(holders[id(p)] for p in parameters if id(p) in holders)}:
                self._ends.setdefault(name, []).extend((lists(x.ids), lists(out.ids)))

    # ---- what is kept, by class: bool [classes]

    def _needed(self, masks: Mapping[str, MaskArrays]) -> Ints:
        """The classes of the channels that have to be computed."""
        for one, other in self._sharing:
            if not masks[one].equals(masks[other]):
                raise ValueError(
                    f"compacted: {one} and {other}: expected the same masks on layers that share parameters"
                )
        for name, read in self._masks.items():
            read.rows, read.columns, read.kernels = masks[name].rows, masks[name].columns, masks[name].kernels
        return self._class_at[self.program.needed()]

    def _kept(self, needed: Ints, pinned: Ints, stays: Iterable[str]) -> Bools:
        kept = np.zeros(self._classes, dtype=np.bool_)
        kept[needed] = True
        kept[pinned] = True
        for name in (*self._stays, *stays):
            for classes in self._ends.get(name, ()):
                kept[classes] = True
        return kept

    def _hold(self, kept: Bools, align: int = 1) -> Bools:
        """Adds what kept_in_forward does: a channel where a value has none, and those that make shares equal; and those
        that make the widths of layers multiples of align.
        """
        while True:
            self._even_groups(kept)
            empty = (
                ~np.logical_or.reduceat(kept[self._values], self._starts) if self._values.size else np.zeros(0, bool)
            )
            more = [self._values[self._starts[empty]]]
            for parts in self._alike:
                counts = [int(np.count_nonzero(kept[classes])) for classes in parts]
                for classes, count in zip(parts, counts, strict=True):
                    if count < max(counts):
                        more.append(classes[~kept[classes]][: max(counts) - count])
            outputs = [classes for ends in self._ends.values() for classes in ends[1::2]] if align > 1 else []
            more += [_up_to_multiple(kept, self._by_group.get(c.tobytes(), c), align) for c in outputs]
            added = np.concatenate(more)
            if not added.size:
                return kept
            kept[added] = True

    def _even_groups(self, kept: Bools) -> None:
        """Adds what groups of convolutions lack of the largest."""
        while True:
            found = [missing_in_groups(kept[inputs], kept[filters]) for inputs, filters in self._groups]
            pairs = zip(self._groups, found, strict=True)
            more = [classes[missing] for its, sides in pairs for classes, missing in zip(its, sides, strict=True)]
            if not any(classes.size for classes in more):
                return
            kept[np.concatenate(more)] = True


def _positions(kept: Bools) -> Ints:
    """As Kept.of_ids."""
    positions = np.flatnonzero(kept)
    return positions if kept.ndim == 1 else in_groups(positions, int(kept.any(1).sum()))


def _up_to_multiple(kept: Bools, classes: Ints, align: int) -> Ints:
    """Classes that are not kept, as many as a width lacks up to a multiple of align; none if it has too few.

    classes: [any], or [groups, any] where all groups of which something is kept are to have equally many.
    """
    by_group = classes[None] if classes.ndim == 1 else classes[kept[classes].any(1)]
    if not by_group.size:
        return by_group.reshape(-1)
    dead = ~kept[by_group]
    step = align // math.gcd(align, len(by_group))
    missing = -(by_group.shape[1] - dead.sum(1)) % step
    if (missing > dead.sum(1)).any():
        return by_group[:0].reshape(-1)
    more: Ints = by_group[dead & (dead.cumsum(1) <= missing[:, None])]
    return more
