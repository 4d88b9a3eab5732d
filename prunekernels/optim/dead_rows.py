"""DeadRows: which entries of a model's parameters a step must not touch, prepared again only when a mask changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..masks import live_counts, make_table
from ..nn.adapted import computes_weight
from ..nn.mask_buffers import MaskBuffers, _version
from ..nn.masked_filters import MaskedFilters
from ..nn.masked_norm import MaskedNorm

FREEZES = ("hard", "dead")
MaskedLayer = MaskedFilters | MaskedNorm


def check_freeze(op: str, freeze: str) -> str:
    if freeze not in FREEZES:
        raise ValueError(f"{op}: freeze: expected one of {', '.join(FREEZES)}, got {freeze!r}")
    return freeze


def _conv_tables(layer: MaskedFilters, freeze: str) -> tuple[Tensor | None, Tensor | None]:
    """Mask tables of weight and bias, dead = frozen; None: nothing is frozen."""
    layer._refresh_if_edited()
    sizes = (layer.out_channels, layer.in_channels, layer.groups)
    if freeze == "hard":
        table = None if bool(layer.hard_mask.all()) else make_table(layer.hard_mask, None, None, *sizes)
        return table, table
    bias = None if layer._all_live else layer._mask_table
    if computes_weight(layer):  # from whole filters, so that what is stored for dead inputs and kernels trains
        filters = layer.hard_mask if layer.weight_grad == "dense" else layer.filter_mask & layer.hard_mask
        return make_table(filters, None, None, *sizes), bias
    if layer.weight_grad == "masked":
        return bias, bias
    full = (
        live_counts(layer._grad_table)[2] == layer.kernel_mask.numel()
    )  # with dense gradients only hard-dead weights do not train
    return None if full else layer._grad_table, bias


def _norm_table(layer: MaskedNorm) -> Tensor | None:
    layer._refresh_if_edited()
    return None if layer._all_live else make_table(layer.channel_mask, None, None, layer._channel_count(), 1, 1)


class DeadRows:
    """The mask table of each parameter of some layers; what is dead in a table is frozen.

    freeze "hard" freezes the filters that hard_mask drops, "dead" all weights that get no gradient. Of a norm both
    freeze the channels that channel_mask drops.
    """

    def __init__(self, layers: Sequence[MaskedLayer], freeze: str) -> None:
        self._layers, self._freeze = layers, freeze
        self._watched = [(layer, name) for layer in layers for name in self._names(layer)]
        self._convs = [layer for layer in layers if isinstance(layer, MaskedFilters)]
        self._buffers: list[Tensor] = []
        self._seen: object = None
        self._tables: Mapping[Tensor, Tensor] = {}

    def _names(self, layer: MaskedLayer) -> tuple[str, ...]:
        return ("hard_mask",) if isinstance(layer, MaskedFilters) and self._freeze == "hard" else layer._mask_names

    def tables(self) -> Mapping[Tensor, Tensor]:
        """Parameter -> table, for parameters with something frozen. The same object as long as no mask changes."""
        buffers = [layer._masks[name] for layer, name in self._watched if isinstance(layer, MaskBuffers)]
        try:
            versions = [mask._version for mask in buffers]
        except RuntimeError:  # inference tensors have none
            versions = [_version(mask) for mask in buffers]
        seen = (versions, [id(mask) for mask in buffers], [layer.__dict__.get("_weight_grad") for layer in self._convs])
        if seen != self._seen:
            with torch.no_grad():
                self._tables = {p: table for p, table in self._prepare() if table is not None}
            self._buffers, self._seen = buffers, seen  # kept alive, so that their ids stay theirs
        return self._tables

    def _prepare(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for layer in self._layers:
            if not isinstance(layer, (MaskedFilters, MaskedNorm)):  # pk.restore has made it a plain layer since
                continue
            if isinstance(layer, MaskedFilters):
                weight, bias = _conv_tables(layer, self._freeze)
                weight = None if weight is None else layer._weight_table(weight)
            else:
                weight = bias = _norm_table(layer)
            for name, table in (("weight", weight), ("bias", bias)):
                parameter = layer._parameters.get(name)  # a weight that is computed is none
                if parameter is not None:
                    yield parameter, table
