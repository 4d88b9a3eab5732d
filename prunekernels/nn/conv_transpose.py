"""MaskedConvTranspose2d: nn.ConvTranspose2d whose dead filters, channels and kernels cost nothing.

A transposed convolution computes what the gradient of a convolution's input is, so the operators of that convolution
serve, with roles exchanged: its filters are the input channels here, its input channels the filters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from .. import transposed
from ..functional import check_conv
from ..live import LiveList, LiveTensor, fallbacks
from ..live.channel_list import outlives_lists
from ..live.conv import FullWidth, SmallTransposed, lower_transposed
from ..live.tensor import FilledTensor, can_flow, wrap
from ..ops import mask_table, transforms
from ..ops.autograd import ops
from ..ops.transforms import is_recorded_or_transformed, is_transformed
from ..plan import LayerPlan
from .conv import _layer_masks, lowered_for
from .mask_buffers import _check_plain
from .masked_filters import MaskedFilters
from .tracing import as_leaf, is_exported, is_traced_by_fx, zeroed


class MaskedConvTranspose2d(MaskedFilters, nn.ConvTranspose2d):
    """nn.ConvTranspose2d in which dead filters, input channels and kernels are skipped, forward and backward.

    Weight, bias and their state-dict keys are those of `nn.ConvTranspose2d`, the masks those of `MaskedConv2d`: a
    filter is what computes one output channel, weight[:, k] where groups is 1.

    Args:
        args: As in `nn.ConvTranspose2d`.
        kwargs: As in `nn.ConvTranspose2d`.

    Attributes:
        filter_mask: Bool [K]: the filters that are computed. The output of a dead one is exactly 0, bias included.
        kernel_mask: Bool [K, C / groups]: the kernels (one filter, one input channel) that are computed.
        input_mask: Bool [C]: the input channels that are read.
        hard_mask: Bool [K], False = dead for good. Such a filter is dead in filter_mask too, and its weights get no
            gradient even when `weight_grad` is "dense".
        plain_class: The class that `restore` makes of the layer. A subclass with a forward of its own sets it.

    Examples:
        >>> layer = pk.MaskedConvTranspose2d(16, 8, 2, stride=2)
        >>> layer.set_masks(filter=torch.arange(8) > 3)
        >>> y = layer(torch.randn(2, 16, 5, 5))
        >>> tuple(y.shape), y[:, :4].any().item()
        ((2, 8, 10, 10), False)
    """

    plain_class: type[nn.Module] = nn.ConvTranspose2d
    _called = "MaskedConvTranspose2d"
    _own_state = (*MaskedFilters._own_state, "_exchanged_table", "_exchanged_grad_table")
    weight: nn.Parameter
    bias: nn.Parameter | None
    in_channels: int
    out_channels: int
    groups: int
    _exchanged_table: Tensor  # the mask table of the convolution that the operators compute with
    _exchanged_grad_table: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._init_masks()

    def _init_masks(self) -> None:
        words, device = mask_table.words(self.in_channels, self.out_channels, self.groups), self._device_of_parameters()
        # Of fixed size, written in place, as the tables of the other layers are.
        self._exchanged_table = torch.zeros(words, dtype=torch.int32, device=device)
        self._exchanged_grad_table = self._exchanged_table.clone()
        super()._init_masks()

    def _derive(self) -> None:
        super()._derive()
        tables = self._weight_table(self._mask_table), self._weight_table(self._grad_table)
        if tables[0].device == self._exchanged_table.device:
            self._exchanged_table.copy_(tables[0])
            self._exchanged_grad_table.copy_(tables[1])
        else:
            self._exchanged_table, self._exchanged_grad_table = tables

    def _weight_table(self, table: Tensor) -> Tensor:
        return transposed.exchanged_table(table, self.out_channels, self.in_channels, self.groups)

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.in_channels, self.out_channels // self.groups, *self.kernel_size)

    def _like_weight(self, kernels: Tensor) -> Tensor:
        return mask_table.exchanged(kernels, self.groups)[:, :, None, None]

    def filters_first(self, tensor: Tensor) -> Tensor:
        return mask_table.exchanged(tensor, self.groups)

    @property
    def plan(self) -> LayerPlan | None:
        """The plan of each direction, for the size, layout and dtype of the last input under the present masks.

        Returns:
            A `prunekernels.plan.LayerPlan`; None if the layer has not run yet.

        Examples:
            >>> layer = pk.MaskedConvTranspose2d(4, 8, 3)
            >>> y = layer(torch.randn(2, 4, 6, 6))
            >>> layer.plan.forward  # nothing is dead
            'dense'
        """
        if self._last_input is None:
            return None
        self._refresh_if_edited()
        size, stride, dtype = self._last_input
        x = torch.empty_strided(size, stride, dtype=dtype, device="meta")
        x = x if x.dim() == 4 else x.unsqueeze(0)
        shape = transposed.output_shape(x, self.weight, self._geometry(x, None))
        geometry = (*self.stride, *self.padding, *self.dilation)  # type: ignore[misc]
        grad_table = self._exchanged_table if self._weight_grad == "masked" else self._exchanged_grad_table
        problem = (geometry, self.groups, dtype, suggest_memory_format(x))
        found = LayerPlan.choose(shape, self.weight.shape, self._exchanged_table, grad_table, *problem)
        return LayerPlan(found.grad_input, found.forward, found.grad_weight)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The masked layer. input [N, C, H, W] or [C, H, W], plain or live -> [N, K, P, Q] or [K, P, Q]."""
        if is_traced_by_fx(input):
            return as_leaf(self, input, MaskedConvTranspose2d.forward, *([] if output_size is None else [output_size]))
        if is_exported():
            return self._masked_forward(input, output_size)
        if is_recorded_or_transformed():
            input = input.to_dense() if isinstance(input, LiveTensor) else input  # alone, as in MaskedConv2d
            return self._masked_forward(input, output_size)
        self._bring_up_to_date()
        if isinstance(input, FilledTensor):
            input = input.unfilled("conv_transpose2d")
        if (self._flow or type(input) is LiveTensor) and can_flow(input):
            return _live_forward(self, input, output_size)
        return self._full_forward(input.to_dense() if isinstance(input, LiveTensor) else input, output_size)

    def _masked_forward(self, input: Tensor, output_size: list[int] | None) -> Tensor:
        weight, bias = self._computed_weight(), self.bias
        geometry = self._geometry(input, output_size)
        if is_exported():  # torch's own operators, as pk.restore leaves the layer
            filters, kernels, inputs = self._exported_masks()
            weight = zeroed(self._like_weight(self._live_kernels(filters, kernels, inputs)), weight)
            return F.conv_transpose2d(input, weight, None if bias is None else zeroed(filters, bias), *geometry)
        check_conv("MaskedConvTranspose2d", input, self.filters_first(weight), bias, self.groups)
        scale = self._grad_scale
        if is_transformed() or not geometry.is_gradient():
            return transforms.masked_conv_transpose2d(input, weight, bias, self._live_tensors(), scale, *geometry)
        x = input if input.dim() == 4 else input.unsqueeze(0)
        filters = mask_table.live_filters(self._mask_table, self.out_channels)
        grad_table = None if self._weight_grad == "masked" else self._exchanged_grad_table
        y = transposed.masked(x, weight, bias, filters, self._exchanged_table, grad_table, scale, geometry)
        return y if input.dim() == 4 else y.squeeze(0)

    def _live_kernels(self, filters: Tensor, kernels: Tensor, inputs: Tensor) -> Tensor:
        """bool [K, C / groups]: kernels that all masks leave."""
        per_group = inputs.view(self.groups, 1, -1).expand(-1, self.out_channels // self.groups, -1)
        return kernels & filters[:, None] & per_group.reshape(self.out_channels, -1)

    def _geometry(self, x: Tensor, output_size: Sequence[int] | None) -> transposed.Geometry:
        about: Any = (self.stride, self.padding, self.kernel_size, 2, self.dilation)
        extra = self._output_padding(x, None if output_size is None else list(output_size), *about)
        return transposed.Geometry(self.stride, self.padding, extra, self.groups, self.dilation)  # type: ignore

    @classmethod
    def from_conv(cls, conv: nn.ConvTranspose2d) -> MaskedConvTranspose2d:
        """A masked layer that shares the parameters of a plain one, which stays as it is.

        Args:
            conv: An `nn.ConvTranspose2d`. `prunekernels.convert` serves more: subclasses, and weights that are
                computed.

        Returns:
            A `MaskedConvTranspose2d` with everything live.

        Examples:
            >>> conv = torch.nn.ConvTranspose2d(4, 8, 3)
            >>> pk.MaskedConvTranspose2d.from_conv(conv).weight is conv.weight
            True
        """
        _check_plain("MaskedConvTranspose2d.from_conv: conv", conv, nn.ConvTranspose2d)
        return cls._over(conv)

    def to_conv(self) -> nn.ConvTranspose2d:
        """A plain layer with copies of the parameters, in which dead weights and biases are zero.

        Returns:
            An `nn.ConvTranspose2d` that computes the same.

        Examples:
            >>> layer = pk.MaskedConvTranspose2d(4, 8, 3)
            >>> layer.set_masks(filter=torch.arange(8) > 3)
            >>> layer.to_conv().weight[:, :4].any().item()
            False
        """
        return self._to_plain("MaskedConvTranspose2d.to_conv", nn.ConvTranspose2d)


def _live_forward(layer: MaskedConvTranspose2d, x: Tensor, output_size: list[int] | None) -> Tensor:
    """layer(x) in live mode. x: live or plain."""
    compact, live = (x.compact, x.live) if type(x) is LiveTensor else (x, None)
    if layer._forward_hooks or compact.dim() != 4:
        reason = "a forward hook" if layer._forward_hooks else "an input that is not 4-D"
        return _at_full_width(layer, x, output_size, reason)
    if (compact.shape[1] if live is None else live.channels) != layer.in_channels:
        raise ValueError(f"MaskedConvTranspose2d: input: expected {layer.in_channels} channels, got {list(x.shape)}")
    if layer._mask_table.is_meta:
        return layer._full_forward(x, output_size)
    found = _lowered_for(layer, live)
    geometry = layer._geometry(compact, output_size)
    if isinstance(found, FullWidth) or not geometry.is_gradient():
        reason = found.reason if isinstance(found, FullWidth) else "output_padding beyond the stride"
        y = _at_full_width(layer, x, output_size, reason)
        return y if found.out.full else wrap(ops.gather_channels(y, found.out.index(y.device)), found.out)
    return wrap(_small_forward(layer, compact, found, geometry), found.out)


def _lowered_for(layer: MaskedConvTranspose2d, live: LiveList | None) -> SmallTransposed | FullWidth:
    """How a layer under its present masks serves an input with these live channels (None: all); made once, kept."""
    if layer.groups > 1:
        filters = layer.filter_mask & layer.hard_mask
        return FullWidth("groups", LiveList.of_mask(filters).widened())
    lowered = lowered_for(layer, live)
    if isinstance(lowered, FullWidth):
        return lowered
    key: Any = (live, layer._mask_table.device, layer._align, "exchanged")
    if key not in layer._lowered:
        with torch.inference_mode(False), torch.no_grad():  # its tensors outlive the mode that they are made in
            made = lower_transposed(_layer_masks(layer), live or LiveList.all(layer.in_channels), lowered)
        layer._lowered[key] = made
    found: SmallTransposed = layer._lowered[key]
    return found


def _at_full_width(layer: MaskedConvTranspose2d, x: Tensor, output_size: list[int] | None, reason: str) -> Tensor:
    """The layer in masked mode where live mode does not serve, recorded as a fallback."""
    fallbacks.record(f"conv_transpose2d ({reason})")
    return layer._full_forward(x.to_dense() if type(x) is LiveTensor else x, output_size)


def _small_forward(
    layer: MaskedConvTranspose2d, x: Tensor, small: SmallTransposed, geometry: transposed.Geometry
) -> Tensor:
    """x [N, live, H, W] -> [N, small.out.count, P, Q]."""
    weight: Tensor = layer._computed_weight()
    bias: Tensor | None = layer.bias
    scale = layer._grad_scale
    if small.pick is not None:
        weight = ops.pack_weight(weight, *small.pick)
    if not small.out.full:
        rows = small.out.rows(weight.device)
        bias, scale = (None if t is None else t.index_select(0, rows) for t in (bias, scale))
    if small.padding is not None:
        kernels, filters = (outlives_lists(each) for each in small.padding)
        weight, bias = zeroed(kernels.transpose(0, 1), weight), None if bias is None else zeroed(filters, bias)
    if small.table is None and scale is None:
        return F.conv_transpose2d(x, weight, bias, *geometry)
    return transposed.masked(x, weight, bias, small.filters, small.table, small.grad_table, scale, geometry)
