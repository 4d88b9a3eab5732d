"""count_flops: multiply-adds of a network, dense and live, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .. import plan
from ..live import LiveList, LiveTensor, channels_last_of
from ..live.conv import FullWidth, Lowered
from ..nn.conv import lowered_for
from ..nn.masked_filters import MaskedFilters
from ..ops import mask_table
from .observe import masked_where_compiled, observe, text_table


@dataclass
class Flops:
    """Multiply-adds of one forward pass; print it to see a table.

    Attributes:
        rows: A dict for each layer, in the order in which they first ran: "layer" (its name in the model), "kind" (its
            class), "calls", and the sums over its calls "dense" (if nothing were dead) and "live" (what is computed).

    Examples:
        >>> model = torch.nn.Sequential(pk.MaskedConv2d(3, 8, 1), torch.nn.ReLU())
        >>> model[0].set_masks(filter=torch.arange(8) < 6)
        >>> flops = pk.count_flops(model, torch.randn(1, 3, 10, 10))
        >>> flops.dense, flops.live, flops.saved
        (2400, 1800, 0.25)
        >>> flops.rows
        [{'layer': '0', 'kind': 'MaskedConv2d', 'calls': 1, 'dense': 2400, 'live': 1800}]
    """

    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def dense(self) -> int:
        """Multiply-adds of all layers if nothing were dead."""
        return sum(row["dense"] for row in self.rows)

    @property
    def live(self) -> int:
        """Multiply-adds of all layers that are computed."""
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
    """Counts the dense and the live multiply-adds of a model's convolutions and linear layers.

    The model runs once on the example, in eval mode without gradients, and is left as it was. In masked mode the
    multiply-adds of those kernels are live that the layer's own masks leave; in live mode a kernel counts only if its
    input channel is live too. Operations outside such modules (a matrix product, F.conv2d) are not counted.

    Args:
        model: A network, masked or not.
        example_input: What model takes: a tensor such as [1, C, H, W] (one image gives the figures that papers quote),
            a tuple or a dict of arguments (see Example).

    Returns:
        A Flops.

    Examples:
        >>> model = torch.nn.Sequential(pk.MaskedConv2d(3, 8, 1), torch.nn.ReLU(), pk.MaskedConv2d(8, 4, 1))
        >>> model[0].set_masks(filter=torch.arange(8) < 6)
        >>> print(pk.count_flops(model, torch.randn(1, 3, 10, 10)))
        layer  kind          dense   live  live %
        0      MaskedConv2d  2,400  1,800    75.0
        2      MaskedConv2d  3,200  3,200   100.0
        all                  5,600  5,000    89.3
    """
    rows: dict[str, dict[str, Any]] = {}

    def visit(name: str, layer: nn.Module, x: Any, y: Any) -> None:
        if not isinstance(layer, (_ConvNd, nn.Linear)) or not isinstance(x, Tensor) or not isinstance(y, Tensor):
            return
        row = rows.setdefault(name, {"layer": name, "kind": type(layer).__name__, "calls": 0, "dense": 0, "live": 0})
        dense, live = _multiply_adds(layer, x, y)
        row["calls"] += 1
        row["dense"] += dense
        row["live"] += live

    with plan.measure(False), masked_where_compiled(model):
        observe("count_flops", model, example_input, visit)
    return Flops(list(rows.values()))


def _multiply_adds(layer: nn.Module, x: Tensor, y: Tensor) -> tuple[int, int]:
    """Dense and live multiply-adds of one call."""
    transposed = isinstance(layer, _ConvTransposeNd)  # each input value is multiplied with all weights of its channel
    dense = layer.weight[0].numel() * (x if transposed else y).numel()  # type: ignore[index, union-attr, operator]
    x = layer._prepared(x) if isinstance(layer, MaskedFilters) else x
    live = x.live if type(x) is LiveTensor else None
    if isinstance(layer, nn.Linear):
        last = channels_last_of(x)
        live = last[1] if last else None
    if isinstance(layer, MaskedFilters):
        kernels = live_kernels(layer, live if lowered(layer, live, x.dim()) else None)
        return dense, dense // max(1, kernels.numel()) * int(kernels.sum())
    if live is None or (not isinstance(layer, nn.Linear) and layer.groups != 1):
        return dense, dense
    return dense, dense // live.channels * live.unpadded.count


def lowered(layer: MaskedFilters, live: LiveList | None, dims: int) -> Lowered | None:
    """The small layer that a layer runs on an input with these live channels; None: it runs in masked mode."""
    served = dims > 1 if isinstance(layer, nn.Linear) else dims == 4
    if isinstance(layer, nn.ConvTranspose2d) and layer.groups > 1:
        return None
    if layer.kernel_mask.is_meta or not (layer._flow or live) or layer._forward_hooks or not served:
        return None
    found = lowered_for(layer, live)
    return None if isinstance(found, FullWidth) else found


def live_kernels(layer: MaskedFilters, live: LiveList | None) -> Tensor:
    """Kernels that are computed, bool [K, C / groups] on the CPU: unmasked, and the channel is in live (None: all)."""
    if layer.kernel_mask.is_meta:  # without values there is nothing dead
        return torch.ones(layer.kernel_mask.shape, dtype=torch.bool, device="cpu")
    layer._refresh_if_edited()
    K, C, G = layer.out_channels, layer.in_channels, layer.groups
    kernels = mask_table.live_kernels(layer._mask_table.cpu(), K, C, C // G)
    if live is not None:
        kernels = kernels & torch.from_numpy(live.unpadded.mask()).view(G, C // G).repeat_interleave(K // G, 0)
    return kernels


def _numbers(dense: int, live: int) -> list[str]:
    return [f"{dense:,}", f"{live:,}", f"{100 * live / dense if dense else 100:.1f}"]
