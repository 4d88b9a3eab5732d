"""Norms that take their statistics of a fixed part of their channels, in operators that any exporter knows.

They stand in small networks where a layer of torch.nn does not serve: where channels are kept that a masked norm leaves
out, or where its groups keep different numbers of channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norm_channels import NormChannels, normalize_chunks
from .reparametrized import set_layer_class


class FixedChannels(nn.Module):
    """Mixin of the norms over a fixed list of channels; every other channel of the result is zero.

    Attributes:
        order: The channels of the list, groups of equal size beside each other, int64 [live].
        place: Where each channel is in order, int64 [channels]; for one that is not, the number of those that are.
        chunks: What order consists of: (groups, channels in each group) and so on.
    """

    plain_class: type[nn.Module]
    order: Tensor
    place: Tensor
    chunks: list[tuple[int, int]]
    eps: float

    def _pick(self, factor: Tensor | None) -> Tensor | None:
        """Weight or bias of the channels in order."""
        return None if factor is None else factor.index_select(0, self.order)

    def _spread(self, y: Tensor, dim: int) -> Tensor:
        """Puts what stands in order along dim in its places."""
        if self.order.numel() < self.place.numel():
            y = torch.cat((y, torch.zeros_like(y.narrow(dim, 0, 1))), dim)
        return y.index_select(dim, self.place)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, normalizes={self.order.numel()}/{self.place.numel()}"


class FixedLayerNorm(FixedChannels, nn.LayerNorm):
    """nn.LayerNorm of a fixed list of channels."""

    __constants__ = [*nn.LayerNorm.__constants__, "_channels_first"]  # of torch.jit.script
    plain_class = nn.LayerNorm
    _channels_first = False

    def forward(self, input: Tensor) -> Tensor:
        if len(self.chunks) == 0:
            return torch.zeros_like(input)
        x = input.permute(0, 2, 3, 1) if self._channels_first else input
        weight, bias = self._pick(self.weight), self._pick(self.bias)
        y = F.layer_norm(x.index_select(-1, self.order), [self.order.numel()], weight, bias, self.eps)
        y = self._spread(y, -1)
        return y.permute(0, 3, 1, 2) if self._channels_first else y


class FixedGroupNorm(FixedChannels, nn.GroupNorm):
    """nn.GroupNorm of a fixed list of channels, in groups that may have different sizes."""

    plain_class = nn.GroupNorm

    def forward(self, input: Tensor) -> Tensor:
        if len(self.chunks) == 0:
            return torch.zeros_like(input)
        weight, bias = self._pick(self.weight), self._pick(self.bias)
        y = normalize_chunks(input.index_select(1, self.order), self.chunks, weight, bias, self.eps)
        return self._spread(y, 1)


def set_channels(layer: Any, channels: NormChannels, plain: type[nn.Module], fixed: type[nn.Module]) -> None:
    """Makes a norm one of these channels, in place: of its plain class, or of a fixed one where that does not serve."""
    if isinstance(layer, nn.GroupNorm):
        layer.num_channels, layer.num_groups = channels.channels, sum(groups for groups, _ in channels.chunks)
    else:
        layer.normalized_shape = (channels.channels,)
    for name in ("order", "place"):
        layer._buffers.pop(name, None)
    layer.__dict__.pop("chunks", None)
    set_layer_class(layer, plain if channels.plain else fixed)
    if not channels.plain:
        like = next((t for t in (*layer._parameters.values(), *layer._buffers.values()) if t is not None), None)
        order, place = channels.indices(torch.device("cpu") if like is None else like.device)
        layer.chunks = channels.chunks
        layer.register_buffer("order", order)
        layer.register_buffer("place", place)
