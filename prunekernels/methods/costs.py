"""Costs: the multiply-adds or the parameters of the small network, by which filters are dead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from ..graph import Group
from ..inspect.flops import count_flops

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Costs:
    """Multiply-adds of convolutions and linear layers, or parameters, without the channels that are dead.

    A joint channel of a group (see coupled_groups) is computed where a filter of one of its convolutions is live. A
    layer costs its multiply-adds times the share of its filters, and of the channels that it reads, that are computed.
    Layers that the graph does not follow, and channels that are not zero behind dead filters, cost what they do today.

    Args:
        model: The network.
        groups: Its groups, as the graph has them.
        units: Filters that are pruned together.
        example_input: What the model takes.
        kind: "flops" or "params".

    Attributes:
        dense: The multiply-adds, or the parameters, of the whole network.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        units: Sequence[Group],
        example_input: Any,
        kind: str = "flops",
    ) -> None:
        first = [0, *accumulate(group.width for group in groups)]
        at = {n: place + c.numpy() for place, g in zip(first, groups, strict=False) for n, c in g.filters.items()}
        starts = [0, *accumulate(unit.width for unit in units)]
        own = {n: start + c.numpy() for start, u in zip(starts, units, strict=False) for n, c in u.filters.items()}
        self._filters = starts[-1]
        known = [name for name in own if name in at]
        self._filter_of = _joined([own[name] for name in known])  # of a unit's channel and a group's that it computes
        self._channel_of = _joined([at[name] for name in known])
        self._kept = np.zeros(first[-1], dtype=np.bool_)
        for name in at.keys() - own.keys():
            self._kept[at[name]] = True

        prices, widths, reads, rows, columns = [], [], [], [], []
        flops = count_flops(model, example_input)
        self._of_channel = np.zeros(first[-1], dtype=np.int64)  # parameters of a channel that are not in weights
        layers: list[Any] = [model.get_submodule(row["layer"]) for row in flops.rows]
        for row, layer in zip(flops.rows, layers, strict=True):
            name, (K, Cg) = row["layer"], layer.weight.shape[:2]
            if isinstance(layer, _ConvTransposeNd):
                K, Cg = layer.out_channels, layer.in_channels // layer.groups
            is_plain = isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
            in_groups = getattr(layer, "groups", 1)  # of many, each stays or goes with all that it reads
            loses_inputs = in_groups == 1 or (isinstance(layer, nn.Conv2d) and min(Cg, K // in_groups) > in_groups)
            readers = zip(first, groups, strict=False) if is_plain and loses_inputs else ()
            found = [(place, c[:Cg]) for place, g in readers if (c := g.readers.get(name)) is not None]
            rows.append(at.get(name, np.zeros(0, dtype=np.int64)))
            columns.append(_joined([place + c[c >= 0].numpy() for place, c in found]))
            whole = row["dense"] if kind == "flops" else layer.weight.numel()
            prices.append(whole // (K * Cg))  # of one filter and one channel that it reads
            widths.append(K - len(rows[-1]))  # those that are always computed
            reads.append(Cg - len(columns[-1]))
        self._prices, self._widths, self._reads = (np.array(n, dtype=np.int64) for n in (prices, widths, reads))
        self._weights = self.dense = flops.dense  # those of weights, and all
        if kind == "params":
            self._weights = sum(layer.weight.numel() for layer in layers)
            self.dense = sum(p.numel() for p in model.parameters())
            self._count_vectors(model, groups, first, at)
        (self._rows, self._row_layers), (self._columns, self._column_layers) = _flat(rows), _flat(columns)

    def _count_vectors(
        self, model: nn.Module, groups: Sequence[Group], first: Sequence[int], at: Mapping[str, Ints]
    ) -> None:
        """Counts biases of convolutions, and what norms have for each channel."""
        modules: dict[str, Any] = dict(model.named_modules())
        places = [channels for name, channels in at.items() if modules[name].bias is not None]
        for start, group in zip(first, groups, strict=False):
            for name, channels in group.norms.items():
                vectors = list(modules[name].parameters(recurse=False))
                places += [start + channels[channels >= 0].numpy()] * len(vectors)
        for place in places:
            np.add.at(self._of_channel, place, 1)

    def saved(self, dead: Bools) -> int:
        """What the small network saves.

        Args:
            dead: bool [sum of the widths of all units].
        """
        kept = self._kept.copy()
        kept[self._channel_of[~dead[self._filter_of]]] = True
        layers = len(self._prices)
        rows = self._widths + np.bincount(self._row_layers[kept[self._rows]], minlength=layers)
        columns = self._reads + np.bincount(self._column_layers[kept[self._columns]], minlength=layers)
        return self._weights - int((self._prices * rows * columns).sum()) + int(self._of_channel[~kept].sum())

    def of_filters(self) -> Floats:
        """[sum of the widths of all units]: the multiply-adds of what each filter computes, and of what reads it."""
        count = len(self._kept)
        rows, columns = self._widths.copy(), self._reads.copy()
        rows += np.bincount(self._row_layers, minlength=len(rows))
        columns += np.bincount(self._column_layers, minlength=len(columns))
        price = np.bincount(self._rows, (self._prices * columns)[self._row_layers], count)
        price += np.bincount(self._columns, (self._prices * rows)[self._column_layers], count)
        return np.bincount(self._filter_of, price[self._channel_of], self._filters).astype(np.float64)


def _joined(parts: Sequence[Ints]) -> Ints:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _flat(by_layer: Sequence[Ints]) -> tuple[Ints, Ints]:
    """All entries, and the layer of each."""
    return _joined(by_layer), np.repeat(np.arange(len(by_layer)), [len(part) for part in by_layer])
