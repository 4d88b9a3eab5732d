"""MaskedBatchNorm2d: nn.BatchNorm2d whose dead channels are exactly zero and cost nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._buffers import MaskBuffers
from .flow import LiveList, LiveTensor
from .flow.live import regroup, widen, wrap
from .functional import gather_channels


class MaskedBatchNorm2d(MaskBuffers, nn.BatchNorm2d):
    """nn.BatchNorm2d in which a dead channel gives exact 0, keeps its running statistics and gets no gradient.

    Arguments as in nn.BatchNorm2d; channel_mask [C] is a buffer, bool, True = live, all live at birth. Without it a
    dead filter leaves a constant behind the norm (beta, in training) and is not dead downstream.
    """

    _mask_names = ("channel_mask",)
    _own_state = ("channel_mask", "_seen", "_channels", "_all_live")
    channel_mask: Tensor
    _channels: LiveList

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._init_masks()

    def _init_masks(self) -> None:
        known = next((t for t in (self.weight, self.running_mean) if t is not None), torch.empty(0))
        self.register_buffer("channel_mask", torch.ones(self.num_features, dtype=torch.bool, device=known.device))
        self._refresh()

    def _derive(self) -> None:
        mask = self.channel_mask
        # No buffer: its length changes with the mask, which a buffer's must not while ranks broadcast theirs.
        self._channels = LiveList.all(mask.numel()) if mask.is_meta else LiveList.of_mask(mask)
        self._all_live = self._channels.full

    def set_mask(self, channel: Tensor | str) -> None:
        """Changes the mask in place: a bool tensor [C] or "all". On an error nothing changes."""
        op = "MaskedBatchNorm2d.set_mask"
        mask = self._parse(op, "channel", channel, self.channel_mask)
        if mask is None:
            raise ValueError(f"{op}: channel: expected a bool tensor or 'all', got None")
        with torch.no_grad():
            self.channel_mask.copy_(mask)
        self._refresh()

    def forward(self, input: Tensor) -> Tensor:
        self._refresh_if_edited()
        if self._all_live and type(input) is not LiveTensor:
            return super().forward(input)
        self._check_input_dim(input)
        if input.shape[1] != self.num_features:
            raise ValueError(
                f"MaskedBatchNorm2d: input: expected {self.num_features} channels, got {list(input.shape)}"
            )
        if type(input) is LiveTensor:  # a live channel that arrives dead is still normalized: zeros become beta
            compact = regroup(input.compact, input.live, self._channels)
        else:
            compact = gather_channels(input, self._channels.index(input.device))
        y = self._normalize(compact, self._channels.rows(compact.device))
        if self._flow and not self._forward_hooks and not torch.compiler.is_compiling():
            return wrap(y, self._channels)
        return widen(y, self._channels)

    def _normalize(self, live: Tensor, rows: Tensor) -> Tensor:
        """The norm of the live channels alone; rows: which they are."""
        weight, bias = (None if p is None else p.index_select(0, rows) for p in (self.weight, self.bias))
        update = self.training and self.track_running_stats
        if update and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if rows.numel() == 0:  # nothing to normalize, yet the parameters stay in the graph, with zero gradients
            shape = (1, -1, 1, 1)
            return live if weight is None or bias is None else live * weight.view(shape) + bias.view(shape)
        factor = self.momentum or 0.0
        if self.momentum is None and update and self.num_batches_tracked is not None:
            factor = 1.0 / float(self.num_batches_tracked)
        by_batch = self.training or self.running_mean is None
        mean = var = None
        if self.running_mean is not None and self.running_var is not None and (update or not by_batch):
            mean, var = self.running_mean.index_select(0, rows), self.running_var.index_select(0, rows)
        y = F.batch_norm(live, mean, var, weight, bias, by_batch, factor, self.eps)
        if update and mean is not None and var is not None:
            with torch.no_grad():
                self.running_mean.index_copy_(0, rows, mean)  # type: ignore[union-attr]
                self.running_var.index_copy_(0, rows, var)  # type: ignore[union-attr]
        return y

    @classmethod
    def from_norm(cls, norm: nn.BatchNorm2d) -> MaskedBatchNorm2d:
        """A masked layer over the same parameters and statistics; norm itself stays as it is."""
        return cls._over(norm)

    def to_norm(self) -> nn.BatchNorm2d:
        """An independent nn.BatchNorm2d of the same function: dead channels get weight and bias 0."""
        norm = self._plain_copy(nn.BatchNorm2d)
        self.zero_dead(norm.weight, norm.bias)
        return norm

    @torch.no_grad()
    def zero_dead(self, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Writes exact zeros into the dead entries of weight and bias, in place (by default the layer's own)."""
        if weight is None:
            weight, bias = self.weight, self.bias
        self._refresh_if_edited()
        if self._all_live:
            return
        if weight is None or bias is None:
            raise ValueError("MaskedBatchNorm2d: affine: expected True, got dead channels no plain norm can zero")
        weight.masked_fill_(~self.channel_mask, 0)
        bias.masked_fill_(~self.channel_mask, 0)

    def extra_repr(self) -> str:
        live = "" if self._all_live else f", channels={self._channels.count}/{self.num_features}"
        return super().extra_repr() + live
