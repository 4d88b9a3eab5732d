"""NormOverChannels: what masked norms share whose statistics are of several channels: they are of live ones alone."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..functional import gather_channels
from ..live import LiveList, LiveTensor, full_width
from ..live.channel_list import align_of
from ..live.channel_ops import FLOATS, regroup, to_dense
from ..live.tensor import FilledTensor, can_flow, wrap
from ..ops.transforms import is_recorded_or_transformed
from .fixed_norm import FixedChannels, set_channels
from .mask_buffers import _version
from .masked_norm import MaskedNorm
from .norm_channels import NormChannels
from .reparametrized import deep_copy, is_reparametrized, remove_reparametrization
from .tracing import as_leaf, is_exported, is_traced_by_fx


class NormOverChannels(MaskedNorm):
    """Base of MaskedGroupNorm and MaskedLayerNorm.

    The plain layer with zeros for what is dead computes something else than the masked one: its statistics are of all
    channels. What computes the same is a plain layer of the live channels, or one of the classes in fixed_norm.py.
    """

    fixed_class: type[FixedChannels]
    _each_alone = False
    _op: ClassVar[str]  # its name among recorded fallbacks
    eps: float

    @property
    def groups(self) -> int:
        """How many groups of channels have statistics of their own."""
        raise NotImplementedError

    def _channel_axis(self, x: Tensor) -> int:
        """The dimension of the channels of an input."""
        return 1

    def _plain_forward(self, x: Tensor) -> Tensor:
        """What the plain layer computes."""
        return super().forward(x)  # type: ignore[misc]

    def _normalize(self, x: Tensor) -> Tensor:
        """The norm of the live channels alone, [N, live, ...]."""
        raise NotImplementedError

    def _recorded_forward(self, x: Tensor) -> Tensor:
        """The norm at full width, for compilers and transforms: neither sizes nor Python values depend on the mask."""
        raise NotImplementedError

    def norm_channels(self) -> NormChannels:
        """The live channels by groups."""
        C = self._channel_count()
        rows = np.arange(C) if self._all_live else np.where(self._channels.mask(), np.arange(C), -1)
        return NormChannels.of_rows(rows, self.groups, C)

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes the live channels. input and result may be live tensors."""
        if is_traced_by_fx(input):
            return as_leaf(self, input, NormOverChannels.forward)
        if is_exported():
            return self._plain_forward(input) if self._is_full_for_good() else self._recorded_forward(input)
        if is_recorded_or_transformed():
            input = input.to_dense() if isinstance(input, LiveTensor) else input  # alone, as in MaskedConv2d
            return self._recorded_forward(input)
        self._bring_up_to_date()
        last = self._channel_axis(input) != 1
        if last and isinstance(input, LiveTensor):
            self._check_channels(input)
            first = input.movedim(-1, 1)
            if type(first) is LiveTensor and first.dtype in FLOATS:
                return self._live_forward(first).movedim(1, -1)
            input = (first.unfilled(self._op) if isinstance(first, FilledTensor) else full_width(first)).movedim(1, -1)
        elif isinstance(input, FilledTensor):
            input = input.unfilled(self._op)
        if self._all_live and type(input) is not LiveTensor:
            return self._plain_forward(input)
        self._check_channels(input)
        if input.dtype not in FLOATS:
            return self._recorded_forward(input.to_dense() if type(input) is LiveTensor else input)
        if type(input) is LiveTensor:
            return self._live_forward(input)
        if self._makes_live(input):
            return self._live_forward(input.movedim(-1, 1)).movedim(1, -1) if last else self._live_forward(input)
        if last:
            rows = input.reshape(1, math.prod(input.shape[:-1]), 1, input.shape[-1])
            return self._masked_forward(rows.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(input.shape)
        return self._masked_forward(input)

    def _makes_live(self, x: Tensor) -> bool:
        """Whether the result is a live tensor."""
        return self._flow and not self._forward_hooks and can_flow(x) and not self._channels.almost_full and x.dim() > 1

    def _live_forward(self, x: Tensor) -> Tensor:
        """The norm in live mode. x: [N, C, ...], plain or live."""
        if type(x) is LiveTensor:  # a channel that is live here but arrives dead counts as zeros
            compact = regroup(x.compact, x.live, self._channels)
        else:
            compact = self._gathered(x)
        y, channels = self._normalize(compact), self._channels
        if self._makes_live(x):
            padded = channels.aligned(align_of(y.device, self._align))
            return wrap(regroup(y, channels, padded), padded)
        return to_dense(y, channels)

    def _masked_forward(self, x: Tensor) -> Tensor:
        """The norm with zeros in dead channels. x: [N, C, ...]."""
        return to_dense(self._normalize(self._gathered(x)), self._channels)

    def _gathered(self, x: Tensor) -> Tensor:
        """[N, C, ...] -> [N, live, ...]"""
        if x.dim() == 4:
            return gather_channels(x, self._channels.index(x.device))
        return regroup(x, LiveList.all(x.shape[1]), self._channels)

    def _live_factors(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias of the live channels."""
        if self._channels.full:
            return self.weight, self.bias
        weight, bias = (
            None if p is None else p.index_select(0, self._channels.rows(p.device)) for p in (self.weight, self.bias)
        )
        return weight, bias

    def _of_nothing(self, x: Tensor) -> Tensor:
        """The result if nothing is live, [N, 0, ...]; the parameters stay in the graph, with zero gradients."""
        for p in (self.weight, self.bias):
            x = x if p is None else x + p[:0].to(x.dtype).view(1, 0, *[1] * (x.dim() - 2))
        return x

    def _is_full_for_good(self) -> bool:
        """Whether what an exporter records may be the plain norm: it is not asked for again when the mask changes."""
        if torch.compiler.is_dynamo_compiling():
            return False
        return bool(self._all_live) and all(_version(mask) == version for *_, mask, version in self._seen)

    def _check_channels(self, x: Tensor) -> None:
        axis = self._channel_axis(x)
        if x.dim() < 2 - (axis != 1) or x.shape[axis] != self._channel_count():
            raise ValueError(
                f"{self._called}: input: expected {self._channel_count()} channels in dimension {axis}, got "
                f"{list(x.shape)}"
            )

    def _to_norm(self) -> Any:
        """An independent layer without masks that computes the same."""
        plain = self if not is_reparametrized(self) else deep_copy(self)
        remove_reparametrization(f"{self._called}.to_norm", "layer", plain)
        self._look()
        kind: Any = self.fixed_class.plain_class
        norm: nn.Module = plain._plain_copy(kind)
        if norm.weight is not None:
            self.zero_dead(norm.weight, norm.bias)  # type: ignore[arg-type]
        set_channels(norm, self.norm_channels(), kind, self.fixed_class)
        return norm
