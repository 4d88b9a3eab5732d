"""The public functions: they take arguments as torch.nn.functional does, check them and call the operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import plan
from .masks import ConvMask, check_mask, make_table
from .ops import autograd, transforms
from .ops.transforms import ConvLive

ops = autograd.ops
WEIGHT_GRADS = ("masked", "dense")


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    filter_mask: Tensor | None = None,
    kernel_mask: Tensor | None = None,
    input_mask: Tensor | None = None,
    mask: ConvMask | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    weight_grad: str = "masked",
    grad_scale: Tensor | None = None,
) -> Tensor:
    """A 2-D convolution of the live filters, channels and kernels; dead ones cost nothing and give exact zeros.

    Equivalent to: F.conv2d(where(input_mask, x, 0), where(filter_mask & kernel_mask & input_mask, weight, 0),
    where(filter_mask, bias, 0), stride, padding, dilation, groups)

    Args:
        x: [N, C, H, W] or [C, H, W].
        weight: [K, C / groups, R, S].
        bias: [K]. The bias of a dead filter has gradient 0.
        filter_mask: Bool [K], True = live.
        kernel_mask: Bool [K, C / groups].
        input_mask: Bool [C].
        mask: A `ConvMask` in place of the three masks; it saves preparing them at every call.
        stride: As in `torch.nn.functional.conv2d`.
        padding: As in `torch.nn.functional.conv2d`, "same" and "valid" included.
        dilation: As in `torch.nn.functional.conv2d`.
        groups: As in `torch.nn.functional.conv2d`.
        weight_grad: "masked": dead weights have gradient 0. "dense": they have the gradient that they would have if
            they were live, except in channels that input_mask drops, where it is 0.
        grad_scale: Float32 [K]: row k of the gradient of weight is multiplied by entry k; 0 gives exact zeros.

    Returns:
        [N, K, P, Q] or [K, P, Q].

    Examples:
        >>> keep = torch.tensor([True, False, True, True])
        >>> y = pk.masked_conv2d(torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), filter_mask=keep, padding=1)
        >>> bool((y[:, 1] == 0).all())
        True
    """
    op = "masked_conv2d"
    check_conv(op, x, weight, bias, groups)
    if weight_grad not in WEIGHT_GRADS:
        raise ValueError(f"{op}: weight_grad: expected one of {', '.join(WEIGHT_GRADS)}, got {weight_grad!r}")
    K, C = weight.shape[0], weight.shape[1] * groups
    if grad_scale is not None:
        check_grad_scale(op, grad_scale, K, weight.device)
    raw = (
        ("filter_mask", filter_mask, (K,)),
        ("kernel_mask", kernel_mask, (K, C // groups)),
        ("input_mask", input_mask, (C,)),
    )
    if mask is not None:
        given = [name for name, m, _ in raw if m is not None]
        if given or not isinstance(mask, ConvMask):
            got = type(mask).__name__ if not given else f"mask and {', '.join(given)}"
            raise ValueError(f"{op}: mask: expected a ConvMask and no other mask beside it, got {got}")
    else:
        for name, m, shape in raw:
            if m is not None:
                check_mask(op, name, m, shape, x.device)
    if transforms.is_transformed():
        if mask is not None:
            mask.check_sizes(K, C, groups)
            filter_mask, kernel_mask, input_mask = mask.filter_mask, mask.kernel_mask, mask.input_mask
        live = ConvLive.of_masks(filter_mask, kernel_mask, input_mask, K, C, groups, dense_grad=weight_grad == "dense")
        return transformed_conv2d(x, weight, bias, live, grad_scale, stride, padding, dilation, groups)
    table = grad_table = None
    if mask is not None:
        table = mask.table(K, C, groups)
        grad_table = table if weight_grad == "masked" else mask.table(K, C, groups, dense_grad=True)
        if mask.nothing_dead and grad_scale is None:
            return F.conv2d(x, weight, bias, stride, padding, dilation, groups)  # type: ignore[arg-type]
        if table.device != x.device:
            raise ValueError(f"{op}: mask: expected a ConvMask on {x.device}, got one on {table.device}")
    elif any(m is not None for _, m, _ in raw):
        table = make_table(filter_mask, kernel_mask, input_mask, K, C, groups)
        grad_table = table
        if weight_grad == "dense":
            grad_table = None if input_mask is None else make_table(None, None, input_mask, K, C, groups)
    return conv2d_with_tables(x, weight, bias, table, grad_table, grad_scale, stride, padding, dilation, groups)


def conv2d_with_tables(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    grad_table: Tensor | None,
    grad_scale: Tensor | None,
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    small: bool = False,
) -> Tensor:
    """masked_conv2d with masks that are tables already, as layers call it at every step. small: see plan.current()."""
    op = "masked_conv2d"
    stride, dilation = pair(op, "stride", stride), pair(op, "dilation", dilation)
    if isinstance(padding, str):
        x, padding = pad_string(op, x, padding, weight.shape[2:], stride, dilation)
    batched = x if x.dim() == 4 else x.unsqueeze(0)
    y = ops.masked_conv2d(
        batched,
        weight,
        bias,
        table,
        grad_table,
        grad_scale,
        stride,
        pair(op, "padding", padding),
        dilation,
        groups,
        plan.current(small),
    )
    return y if x.dim() == 4 else y.squeeze(0)


def transformed_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    live: ConvLive,
    grad_scale: Tensor | None,
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> Tensor:
    """masked_conv2d under a transform of torch.func or in forward-mode AD."""
    op = "masked_conv2d"
    stride, dilation = pair(op, "stride", stride), pair(op, "dilation", dilation)
    if isinstance(padding, str):
        x, padding = pad_string(op, x, padding, weight.shape[2:], stride, dilation)
    return transforms.masked_conv2d(
        x, weight, bias, live, grad_scale, stride, pair(op, "padding", padding), dilation, groups
    )


def gather_channels(x: Tensor, index: Tensor) -> Tensor:
    """Picks channels: x[:, index], in the memory format of x. Differentiable.

    Args:
        x: [N, C, H, W].
        index: Int32 [live], strictly increasing.

    Returns:
        [N, live, H, W].

    Examples:
        >>> x = torch.randn(2, 4, 5, 5)
        >>> index = torch.tensor([0, 2], dtype=torch.int32)
        >>> torch.equal(pk.gather_channels(x, index), x[:, [0, 2]])
        True
    """
    _check_index_device("gather_channels", x, index)
    return transforms.gather_channels(x, index) if transforms.is_transformed() else ops.gather_channels(x, index)


def scatter_channels(x: Tensor, index: Tensor, channels: int) -> Tensor:
    """Puts channels at their places among zero channels: the adjoint of `gather_channels`. Differentiable.

    Args:
        x: [N, live, H, W].
        index: Int32 [live], strictly increasing: the place of each channel.
        channels: How many channels the result has.

    Returns:
        [N, channels, H, W].

    Examples:
        >>> index = torch.tensor([0, 2], dtype=torch.int32)
        >>> pk.scatter_channels(torch.ones(1, 2, 1, 1), index, 4).flatten().tolist()
        [1.0, 0.0, 1.0, 0.0]
    """
    _check_index_device("scatter_channels", x, index)
    if transforms.is_transformed():
        return transforms.scatter_channels(x, index, channels)
    return ops.scatter_channels(x, index, channels)


def _check_index_device(op: str, x: Tensor, index: Tensor) -> None:
    if index.device != x.device:
        raise ValueError(f"{op}: index: expected a tensor on {x.device}, as x is, got one on {index.device}")


def check_conv(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    """Raises, naming operator and argument, unless shapes, groups and devices go together."""
    if x.dim() not in (3, 4):
        raise ValueError(f"{op}: x: expected [N, C, H, W] or [C, H, W], got {list(x.shape)}")
    if weight.dim() != 4:
        raise ValueError(f"{op}: weight: expected [K, C / groups, R, S], got {list(weight.shape)}")
    K, C = weight.shape[0], x.shape[-3]
    if not isinstance(groups, int) or groups < 1 or K % groups or C % groups:
        raise ValueError(f"{op}: groups: expected a divisor of {K} filters and {C} channels, got {groups!r}")
    if x.shape[-3] != weight.shape[1] * groups:
        raise ValueError(
            f"{op}: weight: expected {x.shape[-3]} channels (as x has) over {groups} groups, got {list(weight.shape)}"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.device != x.device:
            raise ValueError(f"{op}: {name}: expected a tensor on {x.device}, as x is, got one on {parameter.device}")


def check_grad_scale(op: str, scale: Tensor, K: int, device: torch.device) -> None:
    """Raises, naming the operator, unless scale is float32 [K] on the device, without gradient."""
    if not isinstance(scale, Tensor) or scale.dtype != torch.float32 or scale.shape != (K,) or scale.device != device:
        got = (
            f"{scale.dtype} {list(scale.shape)} on {scale.device}"
            if isinstance(scale, Tensor)
            else type(scale).__name__
        )
        raise ValueError(f"{op}: grad_scale: expected float32 [{K}] on {device}, got {got}")
    if scale.requires_grad:
        raise ValueError(f"{op}: grad_scale: expected a tensor without gradient, got one that requires grad")


def pair(op: str, name: str, value: int | Sequence[int]) -> list[int]:
    """One or two integers as a list of two."""
    if (
        type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int
    ):  # the usual case: the attribute of a layer
        return list(value)
    if type(value) is int:
        return [value, value]
    values = list(value) if isinstance(value, (tuple, list, Sequence)) else [value, value]
    if len(values) != 2 or any(isinstance(v, float) for v in values):
        raise ValueError(f"{op}: {name}: expected one or two integers, got {value!r}")
    return values


def pad_string(
    op: str, x: Tensor, padding: str, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """Padding "valid" or "same" in numbers, and x padded (bottom, right) by the odd row and column of "same"."""
    if padding == "valid":
        return x, [0, 0]
    if padding != "same":
        raise ValueError(f"{op}: padding: expected integers, 'same' or 'valid', got {padding!r}")
    if list(stride) != [1, 1]:
        raise ValueError(f"{op}: padding: expected 'same' only with stride 1, got stride {list(stride)}")
    total = [dilation[i] * (kernel[i] - 1) for i in range(2)]
    extra = [t % 2 for t in total]
    if any(extra):
        x = F.pad(x, (0, extra[1], 0, extra[0]))
    return x, [t // 2 for t in total]
