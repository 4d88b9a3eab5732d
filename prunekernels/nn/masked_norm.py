"""MaskedNorm: what masked norms share: the mask of their channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..live import LiveList
from .mask_buffers import MaskBuffers, public_mask
from .sharding import check_whole


class MaskedNorm(MaskBuffers):
    """Base of the masked norms, `MaskedBatchNorm2d` and others: a dead channel gives exact 0 and gets no gradient.

    Attributes:
        channel_mask: Bool [C], True = live. A new layer has all channels live.
        plain_class: The class that `restore` makes of the layer. A subclass with a forward of its own sets it.
    """

    plain_class: type[nn.Module]
    _called: str  # the name of the class in errors, also of those that are made at run time
    _each_alone = True  # whether a channel's statistics are its own, so that zeros in weight and bias make it dead
    _mask_names = ("channel_mask",)
    _own_state: tuple[str, ...] = ("channel_mask", "_seen", "_channels", "_all_live")
    channel_mask: Tensor = public_mask("channel_mask")
    weight: Tensor | None
    bias: Tensor | None
    _channels: LiveList

    def _channel_count(self) -> int:
        """C"""
        return self.num_features  # type: ignore[return-value]

    def _init_masks(self) -> None:
        self._add_masks(((self._channel_count(),),), self._device_of_parameters())

    def _derive(self) -> None:
        mask = self._masks["channel_mask"]
        # Not a buffer: its length changes with the mask, and DDP broadcasts buffers, whose sizes must agree.
        self._channels = LiveList.all(mask.numel()) if mask.is_meta else LiveList.of_mask(mask)
        self._all_live = self._channels.full

    def _dead_entries(self) -> dict[str, Tensor]:
        if self._all_live:
            return {}
        dead = ~self._masks["channel_mask"]
        return {"weight": dead, "bias": dead}

    def set_mask(self, channel: Tensor | str) -> None:
        """Changes the mask in place. An error changes nothing.

        Args:
            channel: Bool [C], True = live, on the device of the layer; or "all": everything live.

        Examples:
            >>> norm = pk.MaskedBatchNorm2d(4)
            >>> norm.set_mask(torch.arange(4) > 0)
            >>> norm.set_mask("all")
        """
        op = f"{self._called}.set_mask"
        mask = self._parse(op, "channel", channel, self.channel_mask)
        if mask is None:
            raise ValueError(f"{op}: channel: expected a bool tensor or 'all', got None")
        with torch.no_grad():
            self._masks["channel_mask"].copy_(mask)
        self._store_all()

    @torch.no_grad()
    def zero_dead(self, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Writes exact zeros into the dead entries of weight and bias, in place.

        Args:
            weight: [C]; None: the weight and bias of the layer.
            bias: [C].

        Examples:
            >>> norm = pk.MaskedBatchNorm2d(4)
            >>> norm.set_mask(torch.arange(4) > 0)
            >>> norm.zero_dead()
            >>> norm.weight.tolist()
            [0.0, 1.0, 1.0, 1.0]
        """
        if weight is None:
            weight, bias = self.weight, self.bias
        check_whole("zero_dead", self._called, self, weight)
        self._look()
        if self._all_live:
            return
        if weight is None:
            raise ValueError(f"{self._called}: affine: expected True, got dead channels no plain norm can zero")
        weight.masked_fill_(~self.channel_mask, 0)
        if bias is not None:
            bias.masked_fill_(~self.channel_mask, 0)

    def extra_repr(self) -> str:
        live = "" if self._all_live else f", channels={self._channels.count}/{self._channel_count()}"
        return super().extra_repr() + live
