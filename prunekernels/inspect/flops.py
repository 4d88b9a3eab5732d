"""count_flops: multiply-adds of a network, dense and live, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .. import plan
from ..live import LiveList, LiveTensor
from ..live.conv import FullWidth, Lowered
from ..nn.conv import MaskedConv2d, lowered_for
from ..ops import mask_table
from .observe import observe, text_table


@dataclass
class Flops:
    """Multiply-adds of one forward pass; rows: those of each layer, in the order in which they first ran.

    A row: "layer", "kind", "calls", and the sums over its calls "dense" (nothing dead) and "live" (what is computed).
    """

    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def dense(self) -> int:
        """All layers' multiply-adds if nothing were dead."""
        return sum(row["dense"] for row in self.rows)

    @property
    def live(self) -> int:
        """All layers' multiply-adds that are computed."""
        return sum(row["live"] for row in self.rows)

    @property
    def saved(self) -> float:
        """Share of the dense multiply-adds that is not computed."""
        return 1 - self.live / self.dense if self.dense else 0.0

    def __str__(self) -> str:
        cells = [[row["layer"], row["kind"], *_numbers(row["dense"], row["live"])] for row in self.rows]
        return text_table(
            ["layer", "kind", "dense", "live", "live %"], [*cells, ["all", "", *_numbers(self.dense, self.live)]]
        )


def count_flops(model: nn.Module, example_input: Any) -> Flops:
    """Dense and live multiply-adds of model's convolutions and linear layers, found by running it once on the example.

    example_input: a tensor (one image gives the figures that papers quote), a tuple of arguments, or a dict of them by
    name. The model runs in eval mode without gradients and is left as it was. Live are the multiply-adds of the kernels
    that a layer's own masks leave and, in the network gear, of those among them whose channel arrives live. Operations
    outside of such modules (a matrix product, F.conv2d) are not counted.

        >>> print(pk.count_flops(model, torch.randn(1, 3, 32, 32)))
    """
    rows: dict[str, dict[str, Any]] = {}

    def visit(name: str, layer: nn.Module, x: Any, y: Any) -> None:
        if not isinstance(layer, (_ConvNd, nn.Linear)):
            return
        row = rows.setdefault(name, {"layer": name, "kind": type(layer).__name__, "calls": 0, "dense": 0, "live": 0})
        dense, live = _multiply_adds(layer, x, y)
        row["calls"] += 1
        row["dense"] += dense
        row["live"] += live

    with plan.measure(False):
        observe("count_flops", model, example_input, visit)
    return Flops(list(rows.values()))


def _multiply_adds(layer: nn.Module, x: Tensor, y: Tensor) -> tuple[int, int]:
    """Dense and live multiply-adds of one call."""
    if isinstance(layer, _ConvTransposeNd):  # each input value meets its channel's weights
        dense = layer.weight[0].numel() * x.numel()
        return dense, dense
    dense = layer.weight[0].numel() * y.numel()  # type: ignore[index, union-attr, operator]
    live = x.live if type(x) is LiveTensor else None
    if isinstance(layer, MaskedConv2d):
        kernels = live_kernels(layer, live if passage(layer, live, x.dim()) else None)
        return dense, dense // max(1, kernels.numel()) * int(kernels.sum())
    if live is None or (x.dim() != 2 if isinstance(layer, nn.Linear) else layer.groups != 1):
        return dense, dense
    return dense, dense // live.channels * live.count


def passage(layer: MaskedConv2d, live: LiveList | None, dims: int = 4) -> Lowered | None:
    """What the network gear makes of an input with these live channels; None where the layer gear serves it."""
    if layer.kernel_mask.is_meta or not (layer._flow or live) or layer._forward_hooks or dims != 4:
        return None
    found = lowered_for(layer, live)
    return None if isinstance(found, FullWidth) else found


def live_kernels(layer: MaskedConv2d, live: LiveList | None) -> Tensor:
    """bool [K, C / groups], on the CPU: kernels that the layer's masks leave, of those whose channel is live."""
    if layer.kernel_mask.is_meta:  # no values, nothing dead
        return torch.ones(layer.kernel_mask.shape, dtype=torch.bool, device="cpu")
    layer._refresh_if_edited()
    K, C, G = layer.out_channels, layer.in_channels, layer.groups
    kernels = mask_table.live_kernels(layer._mask_table.cpu(), K, C, C // G)
    if live is not None:
        kernels = kernels & torch.from_numpy(live.mask()).view(G, C // G).repeat_interleave(K // G, 0)
    return kernels


def _numbers(dense: int, live: int) -> list[str]:
    return [f"{dense:,}", f"{live:,}", f"{100 * live / dense if dense else 100:.1f}"]
