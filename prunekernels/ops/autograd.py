"""Fake kernels, gradients and autocast of the operators.

A masked convolution is bilinear, so the gradients of each of its three operators are the other two.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from . import extension, flop_formulas, mask_table  # noqa: F401  (registers formulas)

ops = extension.ops
_register_fake = torch.library.register_fake


def _is_channels_last(x: Tensor) -> bool:
    return suggest_memory_format(x) == torch.channels_last


def _empty(like: Tensor, size, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=layout)


# ---- shapes ---------------------------------------------------------------------------------------------------------


@_register_fake("prunekernels::conv_mask")
def _(filter_mask, kernel_mask, input_mask, out_channels, in_channels, groups):
    device = next((m.device for m in (filter_mask, kernel_mask, input_mask) if m is not None), None)
    return torch.empty(mask_table.words(out_channels, in_channels, groups), dtype=torch.int32, device=device or "cpu")


@_register_fake("prunekernels::masked_conv2d")
def _(x, weight, bias, mask, grad_mask, grad_scale, stride, padding, dilation, groups, plan):
    size = [x.shape[0], weight.shape[0]]
    for i in range(2):
        size.append((x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1)
    return _empty(x, size, _is_channels_last(x))


@_register_fake("prunekernels::masked_conv2d_grad_input")
def _(grad_out, weight, mask, x_size, channels_last, stride, padding, dilation, groups, plan):
    return _empty(grad_out, x_size, channels_last)


@_register_fake("prunekernels::masked_conv2d_grad_weight")
def _(grad_out, x, weight, mask, grad_scale, stride, padding, dilation, groups, plan):
    return _empty(weight, weight.shape, _is_channels_last(weight))


@_register_fake("prunekernels::masked_conv2d_grad_bias")
def _(grad_out, mask):
    return grad_out.new_empty(grad_out.shape[1])


@_register_fake("prunekernels::gather_channels")
def _(x, index):
    return _empty(x, (x.shape[0], index.shape[0], x.shape[2], x.shape[3]), _is_channels_last(x))


@_register_fake("prunekernels::scatter_channels")
def _(x, index, channels):
    return _empty(x, (x.shape[0], channels, x.shape[2], x.shape[3]), _is_channels_last(x))


@_register_fake("prunekernels::regroup_channels")
def _(x, index, inverse):
    return _empty(x, (x.shape[0], index.shape[0], x.shape[2], x.shape[3]), _is_channels_last(x))


@_register_fake("prunekernels::join_channels")
def _(a, b, a_index, b_index, a_inverse, b_inverse, alpha):
    size = (a.shape[0], a_index.shape[0], a.shape[2], a.shape[3])
    return _empty(a, size, _is_channels_last(a if a.shape[1] >= b.shape[1] else b))


@_register_fake("prunekernels::pack_weight")
def _(weight, mask, filters, channels):
    return _empty(weight, (filters, channels, *weight.shape[2:]), _is_channels_last(weight))


@_register_fake("prunekernels::unpack_grad_weight")
def _(grad, mask, filters, channels, channels_last):
    return _empty(grad, (filters, channels, *grad.shape[2:]), channels_last)


if extension.has_extension():  # without it MaskedBatchNorm2d uses torch's batch norm

    @_register_fake("prunekernels::masked_batch_norm")
    def _(x, weight, bias, running_mean, running_var, index, features, training, momentum, eps):
        live = x.shape[1] if index is None else index.shape[0]
        mean = x.new_empty(live, dtype=torch.float32)
        return _empty(x, x.shape, _is_channels_last(x)), mean, torch.empty_like(mean)

    @_register_fake("prunekernels::masked_batch_norm_backward")
    def _(grad, x, weight, mean, invstd, index, features, training, relu_table=None):
        return _empty(x, x.shape, _is_channels_last(x)), mean.new_empty(features), mean.new_empty(features)

    @_register_fake("prunekernels::deferred_batch_norm")
    def _(x, weight, bias, running_mean, running_var, index, features, training, momentum, eps):
        table = x.new_empty((4, x.shape[1]), dtype=torch.float32)
        return _empty(x, x.shape, _is_channels_last(x)), table, torch.empty(2, dtype=torch.int64, device="cpu")

    @_register_fake("prunekernels::apply_batch_norm_")
    def _(y, x, table, index, features, add, relu):
        return None

    @_register_fake("prunekernels::batch_norm_relu")
    def _(y, x, table, index, features, add, gate):
        return _empty(y, y.shape, _is_channels_last(y))

    @_register_fake("prunekernels::deferred_sum")
    def _(a, b):
        return _empty(a, a.shape, _is_channels_last(a))


# ---- gradients ------------------------------------------------------------------------------------------------------


def _setup_conv(ctx, inputs, output):
    x, weight, bias, mask, grad_mask, grad_scale, *ctx.conv = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, mask, grad_mask, grad_scale)
    ctx.x_size, ctx.channels_last = x.shape, _is_channels_last(x)


def _conv_backward(ctx, grad_out):
    x, weight, mask, grad_mask, grad_scale = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = ops.masked_conv2d_grad_input(grad_out, weight, mask, ctx.x_size, ctx.channels_last, *ctx.conv)
    if ctx.needs_input_grad[1]:
        grad_weight = ops.masked_conv2d_grad_weight(grad_out, x, weight, grad_mask, grad_scale, *ctx.conv)
    if ctx.needs_input_grad[2]:
        grad_bias = ops.masked_conv2d_grad_bias(grad_out, mask)
    return grad_x, grad_weight, grad_bias, *[None] * 8


def _setup_grad_input(ctx, inputs, output):
    grad_out, weight, mask, _, _, *ctx.conv = inputs
    ctx.save_for_backward(grad_out, weight, mask)


def _grad_input_backward(ctx, grad):
    grad_out, weight, mask = ctx.saved_tensors
    to_grad_out = to_weight = None
    if ctx.needs_input_grad[0]:
        to_grad_out = ops.masked_conv2d(grad, weight, None, mask, mask, None, *ctx.conv)
    if ctx.needs_input_grad[1]:
        to_weight = ops.masked_conv2d_grad_weight(grad_out, grad, weight, mask, None, *ctx.conv)
    return to_grad_out, to_weight, *[None] * 8


def _setup_grad_weight(ctx, inputs, output):
    grad_out, x, _, mask, grad_scale, *ctx.conv = inputs
    ctx.save_for_backward(grad_out, x, mask, grad_scale)


def _grad_weight_backward(ctx, grad):
    grad_out, x, mask, grad_scale = ctx.saved_tensors
    if grad_scale is not None:
        scale = grad_scale.to(grad.dtype).view(-1, 1, 1, 1)
        grad = torch.where(scale == 0, 0, grad * scale)
    to_grad_out = to_x = None
    if ctx.needs_input_grad[0]:
        to_grad_out = ops.masked_conv2d(x, grad, None, mask, mask, None, *ctx.conv)
    if ctx.needs_input_grad[1]:
        to_x = ops.masked_conv2d_grad_input(grad_out, grad, mask, x.shape, _is_channels_last(x), *ctx.conv)
    return to_grad_out, to_x, *[None] * 8


def _setup_grad_bias(ctx, inputs, output):
    grad_out, mask = inputs
    ctx.size = grad_out.shape
    ctx.save_for_backward(mask)


def _grad_bias_backward(ctx, grad):
    (mask,) = ctx.saved_tensors
    if mask is not None:
        grad = torch.where(mask_table.live_filters(mask, grad.shape[0]), grad, 0)
    return grad.view(1, -1, 1, 1).expand(ctx.size), None


def _setup_channels(ctx, inputs, output):
    ctx.channels = inputs[0].shape[1]
    ctx.save_for_backward(inputs[1])


def _gather_backward(ctx, grad):
    return ops.scatter_channels(grad, ctx.saved_tensors[0], ctx.channels), None


def _scatter_backward(ctx, grad):
    return ops.gather_channels(grad, ctx.saved_tensors[0]), None, None


def _setup_regroup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _regroup_backward(ctx, grad):
    index, inverse = ctx.saved_tensors
    return ops.regroup_channels(grad, inverse, index), None, None


def _setup_join(ctx, inputs, output):
    ctx.save_for_backward(*inputs[2:6])
    ctx.alpha = inputs[6]


def _join_backward(ctx, grad):
    a_index, b_index, a_inverse, b_inverse = ctx.saved_tensors
    grad_a = grad_b = None
    if ctx.needs_input_grad[0]:
        grad_a = ops.regroup_channels(grad, a_inverse, a_index)
    if ctx.needs_input_grad[1]:
        grad_b = ops.regroup_channels(grad, b_inverse, b_index) * ctx.alpha
    return grad_a, grad_b, *[None] * 5


def _setup_pack(ctx, inputs, output):
    weight, mask, *_ = inputs
    ctx.save_for_backward(mask)
    ctx.size, ctx.channels_last = weight.shape[:2], _is_channels_last(weight)


def _pack_backward(ctx, grad):
    return ops.unpack_grad_weight(grad, ctx.saved_tensors[0], *ctx.size, ctx.channels_last), None, None, None


def _setup_unpack(ctx, inputs, output):
    grad, mask, *_ = inputs
    ctx.save_for_backward(mask)
    ctx.size = grad.shape[:2]


def _unpack_backward(ctx, grad):
    return ops.pack_weight(grad, ctx.saved_tensors[0], *ctx.size), *[None] * 4


_GRADIENTS = {
    "masked_conv2d": (_conv_backward, _setup_conv),
    "masked_conv2d_grad_input": (_grad_input_backward, _setup_grad_input),
    "masked_conv2d_grad_weight": (_grad_weight_backward, _setup_grad_weight),
    "masked_conv2d_grad_bias": (_grad_bias_backward, _setup_grad_bias),
    "gather_channels": (_gather_backward, _setup_channels),
    "scatter_channels": (_scatter_backward, _setup_channels),
    "regroup_channels": (_regroup_backward, _setup_regroup),
    "join_channels": (_join_backward, _setup_join),
    "pack_weight": (_pack_backward, _setup_pack),
    "unpack_grad_weight": (_unpack_backward, _setup_unpack),
}
if not extension.has_extension():  # otherwise csrc/ops registers them, at a fifth of the cost per call
    for _name, (_backward, _setup) in _GRADIENTS.items():
        torch.library.register_autograd(f"prunekernels::{_name}", _backward, setup_context=_setup)


# ---- live tensors ---------------------------------------------------------------------------------------------------


def _bare(cls, compact, size, strides):
    return Tensor._make_wrapper_subclass(cls, size, strides, dtype=compact.dtype, device=compact.device)


class _Attach(torch.autograd.Function):
    """attach_live in pure torch, used when the extension is missing."""

    @staticmethod
    def forward(ctx, wrapper, compact, index):
        ctx.index, ctx.size = index, compact.shape  # past hooks that save tensors, as in C++
        ctx.mark_dirty(wrapper)
        return wrapper

    @staticmethod
    def backward(ctx, grad):
        planes = grad if grad.dim() == 4 else grad.reshape(*grad.shape[:2], -1, 1)
        return None, ops.gather_channels(planes, ctx.index).reshape(ctx.size), None


def live_wrapper(cls, compact: Tensor, index: Tensor, size, strides):
    """A tensor of class cls and full width that stores no values; its gradients go on to compact."""
    wrapper = _bare(cls, compact, size, strides)
    if compact.requires_grad:
        attach_live(wrapper, compact, index)
    return wrapper


def attach_live(wrapper: Tensor, compact: Tensor, index: Tensor) -> None:
    """Gives a wrapper an autograd history, in place of any it has, that leads its gradients on to compact."""
    if extension.has_extension():
        ops.attach_live.default(wrapper, compact, index)
    else:
        _Attach.apply(wrapper, compact, index)


# ---- autocast -------------------------------------------------------------------------------------------------------


def _autocast(device: str) -> None:
    """masked_conv2d under autocast computes in the autocast dtype, as conv2d does."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
        torch._C.DispatchKey.AutocastCUDA
    )

    def cast(x, weight, bias, *rest):
        dtype = torch.get_autocast_dtype(device)

        def narrow(t: Tensor | None) -> Tensor | None:
            eligible = t is not None and t.is_floating_point() and t.dtype != torch.float64
            return t.to(dtype) if t is not None and eligible else t

        with torch._C._ExcludeDispatchKeyGuard(keys):
            return ops.masked_conv2d(narrow(x), narrow(weight), narrow(bias), *rest)

    extension._library.impl("masked_conv2d", cast, f"Autocast{device.upper()}")


if not extension.has_extension():  # otherwise csrc/ops/autocast.cpp does it, at a fifth of the cost per call
    _autocast("cpu")
    _autocast("cuda")
