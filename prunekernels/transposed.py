"""Masked transposed convolutions, by the operators of the convolution whose input gradient they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from . import plan
from .masks import make_table
from .ops import mask_table
from .ops.autograd import ops


class Geometry(NamedTuple):
    """What F.conv_transpose2d takes behind the bias, in its order."""

    stride: Sequence[int]
    padding: Sequence[int]
    output_padding: Sequence[int]
    groups: int
    dilation: Sequence[int]

    def is_gradient(self) -> bool:
        """Whether the result has the size of an input of the convolution: rows that it never reads are too many."""
        return all(extra < step for extra, step in zip(self.output_padding, self.stride, strict=True))


def exchanged_table(table: Tensor, K: int, C: int, groups: int) -> Tensor:
    """The mask table of the convolution with K and C exchanged: the same kernels are live."""
    kernels = mask_table.live_kernels(table, K, C, C // groups)
    return make_table(None, mask_table.exchanged(kernels, groups).contiguous(), None, C, K, groups)


def output_shape(x: Tensor, weight: Tensor, geometry: Geometry) -> list[int]:
    """[N, K, P, Q]"""
    size = [x.shape[0], weight.shape[1] * geometry.groups]
    for i in range(2):
        reach = geometry.dilation[i] * (weight.shape[2 + i] - 1) + geometry.output_padding[i] + 1
        size.append((x.shape[2 + i] - 1) * geometry.stride[i] - 2 * geometry.padding[i] + reach)
    return size


def masked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    filters: Tensor | None,
    table: Tensor | None,
    grad_table: Tensor | None,
    scale: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """[N, C, H, W] -> [N, K, P, Q], work skipped.

    filters: bool [K], those that have a bias; None: all. table: the mask table with roles exchanged. grad_table: that
    of the weight's gradient, if it is another one. scale: float32 [K], of the weight's gradient.
    """
    x, weight, bias = _autocast(x, weight, bias)
    size = output_shape(x, weight, geometry)
    options = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    if grad_table is None and scale is None:
        y = _forward(x, weight, table, size, options)
    else:
        factors = None
        if scale is not None:  # by kernel, as the weight has them
            by_filter = scale[:, None].expand(-1, len(weight) // geometry.groups)
            factors = mask_table.exchanged(by_filter, geometry.groups)
        y = _OwnGradient.apply(x, weight, table, table if grad_table is None else grad_table, factors, size, options)
    if bias is None:
        return y
    return y.add_((bias if filters is None else torch.where(filters, bias, 0)).view(-1, 1, 1))


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands as autocast casts those of conv_transpose2d."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)

    def narrow(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    return narrow(x), narrow(weight), None if bias is None else narrow(bias)


def _forward(x: Tensor, weight: Tensor, table: Tensor | None, size: Any, options: Any) -> Tensor:
    channels_last = suggest_memory_format(x) == torch.channels_last
    y: Tensor = ops.masked_conv2d_grad_input(x, weight, table, size, channels_last, *options, plan.current())
    return y


class _OwnGradient(torch.autograd.Function):
    """A masked transposed convolution whose weight has the gradient that another mask table, or factors, ask for."""

    @staticmethod
    def forward(ctx, x, weight, table, grad_table, factors, size, options):
        ctx.save_for_backward(x, weight, table, grad_table, factors)
        ctx.options = options
        return _forward(x, weight, table, size, options)

    @staticmethod
    def backward(ctx, grad):
        x, weight, table, grad_table, factors = ctx.saved_tensors
        options = (*ctx.options, plan.current())
        to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            to_x = ops.masked_conv2d(grad, weight, None, table, table, None, *options)
        if ctx.needs_input_grad[1]:
            to_weight = ops.masked_conv2d_grad_weight(x, grad, weight, grad_table, None, *options)
            if factors is not None:
                by_kernel = factors.to(to_weight.dtype)[:, :, None, None]
                to_weight = torch.where(by_kernel == 0, 0, to_weight * by_kernel)
        return to_x, to_weight, None, None, None, None, None
