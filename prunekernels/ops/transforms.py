"""The operators as compositions of torch's own, for torch.func (grad, vmap, jvp, ...) and forward-mode AD.

Those cannot differentiate or batch an autograd function that is written in C++. What is here has the same numbers at
full width, and any transform, or several inside each other, can go through it. Masks may be batched too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import mask_table


def is_transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode AD, is in force."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_recorded_or_transformed() -> bool:
    """Whether what runs now is not the computation itself: torch compiles, exports or transforms it.

    A layer then reads its masks from tensors alone: a Python value that follows from a mask would become a constant of
    the compiled code, which would be compiled again at every change of the mask.
    """
    return torch.compiler.is_compiling() or is_transformed()


class ConvLive(NamedTuple):
    """What is live in a convolution; None: everything."""

    filters: Tensor | None = None  # bool [K]; these, and all below, may be batched
    kernels: Tensor | None = None  # bool [K, C / groups] or [K, 1]: what all masks leave
    channels: Tensor | None = None  # bool [C]: read, forward or by the gradient of the weight
    grad_kernels: Tensor | None = None  # the same: what gets a gradient
    dense_grad: bool = False  # whether grad_kernels differ from kernels

    @staticmethod
    def of_masks(
        filter_mask: Tensor | None,
        kernel_mask: Tensor | None,
        input_mask: Tensor | None,
        K: int,
        C: int,
        groups: int,
        *,
        dense_grad: bool,
        hard_mask: Tensor | None = None,
    ) -> ConvLive:
        """What masks say. filter_mask: hard_mask, which matters to dense gradients alone, is part of it already."""
        inputs = None
        if input_mask is not None:
            inputs = input_mask.view(groups, 1, -1).expand(groups, K // groups, -1).reshape(K, -1)
        kernels = _both(_both(inputs, kernel_mask), None if filter_mask is None else filter_mask.view(K, 1))
        if dense_grad:
            grad_kernels = _both(inputs, None if hard_mask is None else hard_mask.view(K, 1))
            return ConvLive(filter_mask, kernels, input_mask, grad_kernels, dense_grad=True)
        if kernels is None:
            return ConvLive()
        kernels = kernels.expand(K, C // groups)
        read = kernels.reshape(groups, K // groups, -1).any(1).reshape(C)
        return ConvLive(filter_mask, kernels, read, kernels)


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Where two masks are both live; None: everything is."""
    if a is None or b is None:
        return b if a is None else a
    return a & b


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    live: ConvLive,
    grad_scale: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The operator of this name. x: [N, C, H, W] or [C, H, W]."""
    x = _where(live.channels, x, -1, 1, 1)
    if live.dense_grad or grad_scale is not None:
        weight = _MaskedWeight.apply(weight, live.kernels, live.grad_kernels, grad_scale)
    else:
        weight = _where_kernels(live.kernels, weight)
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups)  # type: ignore[arg-type]
    if live.filters is not None:
        y = _ZeroedFilters.apply(y, live.filters) if live.dense_grad else _where(live.filters, y, -1, 1, 1)
    if bias is None:
        return y
    return y + _where(live.filters, bias, -1).to(y.dtype).view(-1, 1, 1)


def masked_conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    live: ConvLive,
    grad_scale: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
) -> Tensor:
    """A masked transposed convolution at full width. x: [N, C, H, W] or [C, H, W]; weight: [C, K / groups, R, S]."""
    x = _where(live.channels, x, -1, 1, 1)
    filters_first = mask_table.exchanged(weight, groups)  # as the masks are
    if live.dense_grad or grad_scale is not None:
        filters_first = _MaskedWeight.apply(filters_first, live.kernels, live.grad_kernels, grad_scale)
    else:
        filters_first = _where_kernels(live.kernels, filters_first)
    weight, geometry = mask_table.exchanged(filters_first, groups), (stride, padding, output_padding, groups, dilation)
    y = F.conv_transpose2d(x, weight, None, *geometry)  # type: ignore[arg-type]
    if live.filters is not None:
        y = _ZeroedFilters.apply(y, live.filters) if live.dense_grad else _where(live.filters, y, -1, 1, 1)
    return y if bias is None else y + _where(live.filters, bias, -1).to(y.dtype).view(-1, 1, 1)


def gather_channels(x: Tensor, index: Tensor) -> Tensor:
    """The operator of this name."""
    return x.index_select(1, index.long())


def scatter_channels(x: Tensor, index: Tensor, channels: int) -> Tensor:
    """The operator of this name."""
    size = (x.shape[0], channels, *x.shape[2:])
    return x.new_zeros(size).index_copy(1, index.long(), x)


def _where(live: Tensor | None, x: Tensor, *shape: int) -> Tensor:
    """x where live, viewed as this shape, is true; 0 elsewhere. live None: x."""
    return x if live is None else torch.where(live.view(*shape), x, x.new_zeros(()))


def _where_kernels(live: Tensor | None, weight: Tensor) -> Tensor:
    """weight where live, [K, C / groups], or [K, 1] where filters are live or dead as a whole."""
    return weight if live is None else torch.where(live[..., None, None], weight, weight.new_zeros(()))


class _MaskedWeight(torch.autograd.Function):
    """A weight with zeros in its dead kernels, where other kernels may get a gradient than those that are live."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight, live, grad_live, scale):
        return _where_kernels(live, weight).clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def backward(ctx, grad):
        return _MaskedWeight._of_gradient(ctx, grad), None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return _MaskedWeight._of_gradient(ctx, tangent)

    @staticmethod
    def _of_gradient(ctx, grad):
        grad_live, scale = ctx.saved_tensors
        grad = _where_kernels(grad_live, grad)
        if scale is None:
            return grad.clone()
        scale = scale.to(grad.dtype).view(-1, 1, 1, 1)
        return torch.where(scale == 0, grad.new_zeros(()), grad * scale)


class _ZeroedFilters(torch.autograd.Function):
    """A result with exact zeros in its dead filters, whose weights nevertheless get the gradient they would have."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y, filters):
        return _where(filters, y, -1, 1, 1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad, None

    @staticmethod
    def jvp(ctx, tangent, _):
        return tangent.clone()
