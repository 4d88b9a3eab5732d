"""The definition of the masked convolution, in fp64 and without the extension. Tests compare every kernel with it.

y = F.conv2d(where(input_mask, x, 0),
             where(filter_mask & kernel_mask & input_mask, w, 0),
             where(filter_mask, b, 0), stride, padding, dilation, groups)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad as conv_grad

Size = int | Sequence[int]

__all__ = ["gradients", "masked_conv2d", "masked_conv2d_loops"]


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    filter_mask: Tensor | None = None,
    kernel_mask: Tensor | None = None,
    input_mask: Tensor | None = None,
    mask: Any = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    weight_grad: str = "masked",
    grad_scale: Tensor | None = None,
) -> Tensor:
    """The masked convolution in fp64, twice differentiable, with the arguments of `prunekernels.masked_conv2d`.

    Args:
        x: [N, C, H, W] or [C, H, W].
        weight: [K, C / groups, R, S].
        bias: [K].
        filter_mask: Bool [K], True = live.
        kernel_mask: Bool [K, C / groups].
        input_mask: Bool [C].
        mask: Any object that has the three masks as attributes, such as a `ConvMask`.
        stride: As in `torch.nn.functional.conv2d`.
        padding: As in `torch.nn.functional.conv2d`.
        dilation: As in `torch.nn.functional.conv2d`.
        groups: As in `torch.nn.functional.conv2d`.
        weight_grad: "masked" or "dense", as in `prunekernels.masked_conv2d`.
        grad_scale: [K].

    Returns:
        float64 [N, K, P, Q] or [K, P, Q].

    Examples:
        >>> x, weight, keep = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 3, 3), torch.tensor([True, False])
        >>> want = pk.reference.masked_conv2d(x, weight, filter_mask=keep)
        >>> torch.allclose(pk.masked_conv2d(x, weight, filter_mask=keep).double(), want, atol=1e-4)
        True
    """
    if mask is not None:
        filter_mask, kernel_mask, input_mask = mask.filter_mask, mask.kernel_mask, mask.input_mask
    if weight_grad not in ("masked", "dense"):
        raise ValueError(f"reference.masked_conv2d: weight_grad: expected 'masked' or 'dense', got {weight_grad!r}")
    if x.dim() == 3:
        rest: dict[str, Any] = {"filter_mask": filter_mask, "kernel_mask": kernel_mask, "input_mask": input_mask}
        rest |= {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return masked_conv2d(x[None], weight, bias, weight_grad=weight_grad, grad_scale=grad_scale, **rest)[0]

    x, weight = x.double(), weight.double()
    stride, dilation = _pair(stride), _pair(dilation)
    top, bottom, left, right = _pads(padding, weight.shape[2:], stride, dilation)
    filters, inputs, live = live_masks(weight, filter_mask, kernel_mask, input_mask, groups)
    learns = live if weight_grad == "masked" else _per_kernel(inputs, weight.shape[0], groups)
    scale = torch.ones(weight.shape[0]) if grad_scale is None else grad_scale
    learns = learns & (scale != 0)[:, None].to(learns.device)

    # x is padded outside of the convolution, so that "same" with an even kernel is no special case.
    x = F.pad(_where(inputs[None, :, None, None], x), (left, right, top, bottom))
    y = _MaskedConv2d.apply(x, weight, filters, live, learns, scale.double(), stride, dilation, groups)
    if bias is not None:
        y = y + _where(filters, bias.double())[None, :, None, None]
    return y


def gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, grad_out: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The output of `masked_conv2d` and its gradients, in fp64.

    Args:
        x: [N, C, H, W] or [C, H, W].
        weight: [K, C / groups, R, S].
        bias: [K] or None.
        grad_out: The gradient of the output, of its shape.
        kwargs: The other arguments of `masked_conv2d`.

    Returns:
        (y, gradient of x, of weight, of bias); the last is None without a bias.

    Examples:
        >>> x, weight, grad_out = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 3, 3), torch.randn(2, 2, 6, 6)
        >>> y, *grads = pk.reference.gradients(x, weight, torch.zeros(2), grad_out)
        >>> [tuple(grad.shape) for grad in grads]
        [(2, 3, 8, 8), (2, 3, 3, 3), (2,)]
    """
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = masked_conv2d(leaves[0], leaves[1], None if bias is None else leaves[2], **kwargs)
    grads = torch.autograd.grad(y, leaves, grad_out.double())
    return y.detach(), grads[0], grads[1], None if bias is None else grads[2]


class _MaskedConv2d(torch.autograd.Function):
    """The grad_out of a dead filter reaches the weights of that filter, if they learn, and nothing else."""

    @staticmethod
    def forward(x, weight, filters, live, learns, scale, stride, dilation, groups):
        y = F.conv2d(x, _where(live[:, :, None, None], weight), None, stride, 0, dilation, groups)
        return _where(filters[None, :, None, None], y)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, stride, dilation, groups = inputs
        ctx.save_for_backward(*tensors)
        ctx.sizes = {"stride": stride, "dilation": dilation, "groups": groups}

    @staticmethod
    def backward(ctx, grad_out):  # [N, K, P, Q]
        x, weight, filters, live, learns, scale = ctx.saved_tensors
        grad_live = _where(filters[None, :, None, None], grad_out)
        grad_x = conv_grad.conv2d_input(x.shape, _where(live[:, :, None, None], weight), grad_live, **ctx.sizes)
        # Rows that do not learn are zeroed before the product too, because their grad_out may be NaN.
        grad_rows = _where(learns.any(1)[None, :, None, None], grad_out)
        grad_w = conv_grad.conv2d_weight(x, weight.shape, grad_rows, **ctx.sizes)
        grad_w = _where(learns[:, :, None, None], grad_w * scale[:, None, None, None])
        return grad_x, grad_w, None, None, None, None, None, None, None


def masked_conv2d_loops(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    grad_out: Tensor | None = None,
    *,
    filter_mask: Tensor | None = None,
    kernel_mask: Tensor | None = None,
    input_mask: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    weight_grad: str = "masked",
    grad_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The output and gradients by seven nested loops, which never read a dead number and do not use F.conv2d.

    Args:
        x: [N, C, H, W].
        weight: [K, C / groups, R, S].
        bias: [K] or None.
        grad_out: [N, K, P, Q]; None: the gradients are zeros.
        filter_mask: Bool [K], True = live.
        kernel_mask: Bool [K, C / groups].
        input_mask: Bool [C].
        stride: As in `torch.nn.functional.conv2d`.
        padding: As in `torch.nn.functional.conv2d`.
        dilation: As in `torch.nn.functional.conv2d`.
        groups: As in `torch.nn.functional.conv2d`.
        weight_grad: "masked" or "dense".
        grad_scale: [K].

    Returns:
        (y, gradient of x, of weight, of bias) in fp64; the last is None without a bias.

    Examples:
        >>> x, weight = torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3)
        >>> y, *grads = pk.reference.masked_conv2d_loops(x, weight, input_mask=torch.tensor([True, False]))
        >>> y.item()
        9.0
    """
    stride, dilation = _pair(stride), _pair(dilation)
    top, bottom, left, right = _pads(padding, weight.shape[2:], stride, dilation)
    batch, channels, height, width = x.shape
    filters, group_channels, taps_h, taps_w = weight.shape
    out_h = (height + top + bottom - dilation[0] * (taps_h - 1) - 1) // stride[0] + 1
    out_w = (width + left + right - dilation[1] * (taps_w - 1) - 1) // stride[1] + 1
    to_list = lambda t, size: [True] * size if t is None else t.tolist()  # noqa: E731
    filter_live, input_live = to_list(filter_mask, filters), to_list(input_mask, channels)
    kernel_live = [[True] * group_channels] * filters if kernel_mask is None else kernel_mask.tolist()
    scale = [1.0] * filters if grad_scale is None else grad_scale.tolist()

    x_, w_ = x.detach().double().numpy(), weight.detach().double().numpy()
    g_ = None if grad_out is None else grad_out.detach().double().numpy()
    y = torch.zeros(batch, filters, out_h, out_w, dtype=torch.float64)
    grad_x = torch.zeros(x.shape, dtype=torch.float64)
    grad_w = torch.zeros(weight.shape, dtype=torch.float64)
    grad_b = None if bias is None else torch.zeros(filters, dtype=torch.float64)
    y_, gx_, gw_ = y.numpy(), grad_x.numpy(), grad_w.numpy()
    for n, k, p, q in itertools.product(range(batch), range(filters), range(out_h), range(out_w)):
        if filter_live[k] and bias is not None:
            y_[n, k, p, q] += bias[k].item()
            if grad_b is not None and g_ is not None:
                grad_b[k] += g_[n, k, p, q]
        for j, r, s in itertools.product(range(group_channels), range(taps_h), range(taps_w)):
            c = k // (filters // groups) * group_channels + j
            h, w = p * stride[0] - top + r * dilation[0], q * stride[1] - left + s * dilation[1]
            if not (input_live[c] and 0 <= h < height and 0 <= w < width):
                continue
            live = filter_live[k] and kernel_live[k][j]
            if live:
                y_[n, k, p, q] += x_[n, c, h, w] * w_[k, j, r, s]
            if live and g_ is not None:
                gx_[n, c, h, w] += g_[n, k, p, q] * w_[k, j, r, s]
            if (live or weight_grad == "dense") and g_ is not None and scale[k] != 0:
                gw_[k, j, r, s] += g_[n, k, p, q] * x_[n, c, h, w] * scale[k]
    return y, grad_x, grad_w, grad_b


def live_masks(weight, filter_mask, kernel_mask, input_mask, groups):
    """Which filters [K], inputs [C] and kernels [K, C/G] are live, as bool tensors; a mask of None drops nothing."""
    filters, group_channels = weight.shape[:2]
    true = lambda *size: torch.ones(size, dtype=torch.bool, device=weight.device)  # noqa: E731
    filter_mask = true(filters) if filter_mask is None else filter_mask
    input_mask = true(group_channels * groups) if input_mask is None else input_mask
    live = filter_mask[:, None] & _per_kernel(input_mask, filters, groups)
    return filter_mask, input_mask, live if kernel_mask is None else live & kernel_mask


def _per_kernel(input_mask, filters, groups):
    """The input mask [C] spread over the kernels that read each channel: [K, C/G]."""
    return input_mask.view(groups, -1).repeat_interleave(filters // groups, dim=0)


def _where(mask, value):
    return torch.where(mask, value, torch.zeros((), dtype=value.dtype, device=value.device))


def _pair(value: Size) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    return first, second


def _pads(padding, taps, stride, dilation):
    """(top, bottom, left, right)."""
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f"reference.masked_conv2d: padding 'same': expected stride 1, got {stride}")
        totals = [d * (t - 1) for d, t in zip(dilation, taps, strict=True)]
        return tuple(pad for total in totals for pad in (total // 2, total - total // 2))
    height, width = _pair(padding)
    return height, height, width, width
