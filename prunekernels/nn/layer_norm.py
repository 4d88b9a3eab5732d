"""MaskedLayerNorm: nn.LayerNorm over the live channels alone."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .fixed_norm import FixedLayerNorm
from .mask_buffers import _check_plain
from .norm_channels import normalize_live
from .norm_over_channels import NormOverChannels


class MaskedLayerNorm(NormOverChannels, nn.LayerNorm):
    """nn.LayerNorm whose statistics are of the live channels alone; a dead one gives exact 0 and gets no gradient.

    So it computes what a smaller nn.LayerNorm computes of the live channels. The channels are in the last dimension of
    the input, of any number of dimensions. `convert` makes such layers of subclasses with channels in dimension 1, too
    (timm's and torchvision's LayerNorm2d).

    Args:
        args: As in `nn.LayerNorm`; normalized_shape has one dimension.
        kwargs: As in `nn.LayerNorm`.

    Attributes:
        channel_mask: Bool [C], True = live. A new layer has all channels live. The buffer of that name, in state dicts
            too, is float32, 1 = live. A state dict has zeros in dead entries of weight and bias.
        plain_class: The class that `restore` makes of the layer. A subclass with a forward of its own sets it.

    Examples:
        >>> norm = pk.MaskedLayerNorm(4)
        >>> norm.set_mask(torch.tensor([True, False, True, True]))
        >>> norm(torch.tensor([[1.0, 9.0, 1.0, 4.0]])).detach()
        tensor([[-0.7071,  0.0000, -0.7071,  1.4142]])
    """

    plain_class: type[nn.Module] = nn.LayerNorm
    fixed_class = FixedLayerNorm
    _called = "MaskedLayerNorm"
    _op = "layer_norm"
    weight: nn.Parameter
    bias: nn.Parameter
    _channels_first = False  # whether the channels are in dimension 1 of [N, C, H, W]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if len(self.normalized_shape) != 1:
            raise ValueError(
                f"MaskedLayerNorm: normalized_shape: expected one dimension, got {list(self.normalized_shape)}"
            )
        self._init_masks()

    def _channel_count(self) -> int:
        return self.normalized_shape[0]

    @property
    def groups(self) -> int:
        return 1

    def _channel_axis(self, x: Tensor) -> int:
        return 1 if self._channels_first or x.dim() == 2 else x.dim() - 1

    def _plain_forward(self, x: Tensor) -> Tensor:
        if not self._channels_first:
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)

    def _normalize(self, x: Tensor) -> Tensor:
        if not x.shape[1]:
            return self._of_nothing(x)
        y = F.layer_norm(x.movedim(1, -1), (x.shape[1],), *self._live_factors(), self.eps)
        return y.movedim(-1, 1)

    def _recorded_forward(self, x: Tensor) -> Tensor:
        self._check_channels(x)
        if self._channels_first:
            columns = x.reshape(x.shape[0], 1, x.shape[1], -1)
        else:
            columns = x.reshape(-1, 1, x.shape[-1], 1)
        live = self._public_mask("channel_mask").view(1, -1)
        return normalize_live(columns, live, (2,), self.weight, self.bias, self.eps).reshape(x.shape)

    @classmethod
    def from_norm(cls, norm: nn.LayerNorm) -> MaskedLayerNorm:
        """A masked layer that shares the parameters of a plain norm, which stays as it is.

        Args:
            norm: An `nn.LayerNorm` over one dimension. `prunekernels.convert` serves more: subclasses, and weights that
                are computed.

        Returns:
            A `MaskedLayerNorm` with all channels live.

        Examples:
            >>> norm = torch.nn.LayerNorm(4)
            >>> pk.MaskedLayerNorm.from_norm(norm).weight is norm.weight
            True
        """
        _check_plain("MaskedLayerNorm.from_norm: norm", norm, nn.LayerNorm)
        if len(norm.normalized_shape) != 1:
            raise ValueError(
                f"MaskedLayerNorm.from_norm: norm: expected one normalized dimension, got {list(norm.normalized_shape)}"
            )
        return cls._over(norm)

    def to_norm(self) -> nn.LayerNorm:
        """A layer without masks that computes the same, with copies of the parameters.

        Returns:
            An `nn.LayerNorm`; where channels are dead, a subclass that normalizes the live ones.

        Examples:
            >>> norm = pk.MaskedLayerNorm(4)
            >>> norm.set_mask(torch.arange(4) > 0)
            >>> x = torch.randn(2, 4)
            >>> torch.allclose(norm.to_norm()(x), norm(x), atol=1e-6)
            True
        """
        norm: nn.LayerNorm = self._to_norm()
        return norm
