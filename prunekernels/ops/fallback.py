"""The operators in pure torch, used when the extension, or a kernel for the device, is missing. Same numbers, slow."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from . import mask_table

_MASKS = "Tensor? filter_mask, Tensor? kernel_mask, Tensor? input_mask"
_CONV = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, str plan"
PLANS = ("auto", "model", "dense", "compact", "direct", "sparse")  # all the same here
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SCHEMAS = (
    f"conv_mask({_MASKS}, int out_channels, int in_channels, int groups) -> Tensor",
    "masked_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? mask, Tensor? grad_mask, Tensor? grad_scale,"
    f" {_CONV}) -> Tensor",
    "masked_conv2d_grad_input(Tensor grad_out, Tensor weight, Tensor? mask, SymInt[4] x_size, bool channels_last,"
    f" {_CONV}) -> Tensor",
    "masked_conv2d_grad_weight(Tensor grad_out, Tensor x, Tensor weight, Tensor? mask, Tensor? grad_scale,"
    f" {_CONV}) -> Tensor",
    "masked_conv2d_grad_bias(Tensor grad_out, Tensor? mask) -> Tensor",
    "gather_channels(Tensor x, Tensor index) -> Tensor",
    "scatter_channels(Tensor x, Tensor index, SymInt channels) -> Tensor",
    "regroup_channels(Tensor x, Tensor index, Tensor inverse) -> Tensor",
    "join_channels(Tensor a, Tensor b, Tensor a_index, Tensor b_index, Tensor a_inverse, Tensor b_inverse, float alpha)"
    " -> Tensor",
    "pack_weight(Tensor weight, Tensor mask, SymInt filters, SymInt channels) -> Tensor",
    "unpack_grad_weight(Tensor grad, Tensor mask, SymInt filters, SymInt channels, bool channels_last) -> Tensor",
)


def _where(live: Tensor, x: Tensor, *shape: int) -> Tensor:
    """x where live, viewed as this shape, is true; 0 elsewhere."""
    return torch.where(live.view(*shape), x, x.new_zeros(()))


def _mask_weight(weight: Tensor, mask: Tensor | None, C: int) -> Tensor:
    if mask is None:
        return weight
    K, Cg = weight.shape[:2]
    return _where(mask_table.live_kernels(mask, K, C, Cg), weight, K, Cg, 1, 1)


def conv_mask(filter_mask, kernel_mask, input_mask, out_channels, in_channels, groups):
    K, C = out_channels, in_channels
    if groups < 1 or C % groups or K % groups:
        raise ValueError(f"conv_mask: groups: expected a divisor of {K} filters and {C} input channels, got {groups}")
    expected = {
        "filter_mask": (filter_mask, (K,)),
        "kernel_mask": (kernel_mask, (K, C // groups)),
        "input_mask": (input_mask, (C,)),
    }
    for name, (mask, shape) in expected.items():
        if mask is not None and (mask.dtype != torch.bool or mask.shape != shape or mask.device.type != "cpu"):
            got = f"{mask.dtype} {list(mask.shape)} on {mask.device}"
            raise ValueError(f"conv_mask: {name}: expected bool {list(shape)} on the CPU, got {got}")
    return mask_table.build(filter_mask, kernel_mask, input_mask, K, C, groups)


def _expect(holds: bool, op: str, argument: str, expected: object, got: object) -> None:
    if not holds:
        raise ValueError(f"{op}: {argument}: expected {expected}, got {got}")


def _check_images(op: str, x: Tensor) -> None:
    _check_tensor(op, "x", x, x)
    _expect(x.dim() == 4, op, "x", "a 4-D tensor", list(x.shape))


def _check_tensor(op: str, argument: str, tensor: Tensor, like: Tensor) -> None:
    _expect(tensor.dtype in _DTYPES, op, argument, "float32, float64, bfloat16 or float16", tensor.dtype)
    _expect(tensor.dtype == like.dtype, op, argument, like.dtype, tensor.dtype)
    _expect(tensor.device == like.device, op, argument, like.device, tensor.device)


def _in_dtype_of(x: Tensor, op: str, weight: Tensor) -> Tensor:
    """The weight in the dtype of x; it may be in float32 where x has 16 bits."""
    stays = weight.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)
    _check_tensor(op, "weight", weight, weight if stays else x)
    _expect(weight.device == x.device, op, "weight", x.device, weight.device)
    return weight.to(x.dtype)


def _check_mask(op: str, argument: str, mask: Tensor | None, sizes: tuple[int, ...]) -> None:
    """Checks a mask table. sizes: (K, C, groups), or (K,) where the operator knows no more."""
    if mask is None:
        return
    got = f"{mask.dtype} {list(mask.shape)}"
    holds = mask.dtype == torch.int32 and mask.dim() == 1 and len(mask) >= mask_table.HEADER_WORDS
    _expect(holds, op, argument, "a table made by conv_mask (int32)", got)
    if mask.device.type == "cpu":  # reading it on another device would wait for that device
        magic, *known = mask[:4].tolist()
        holds = magic == mask_table.MAGIC and len(mask) == mask_table.words(*known)
        _expect(holds, op, argument, "a table made by conv_mask", f"other numbers, {got}")
        _expect(tuple(known[: len(sizes)]) == sizes, op, argument, f"a table for {sizes}", tuple(known))


def _check_conv(op: str, x_size, weight: Tensor, mask, stride, padding, dilation, groups) -> list[int]:
    """Checks what csrc/ops/conv_args.cpp checks; returns the size of the output, [N, K, P, Q]."""
    _expect(len(x_size) == 4, op, "x", "a 4-D tensor [N, C, H, W]", list(x_size))
    _expect(weight.dim() == 4, op, "weight", "a 4-D tensor [K, C / groups, R, S]", list(weight.shape))
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        holds = len(value) == 2 and min(value) >= least
        _expect(holds, op, name, f"two integers, each at least {least}", list(value))
    (N, C), (K, Cg) = x_size[:2], weight.shape[:2]
    divides = groups >= 1 and C % groups == 0 and K % groups == 0
    _expect(divides, op, "groups", f"a divisor of {C} input channels and {K} filters", groups)
    _expect(Cg * groups == C, op, "weight", f"{C // groups} channels", list(weight.shape))
    size = [
        (x_size[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    _expect(
        min(size) > 0, op, "weight", "a kernel no larger than the padded input", f"{list(weight.shape)} for {x_size}"
    )
    _check_mask(op, "mask", mask, (K, C, groups))
    return [N, K, *size]


def _check_scale(op: str, scale: Tensor | None, K: int) -> None:
    if scale is not None:
        holds = scale.dtype == torch.float32 and scale.shape == (K,)
        _expect(holds, op, "grad_scale", f"float32 [{K}]", f"{scale.dtype} {list(scale.shape)}")


def _check_plan(op: str, plan: str) -> None:
    _expect(plan in PLANS or plan == "small", op, "plan", f"{', '.join(PLANS[:-1])} or {PLANS[-1]}", plan)


def masked_conv2d(x, weight, bias, mask, grad_mask, grad_scale, stride, padding, dilation, groups, plan):
    op = "masked_conv2d"
    _check_tensor(op, "x", x, x)
    weight = _in_dtype_of(x, op, weight)
    _check_conv(op, x.shape, weight, mask, stride, padding, dilation, groups)
    layout, K, C = suggest_memory_format(x), weight.shape[0], x.shape[1]
    if bias is not None:
        _check_tensor(op, "bias", bias, x)
        _expect(bias.shape == (K,), op, "bias", f"[{K}]", list(bias.shape))
    _check_mask(op, "grad_mask", grad_mask, (K, C, groups))
    _check_scale(op, grad_scale, K)
    _check_plan(op, plan)
    if mask is not None:
        x = _where(mask_table.read_channels(mask, K, C), x, 1, C, 1, 1)
        bias = None if bias is None else _where(mask_table.live_filters(mask, K), bias, K)
    weight = _mask_weight(weight, mask, C).contiguous(memory_format=layout)
    y = torch.convolution(x, weight, bias, stride, padding, dilation, False, (0, 0), groups)
    if mask is not None:
        y = _where(mask_table.live_filters(mask, K), y, 1, K, 1, 1)
    return y.contiguous(memory_format=layout)


def masked_conv2d_grad_input(grad_out, weight, mask, x_size, channels_last, stride, padding, dilation, groups, plan):
    op = "masked_conv2d_grad_input"
    weight = _in_dtype_of(grad_out, op, weight)
    size = _check_conv(op, x_size, weight, mask, stride, padding, dilation, groups)
    _check_plan(op, plan)
    _expect(list(grad_out.shape) == size, op, "grad_out", size, list(grad_out.shape))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    K, C = weight.shape[0], x_size[1]
    if mask is not None:
        grad_out = _where(mask_table.computed_filters(mask, K), grad_out, 1, K, 1, 1)
    grad_out = grad_out.contiguous(memory_format=layout)
    weight = _mask_weight(weight, mask, C).contiguous(memory_format=layout)
    x = torch.empty(x_size, dtype=grad_out.dtype, device=grad_out.device, memory_format=layout)
    args = (None, stride, padding, dilation, False, (0, 0), groups, (True, False, False))
    grad_x = torch.ops.aten.convolution_backward(grad_out, x, weight, *args)[0]
    if mask is not None:
        grad_x = _where(mask_table.read_channels(mask, K, C), grad_x, 1, C, 1, 1)
    return grad_x.contiguous(memory_format=layout)


def masked_conv2d_grad_weight(grad_out, x, weight, mask, grad_scale, stride, padding, dilation, groups, plan):
    op = "masked_conv2d_grad_weight"
    _check_tensor(op, "grad_out", grad_out, x)
    dtype, weight = weight.dtype, _in_dtype_of(x, op, weight)
    size = _check_conv(op, x.shape, weight, mask, stride, padding, dilation, groups)
    _check_plan(op, plan)
    _expect(list(grad_out.shape) == size, op, "grad_out", size, list(grad_out.shape))
    _check_scale(op, grad_scale, weight.shape[0])
    args = (None, stride, padding, dilation, False, (0, 0), groups, (False, True, False))
    grad = torch.ops.aten.convolution_backward(grad_out.contiguous(), x.contiguous(), weight.contiguous(), *args)[1]
    grad = _mask_weight(grad, mask, x.shape[1])
    if grad_scale is not None:
        scale = grad_scale.view(-1, 1, 1, 1)
        grad = torch.where(scale == 0, grad.new_zeros(()), grad * scale).to(weight.dtype)
    return grad.contiguous(memory_format=suggest_memory_format(weight)).to(dtype)


def masked_conv2d_grad_bias(grad_out, mask):
    _check_mask("masked_conv2d_grad_bias", "mask", mask, (grad_out.shape[1],))
    sums = grad_out.sum((0, 2, 3), dtype=torch.float64).to(grad_out.dtype)
    return sums if mask is None else _where(mask_table.live_filters(mask, sums.shape[0]), sums, -1)


def _check_index(op: str, index: Tensor, channels: int) -> Tensor:
    if index.dtype != torch.int32 or index.dim() != 1:
        raise ValueError(f"{op}: index: expected int32 [live], got {index.dtype} {list(index.shape)}")
    if index.device.type == "cpu" and index.numel():  # on another device the check would wait for that device
        if bool((index.diff() <= 0).any()) or int(index[0]) < 0 or int(index[-1]) >= channels:
            raise ValueError(
                f"{op}: index: expected strictly increasing channels below {channels}, got {index.tolist()}"
            )
    return index.long()


def gather_channels(x, index):
    _check_images("gather_channels", x)
    index = _check_index("gather_channels", index, x.shape[1])
    return x.index_select(1, index).contiguous(memory_format=suggest_memory_format(x))


def scatter_channels(x, index, channels):
    _check_images("scatter_channels", x)
    index = _check_index("scatter_channels", index, channels)
    if x.shape[1] != index.numel():
        raise ValueError(f"scatter_channels: x: expected {index.numel()} channels, one per index, got {list(x.shape)}")
    layout = suggest_memory_format(x)
    size = (x.shape[0], channels, *x.shape[2:])
    full = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout).zero_()
    return full.index_copy_(1, index, x)


def regroup_channels(x, index, inverse):
    _expect(inverse.numel() == x.shape[1], "regroup_channels", "inverse", "one place per channel of x", inverse.shape)
    y = x.index_select(1, index.clamp(min=0).long()) if x.shape[1] else x.new_zeros(len(x), len(index), *x.shape[2:])
    return _where(index >= 0, y, 1, -1, 1, 1).contiguous(memory_format=suggest_memory_format(x))


def join_channels(a, b, a_index, b_index, a_inverse, b_inverse, alpha):
    layout = suggest_memory_format(a if a.shape[1] >= b.shape[1] else b)
    y = regroup_channels(a, a_index, a_inverse) + alpha * regroup_channels(b, b_index, b_inverse)
    return y.contiguous(memory_format=layout)


def _lists(mask, filters):
    """The filters with a live kernel, bool [K], and the channels that one reads, bool [groups, C / groups]."""
    K, C, G = mask[1:4].tolist()
    _expect(K == filters, "pack_weight", "mask", f"a table of {filters} filters", K)
    return mask_table.computed_filters(mask, K), mask_table.read_channels(mask, K, C).view(G, -1)


def pack_weight(weight, mask, filters, channels):
    rows, columns = _lists(mask, weight.shape[0])
    columns = columns.any(0)  # every group has the same list
    packed = weight[rows][:, columns]
    got = f"{filters}, {channels}"
    _expect(packed.shape[:2] == (filters, channels), "pack_weight", "filters, channels", tuple(packed.shape[:2]), got)
    return packed.contiguous(memory_format=suggest_memory_format(weight))


def unpack_grad_weight(grad, mask, filters, channels, channels_last):
    rows, columns = _lists(mask, filters)
    half = grad.new_zeros(filters, *grad.shape[1:]).index_copy_(0, rows.nonzero().flatten(), grad)
    full = grad.new_zeros(filters, channels, *grad.shape[2:]).index_copy_(1, columns.any(0).nonzero().flatten(), half)
    return full.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


OPERATORS = (
    masked_conv2d,
    masked_conv2d_grad_input,
    masked_conv2d_grad_weight,
    masked_conv2d_grad_bias,
    gather_channels,
    scatter_channels,
    regroup_channels,
    join_channels,
    pack_weight,
    unpack_grad_weight,
)


def define() -> torch.library.Library:
    """Defines the schemas and implements them for every device."""
    library = torch.library.Library("prunekernels", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    library.impl("conv_mask", conv_mask, "CompositeExplicitAutograd")
    implement(library, "CompositeExplicitAutograd")
    return library


def implement(library: torch.library.Library, key: str) -> None:
    """Implements, under a dispatch key, the operators that have no kernel there."""
    for operator in OPERATORS:
        name = f"prunekernels::{operator.__name__}"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, key):
            library.impl(operator.__name__, operator, key)
