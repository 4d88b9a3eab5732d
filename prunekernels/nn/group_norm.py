"""MaskedGroupNorm: nn.GroupNorm over the live channels alone."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from .fixed_norm import FixedGroupNorm
from .mask_buffers import _check_plain
from .norm_channels import NormChannels, normalize_chunks, normalize_live
from .norm_over_channels import NormOverChannels


class MaskedGroupNorm(NormOverChannels, nn.GroupNorm):
    """nn.GroupNorm whose statistics are of the live channels alone; a dead one gives exact 0 and gets no gradient.

    Groups may keep different numbers of channels; one in which nothing is live vanishes. Where all of them keep equally
    many, the layer computes what a smaller nn.GroupNorm computes of the live channels.

    Args:
        args: As in `nn.GroupNorm`.
        kwargs: As in `nn.GroupNorm`.

    Attributes:
        channel_mask: Bool [C], True = live. A new layer has all channels live. The buffer of that name, in state dicts
            too, is float32, 1 = live. A state dict has zeros in dead entries of weight and bias.
        plain_class: The class that `restore` makes of the layer. A subclass with a forward of its own sets it.

    Examples:
        >>> norm = pk.MaskedGroupNorm(2, 4)
        >>> norm.set_mask(torch.tensor([True, False, True, True]))
        >>> norm(torch.randn(2, 4, 5, 5))[:, 1].any().item()
        False
    """

    plain_class: type[nn.Module] = nn.GroupNorm
    fixed_class = FixedGroupNorm
    _called = "MaskedGroupNorm"
    _op = "group_norm"
    weight: nn.Parameter
    bias: nn.Parameter
    _own_state = (*NormOverChannels._own_state, "_by_group")
    _by_group: NormChannels

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._init_masks()

    def _channel_count(self) -> int:
        return self.num_channels

    @property
    def groups(self) -> int:
        return self.num_groups

    def _derive(self) -> None:
        super()._derive()
        self._by_group = self.norm_channels()

    def _plain_forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)

    def _normalize(self, x: Tensor) -> Tensor:
        by_group = self._by_group
        if not by_group.chunks:
            return self._of_nothing(x)
        if by_group.even:
            return normalize_chunks(x, by_group.chunks, *self._live_factors(), self.eps)
        among, back = by_group.moves(x.device)
        weight, bias = (None if p is None else p.index_select(0, among) for p in self._live_factors())
        y = normalize_chunks(x.index_select(1, among), by_group.chunks, weight, bias, self.eps).index_select(1, back)
        return y.contiguous(memory_format=suggest_memory_format(x)) if x.dim() == 4 else y

    def _recorded_forward(self, x: Tensor) -> Tensor:
        self._check_channels(x)
        C, G = self.num_channels, self.num_groups
        live = self._public_mask("channel_mask").view(G, C // G)
        planes = x.reshape(x.shape[0], G, C // G, -1)
        return normalize_live(planes, live, (2, 3), self.weight, self.bias, self.eps).reshape(x.shape)

    @classmethod
    def from_norm(cls, norm: nn.GroupNorm) -> MaskedGroupNorm:
        """A masked layer that shares the parameters of a plain norm, which stays as it is.

        Args:
            norm: An `nn.GroupNorm`. `prunekernels.convert` serves more: subclasses, and weights that are computed.

        Returns:
            A `MaskedGroupNorm` with all channels live.

        Examples:
            >>> norm = torch.nn.GroupNorm(2, 4)
            >>> pk.MaskedGroupNorm.from_norm(norm).weight is norm.weight
            True
        """
        _check_plain("MaskedGroupNorm.from_norm: norm", norm, nn.GroupNorm)
        return cls._over(norm)

    def to_norm(self) -> nn.GroupNorm:
        """A layer without masks that computes the same, with copies of the parameters.

        Returns:
            An `nn.GroupNorm`; where channels are dead, a subclass that normalizes the live ones.

        Examples:
            >>> norm = pk.MaskedGroupNorm(2, 4)
            >>> norm.set_mask(torch.arange(4) > 0)
            >>> x = torch.randn(2, 4, 3, 3)
            >>> torch.allclose(norm.to_norm()(x), norm(x), atol=1e-6)
            True
        """
        norm: nn.GroupNorm = self._to_norm()
        return norm
