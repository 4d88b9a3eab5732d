"""MaskedLinear: nn.Linear whose dead rows, columns and single weights cost nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from ..functional import conv2d_with_tables, transformed_conv2d
from ..live import LiveList, LiveTensor, channels_last_of, fallbacks, wrap_last
from ..live.conv import FullWidth, Lowered
from ..live.tensor import FilledTensor, can_flow
from ..ops.transforms import is_recorded_or_transformed, is_transformed
from ..plan import LayerPlan
from .conv import lowered_for, small_parameters
from .mask_buffers import _check_plain
from .masked_filters import MaskedFilters
from .tracing import as_leaf, is_exported, is_traced_by_fx, zeroed

_POINTWISE = ((1, 1), (0, 0), (1, 1), 1)  # stride, padding, dilation, groups


class MaskedLinear(MaskedFilters, nn.Linear):
    """nn.Linear in which dead filters (outputs), inputs and single weights are skipped, forward and backward.

    Weight, bias and their state-dict keys are those of `nn.Linear`, the masks those of `MaskedConv2d`, of which it is
    the convolution of one pixel: a filter is a row of the weight, an input channel a column, a kernel a single weight.
    Change the masks with `set_masks`.

    Args:
        args: As in `nn.Linear`.
        kwargs: As in `nn.Linear`.

    Attributes:
        filter_mask: Bool [K]: the outputs that are computed. A dead one is exactly 0, bias included.
        kernel_mask: Bool [K, C]: the weights that are used.
        input_mask: Bool [C]: the inputs that are read.
        hard_mask: Bool [K], False = dead for good. Such a filter is dead in filter_mask too, and its weights get no
            gradient even when `weight_grad` is "dense".
        plain_class: The class that `restore` makes of the layer. A subclass with a forward of its own sets it.

    Examples:
        >>> layer = pk.MaskedLinear(16, 8)
        >>> layer.set_masks(filter=torch.arange(8) > 3)
        >>> y = layer(torch.randn(2, 5, 16))
        >>> tuple(y.shape), y[..., :4].any().item()
        ((2, 5, 8), False)
    """

    plain_class: type[nn.Module] = nn.Linear
    _called = "MaskedLinear"
    weight: nn.Parameter
    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._init_masks()

    @property
    def out_channels(self) -> int:  # type: ignore[override]
        """K: `out_features` under the name that all layers with filters have.

        Examples:
            >>> pk.MaskedLinear(4, 8).out_channels
            8
        """
        return self.out_features

    @property
    def in_channels(self) -> int:  # type: ignore[override]
        """C: `in_features` under the name that all layers with filters have.

        Examples:
            >>> pk.MaskedLinear(4, 8).in_channels
            4
        """
        return self.in_features

    @property
    def groups(self) -> int:  # type: ignore[override]
        """1

        Examples:
            >>> pk.MaskedLinear(4, 8).groups
            1
        """
        return 1

    @property
    def plan(self) -> LayerPlan | None:
        """The plan of each direction, for the size and dtype of the last input under the present masks.

        Returns:
            A `prunekernels.plan.LayerPlan`, of a 1x1 convolution of the same size; None if the layer has not run yet.

        Examples:
            >>> layer = pk.MaskedLinear(4, 8)
            >>> y = layer(torch.randn(2, 4))
            >>> layer.plan.forward  # nothing is dead
            'dense'
        """
        if self._last_input is None:
            return None
        self._refresh_if_edited()
        size, stride, dtype = self._last_input
        x = self._as_image(torch.empty_strided(size, stride, dtype=dtype, device="meta"))
        grad_table = self._mask_table if self._weight_grad == "masked" else self._grad_table
        stride, padding, dilation, groups = _POINTWISE
        problem = ((*stride, *padding, *dilation), groups, dtype, suggest_memory_format(x))
        return LayerPlan.choose(x.shape, (*self.weight.shape, 1, 1), self._mask_table, grad_table, *problem)

    def forward(self, input: Tensor) -> Tensor:
        """The masked layer. input [..., C], plain or live -> [..., K]."""
        if is_traced_by_fx(input):
            return as_leaf(self, input, MaskedLinear.forward)
        if is_exported():
            return self._masked_forward(input)
        if is_recorded_or_transformed():
            input = input.to_dense() if isinstance(input, LiveTensor) else input  # alone, as in MaskedConv2d
            return self._masked_forward(input)
        self._bring_up_to_date()
        last = channels_last_of(input)
        if last is None and isinstance(input, FilledTensor):
            input = input.unfilled("linear")
        if (self._flow or last or type(input) is LiveTensor) and can_flow(last[0] if last else input):
            return _live_linear(self, input, last)
        return self._full_forward(input.to_dense() if isinstance(input, LiveTensor) else input)

    def _masked_forward(self, input: Tensor) -> Tensor:
        weight, bias = self._computed_weight(), self.bias
        if is_exported():  # torch's own operators, as pk.restore leaves the layer
            filters, kernels, inputs = self._exported_masks()
            weight = zeroed(kernels & filters[:, None] & inputs, weight)
            return F.linear(input, weight, None if bias is None else zeroed(filters, bias))
        if input.dim() < 1 or input.shape[-1] != self.in_features:
            raise ValueError(f"MaskedLinear: input: expected [..., {self.in_features}], got {list(input.shape)}")
        x, weight, table = self._as_image(input), weight[:, :, None, None], self._mask_table
        if is_transformed():  # by the masks, not by the table: functional_call may have put in others, maybe batched
            y = transformed_conv2d(x, weight, bias, self._live_tensors(), self._grad_scale, *_POINTWISE)
        else:
            grad_table = table if self._weight_grad == "masked" else self._grad_table
            y = conv2d_with_tables(x, weight, bias, table, grad_table, self._grad_scale, *_POINTWISE)
        return y.permute(0, 2, 3, 1).reshape(*input.shape[:-1], self.out_features)

    @staticmethod
    def _as_image(x: Tensor) -> Tensor:
        """[..., C] as an image [1, C, 1, M] in channels_last, without a copy where x is contiguous."""
        pixels = x.shape[:-1].numel()
        return x.reshape(min(1, pixels), 1, max(1, pixels), x.shape[-1]).permute(0, 3, 1, 2)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> MaskedLinear:
        """A masked layer that shares the parameters of a plain one, which stays as it is.

        Args:
            linear: An `nn.Linear`. `prunekernels.convert` with linears=True serves more: subclasses, and weights that
                are computed.

        Returns:
            A `MaskedLinear` with everything live.

        Examples:
            >>> linear = torch.nn.Linear(4, 8)
            >>> pk.MaskedLinear.from_linear(linear).weight is linear.weight
            True
        """
        _check_plain("MaskedLinear.from_linear: linear", linear, nn.Linear)
        return cls._over(linear)

    def to_linear(self) -> nn.Linear:
        """A plain layer with copies of the parameters, in which dead weights and biases are zero.

        Returns:
            An `nn.Linear` that computes the same.

        Examples:
            >>> layer = pk.MaskedLinear(4, 8)
            >>> layer.set_masks(filter=torch.arange(8) > 3)
            >>> layer.to_linear().weight[:4].any().item()
            False
        """
        return self._to_plain("MaskedLinear.to_linear", nn.Linear)


def _live_linear(layer: MaskedLinear, x: Tensor, last: tuple[Tensor, LiveList] | None) -> Tensor:
    """layer(x) in live mode. x: live or plain; last: the live channels of its last dimension, if it has such."""
    compact, live = last or (x, None)
    if layer._forward_hooks or (last is None and type(x) is LiveTensor) or compact.dim() < 2:
        reason = "a forward hook" if layer._forward_hooks else "channels in dimension 1"
        return _at_full_width(layer, x, reason if x.dim() > 1 else "an input of one dimension")
    if (compact.shape[-1] if live is None else live.channels) != layer.in_features:
        raise ValueError(f"MaskedLinear: input: expected [..., {layer.in_features}], got {list(x.shape)}")
    if layer._mask_table.is_meta:
        return layer._full_forward(x)
    lowered = lowered_for(layer, live)
    if isinstance(lowered, FullWidth):
        y = _at_full_width(layer, x, lowered.reason)
        return wrap_last(y if lowered.out.full else y.index_select(-1, lowered.out.rows(y.device)), lowered.out)
    return wrap_last(_small_linear(layer, compact, lowered), lowered.out)


def _at_full_width(layer: MaskedLinear, x: Tensor, reason: str) -> Tensor:
    """The layer in masked mode where live mode does not serve, recorded as a fallback."""
    fallbacks.record(f"linear ({reason})")
    return layer._full_forward(x.to_dense() if isinstance(x, LiveTensor) else x)


def _small_linear(layer: MaskedLinear, x: Tensor, small: Lowered) -> Tensor:
    """x [..., live] -> [..., small.out.count]."""
    weight, bias, scale = small_parameters(layer, small, layer._computed_weight()[:, :, None, None])
    if small.table is None and scale is None:
        return F.linear(x, weight[:, :, 0, 0], bias)
    table = small.all_live if small.table is None else small.table
    grad_table = small.all_live if small.grad_table is None else small.grad_table
    y = conv2d_with_tables(layer._as_image(x), weight, bias, table, grad_table, scale, *_POINTWISE, small=True)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], small.filters)
