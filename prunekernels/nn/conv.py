"""MaskedConv2d: nn.Conv2d whose dead filters, channels and kernels cost nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from ..functional import check_conv, conv2d_with_tables, pad_string, transformed_conv2d
from ..live import LiveList, LiveTensor, fallbacks
from ..live.channel_list import align_of, outlives_lists
from ..live.conv import FullWidth, LayerMasks, Lowered, lower
from ..live.tensor import FilledTensor, can_flow, wrap
from ..ops.autograd import ops
from ..ops.transforms import is_recorded_or_transformed, is_transformed
from ..plan import LayerPlan, has_other_plans
from .mask_buffers import _check_plain
from .masked_filters import MaskedFilters
from .tracing import as_leaf, is_exported, is_traced_by_fx, zeroed

_MAX_LOWERED = 64  # of a layer: the lists that arrive change with the masks of the layers before it


class MaskedConv2d(MaskedFilters, nn.Conv2d):
    """nn.Conv2d in which dead filters, input channels and kernels are skipped, forward and backward.

    Weight, bias and their state-dict keys are those of `nn.Conv2d`. The masks are bool, True = live; a new layer has
    everything live. Change them with `set_masks`. In buffers and state dicts they are float32, 1 = live. A state dict
    has zeros in dead entries of weight and bias.

    Args:
        args: As in `nn.Conv2d`.
        kwargs: As in `nn.Conv2d`.

    Attributes:
        filter_mask: Bool [K]: the filters that are computed. The output of a dead one is exactly 0, bias included.
        kernel_mask: Bool [K, C / groups]: the kernels (one filter, one input channel) that are computed.
        input_mask: Bool [C]: the input channels that are read.
        hard_mask: Bool [K], False = dead for good. Such a filter is dead in filter_mask too, and its weights get no
            gradient even when `weight_grad` is "dense".
        plain_class: The class that `restore` makes of the layer. A subclass with a forward of its own sets it.

    Examples:
        >>> layer = pk.MaskedConv2d(64, 128, 3, padding=1)
        >>> layer.set_masks(filter=torch.arange(128) % 2 == 0)
        >>> y = layer(torch.randn(8, 64, 14, 14))
        >>> tuple(y.shape), y[:, 1::2].any().item()
        ((8, 128, 14, 14), False)
    """

    plain_class: type[nn.Module] = nn.Conv2d
    _called = "MaskedConv2d"
    in_channels: int
    out_channels: int
    groups: int
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._init_masks()

    @property
    def plan(self) -> LayerPlan | None:
        """The plan of each direction, for the size, layout and dtype of the last input under the present masks.

        Returns:
            A `prunekernels.plan.LayerPlan`; None if the layer has not run yet.

        Examples:
            >>> layer = pk.MaskedConv2d(4, 8, 3)
            >>> y = layer(torch.randn(2, 4, 6, 6))
            >>> layer.plan.forward  # nothing is dead
            'dense'
        """
        if self._last_input is None:
            return None
        self._refresh_if_edited()
        size, stride, dtype = self._last_input
        x, padding = self._pad(torch.empty_strided(size, stride, dtype=dtype, device="meta"))
        if isinstance(padding, str):
            x, padding = pad_string("MaskedConv2d", x, padding, self.kernel_size, self.stride, self.dilation)
        x = x if x.dim() == 4 else x.unsqueeze(0)
        geometry = (*self.stride, *padding, *self.dilation)
        grad_table = self._mask_table if self._weight_grad == "masked" else self._grad_table
        problem = (geometry, self.groups, dtype, suggest_memory_format(x))
        return LayerPlan.choose(x.shape, self.weight.shape, self._mask_table, grad_table, *problem)

    def forward(self, input: Tensor) -> Tensor:
        """The masked convolution. input [N, C, H, W] or [C, H, W], plain or live -> [N, K, P, Q] or [K, P, Q]."""
        if is_traced_by_fx(input):
            return as_leaf(self, input, MaskedConv2d.forward)
        if is_exported():  # whether anything is dead may be unknown
            return self._masked_forward(input)
        if is_recorded_or_transformed():
            # In a statement of its own, since a compiled graph breaks here: behind a break torch 2.8 compiles again for
            # each bound method that was about to be called.
            input = input.to_dense() if isinstance(input, LiveTensor) else input
            return self._masked_forward(input)
        self._bring_up_to_date()
        if isinstance(input, FilledTensor):
            input = input.unfilled("conv2d")
        if (self._flow or type(input) is LiveTensor) and can_flow(input):
            return live_conv(self, input)
        return self._full_forward(input.to_dense() if isinstance(input, LiveTensor) else input)

    def _masked_forward(self, input: Tensor) -> Tensor:
        weight, bias = self._computed_weight(), self.bias
        if is_exported():
            return self._exported_conv(input, weight, bias)
        check_conv("MaskedConv2d", input, weight, bias, self.groups)
        input, padding = self._pad(input)
        table, scale = self._mask_table, self._grad_scale
        if is_transformed():  # by the masks, not by the table: functional_call may have put in others, maybe batched
            geometry = (self.stride, padding, self.dilation, self.groups)
            return transformed_conv2d(input, weight, bias, self._live_tensors(), scale, *geometry)
        grad_table = table if self._weight_grad == "masked" else self._grad_table
        return conv2d_with_tables(
            input, weight, bias, table, grad_table, scale, self.stride, padding, self.dilation, self.groups
        )

    def _exported_conv(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer in torch's own operators: a convolution with zeros for what is dead, as pk.restore leaves it."""
        filters, kernels, inputs = self._exported_masks()
        per_group = inputs.view(self.groups, 1, -1).expand(-1, self.out_channels // self.groups, -1)
        kernels = kernels & filters[:, None] & per_group.reshape(kernels.shape)
        weight, bias = zeroed(kernels[:, :, None, None], weight), None if bias is None else zeroed(filters, bias)
        return nn.Conv2d._conv_forward(self, x, weight, bias)

    def _pad(self, x: Tensor) -> tuple[Tensor, str | Sequence[int]]:
        """x padded according to padding_mode, and the padding that is left to the convolution."""
        if self.padding_mode == "zeros":
            return x, self.padding
        return F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0, 0)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> MaskedConv2d:
        """A masked layer that shares the parameters of a plain convolution, which stays as it is.

        Args:
            conv: An `nn.Conv2d`. `prunekernels.convert` serves more: subclasses, and weights that are computed.

        Returns:
            A `MaskedConv2d` with everything live.

        Examples:
            >>> conv = torch.nn.Conv2d(4, 8, 3)
            >>> pk.MaskedConv2d.from_conv(conv).weight is conv.weight
            True
        """
        _check_plain("MaskedConv2d.from_conv: conv", conv, nn.Conv2d)
        return cls._over(conv)

    def to_conv(self) -> nn.Conv2d:
        """A plain convolution with copies of the parameters, in which dead weights and biases are zero.

        Returns:
            An `nn.Conv2d` that computes the same.

        Examples:
            >>> layer = pk.MaskedConv2d(4, 8, 3)
            >>> layer.set_masks(filter=torch.arange(8) > 3)
            >>> layer.to_conv().weight[:4].any().item()
            False
        """
        return self._to_plain("MaskedConv2d.to_conv", nn.Conv2d)


def live_conv(layer: MaskedConv2d, x: Tensor) -> Tensor:
    """layer(x) in live mode. x: live or plain."""
    compact, live = (x.compact, x.live) if type(x) is LiveTensor else (x, None)  # a live tensor's own shape costs 2 us
    if layer._forward_hooks or compact.dim() != 4:
        return _at_full_width(layer, x, "a forward hook" if layer._forward_hooks else "an input that is not 4-D")
    if (compact.shape[1] if live is None else live.channels) != layer.in_channels:
        raise ValueError(f"MaskedConv2d: input: expected {layer.in_channels} channels, got {list(x.shape)}")
    if layer._mask_table.is_meta:
        return layer._full_forward(x)
    lowered = lowered_for(layer, live)
    if isinstance(lowered, FullWidth):
        y = _at_full_width(layer, x, lowered.reason)
        return y if lowered.out.full else wrap(ops.gather_channels(y, lowered.out.index(y.device)), lowered.out)
    return wrap(_small_conv(layer, compact, lowered), lowered.out)


def lowered_for(layer: MaskedFilters, live: LiveList | None) -> Lowered | FullWidth:
    """How a layer under its present masks serves an input with these live channels (None: all); made once, kept."""
    key = (live, layer._mask_table.device, layer._align)
    lowered: Lowered | FullWidth | None = layer._lowered.get(key)
    if lowered is None:
        if len(layer._lowered) >= _MAX_LOWERED:
            layer._lowered.clear()
        with torch.inference_mode(False), torch.no_grad():  # its tensors outlive the mode that they are made in
            lowered = layer._lowered[key] = lower(_layer_masks(layer), live or LiveList.all(layer.in_channels))
    return lowered


def _layer_masks(layer: MaskedFilters) -> LayerMasks:
    """What lower() needs to know of a layer, its masks brought to the host."""
    masks = (layer.filter_mask & layer.hard_mask, layer.hard_mask, layer.kernel_mask, layer.input_mask)
    filters, hard, kernels, inputs = (mask.detach().cpu().numpy() for mask in masks)
    dense_grad = layer.weight_grad == "dense"
    has_bias, device = layer.bias is not None, layer.filter_mask.device
    align = align_of(device, layer._align)
    return LayerMasks(filters, hard, kernels, inputs, layer.groups, has_bias, dense_grad, device, align)


def _at_full_width(layer: MaskedConv2d, x: Tensor, reason: str) -> Tensor:
    """The layer in masked mode where live mode does not serve, recorded as a fallback."""
    fallbacks.record(f"conv2d ({reason})")
    return layer._full_forward(x.to_dense() if type(x) is LiveTensor else x)


def _small_conv(layer: MaskedConv2d, x: Tensor, small: Lowered) -> Tensor:
    """x [N, live, H, W] -> [N, small.out.count, P, Q]."""
    weight, bias, scale = small_parameters(layer, small, layer._computed_weight())
    if small.remap is not None:
        x = ops.regroup_channels(x, *small.remap)
    x, padding = layer._pad(x)
    if small.table is None and scale is None and not has_other_plans(x, small.groups):
        y = F.conv2d(x, weight, bias, layer.stride, padding, layer.dilation, small.groups)
    else:
        table = small.all_live if small.table is None else small.table
        grad_table = small.all_live if small.grad_table is None else small.grad_table
        geometry = (layer.stride, padding, layer.dilation, small.groups)
        y = conv2d_with_tables(x, weight, bias, table, grad_table, scale, *geometry, small=True)
    even = small.evened
    return y if even is None or even.result is None else ops.regroup_channels(y, *even.result)


def small_parameters(
    layer: MaskedFilters, small: Lowered, weight: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weight, bias and grad_scale of the small convolution. weight: of the layer, [K, C / groups, R, S]."""
    bias: Tensor | None = layer.bias
    scale, even = layer._grad_scale, small.evened
    if even is not None:
        kernels = ops.regroup_channels(weight.flatten(0, 1).unsqueeze(0), *even.weight)
        weight = kernels.reshape(small.filters, small.channels // small.groups, *weight.shape[2:])
        bias, scale = (
            None if t is None else ops.regroup_channels(t.view(1, -1, 1, 1), *even.filters).flatten()
            for t in (bias, scale)
        )
        return weight, bias, scale
    if small.pick is not None:
        weight = ops.pack_weight(weight, *small.pick)
    if not small.out.full and (bias is not None or scale is not None):
        rows = small.out.rows(weight.device)
        bias = bias if bias is None else bias.index_select(0, rows)
        scale = scale if scale is None else scale.index_select(0, rows)
    if small.padding is not None:
        kernels, filters = (outlives_lists(each) for each in small.padding)
        weight, bias = zeroed(kernels, weight), None if bias is None else zeroed(filters, bias)
    return weight, bias, scale
