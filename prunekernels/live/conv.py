"""A masked convolution between live tensors: the small convolution it amounts to, over weights of full width."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import conv2d_with_tables
from ..masks import make_table
from ..ops.extension import has_extension
from . import fallbacks
from .channel_list import LiveList, Move
from .tensor import LiveTensor, ops, wrap

if TYPE_CHECKING:
    from ..nn.conv import MaskedConv2d


_KEPT = 64  # passages of a layer: lists that arrive change with the masks of the layers before it


class Passage(NamedTuple):
    """What a layer under its masks makes of an input with certain live channels."""

    reason: str  # why the layer gear must do it; "" if it need not
    out: LiveList
    emits: bool = True  # whether the result may be compact
    move: Move | None = None  # input channels to those of the small convolution; None: as they are
    pick: tuple[Tensor, int, int] | None = None  # mask table of its rows and columns in the weight, and their counts
    table: Tensor | None = None  # mask table of the small convolution; None: nothing is dead in it
    grad_table: Tensor | None = None
    whole: Tensor | None = None  # table of the small convolution with nothing dead: it has plans to choose from
    groups: int = 1


def live_conv(layer: MaskedConv2d, x: Tensor) -> Tensor:
    """layer(x) in the network gear. x: live or plain."""
    compact, live = (x.compact, x.live) if type(x) is LiveTensor else (x, None)  # a live tensor's own shape costs 2 us
    if layer._forward_hooks or compact.dim() != 4:
        return _layer_gear(layer, x, "a forward hook" if layer._forward_hooks else "an input that is not 4-D")
    if (compact.shape[1] if live is None else live.channels) != layer.in_channels:
        raise ValueError(f"MaskedConv2d: input: expected {layer.in_channels} channels, got {list(x.shape)}")
    if layer._mask_table.is_meta:
        return layer._full_forward(x)
    passage = passage_of(layer, live)
    if passage.reason:
        y = _layer_gear(layer, x, passage.reason)
        if not passage.emits or passage.out.full:
            return y
        return wrap(ops.gather_channels(y, passage.out.index(y.device)), passage.out)
    return wrap(_small_conv(layer, compact, passage), passage.out)


def _layer_gear(layer: MaskedConv2d, x: Tensor, reason: str) -> Tensor:
    fallbacks.note(f"conv2d ({reason})")
    return layer._full_forward(x.full() if type(x) is LiveTensor else x)


def _small_conv(layer: MaskedConv2d, x: Tensor, p: Passage) -> Tensor:
    weight: Tensor = layer.weight
    bias: Tensor | None = layer.bias
    scale = layer._buffers["_grad_scale"]
    if p.move is not None:
        x = ops.regroup_channels(x, *p.move)
    if p.pick is not None:
        weight = ops.pack_weight(weight, *p.pick)
    if not p.out.full and (bias is not None or scale is not None):
        rows = p.out.rows(x.device)
        bias = bias if bias is None else bias.index_select(0, rows)
        scale = scale if scale is None else scale.index_select(0, rows)
    x, padding = layer._pad(x)
    if p.table is None and scale is None and not _has_kernels(x):
        return F.conv2d(x, weight, bias, layer.stride, padding, layer.dilation, p.groups)
    table = p.whole if p.table is None else p.table
    grad_table = p.whole if p.grad_table is None else p.grad_table
    return conv2d_with_tables(
        x, weight, bias, table, grad_table, scale, layer.stride, padding, layer.dilation, p.groups, small=True
    )


def _has_kernels(x: Tensor) -> bool:
    """Whether plans other than the vendor's convolution may serve where nothing is dead."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous() and has_extension()


def passage_of(layer: MaskedConv2d, live: LiveList | None) -> Passage:
    """Prepared the first time a layer meets a list under its present masks, then looked up."""
    key = (live, layer._mask_table.device)
    passage = layer._passages.get(key)
    if passage is None:
        if len(layer._passages) >= _KEPT:
            layer._passages.clear()
        with torch.inference_mode(False), torch.no_grad():  # it outlives the mode it is made in
            passage = layer._passages[key] = _prepare(layer, live or LiveList.all(layer.in_channels))
    return passage


def _host(mask: Tensor) -> np.ndarray:
    return mask.detach().cpu().numpy()


def _prepare(layer: MaskedConv2d, live: LiveList) -> Passage:
    K, groups, has_bias = layer.out_channels, layer.groups, layer.bias is not None
    hard = _host(layer.hard_mask)
    filters, inputs = _host(layer.filter_mask) & hard, _host(layer.input_mask)
    kernels = _host(layer.kernel_mask) & filters[:, None]
    if layer.weight_grad == "dense" and bool((hard & ~filters).any()):
        return Passage('weight_grad="dense" trains dead filters', LiveList.all(K), emits=False)
    if groups == 1:
        kernels = kernels & (inputs & live.mask())[None, :]
        rows = filters if has_bias or layer.weight_grad == "dense" else kernels.any(1)
        return _prepare_dense(layer, live, rows, kernels, inputs)
    depthwise = groups == K == layer.in_channels
    if not depthwise:
        return Passage("groups", LiveList.of(np.flatnonzero(filters), K))
    rows = filters if layer.weight_grad == "dense" else kernels[:, 0] & inputs
    return _prepare_depthwise(layer, live, filters if has_bias else rows & live.mask(), kernels[:, 0], inputs)


def _table(
    device: torch.device,
    filters: np.ndarray | None,
    kernels: np.ndarray | None,
    inputs: np.ndarray | None,
    *size: int,
) -> Tensor:
    def tensor(mask: np.ndarray | None) -> Tensor | None:
        return None if mask is None else torch.from_numpy(np.ascontiguousarray(mask))

    K, C, groups = size
    return make_table(tensor(filters), tensor(kernels), tensor(inputs), K, C, groups).to(device)


def _prepare_dense(
    layer: MaskedConv2d, live: LiveList, rows: np.ndarray, kernels: np.ndarray, inputs: np.ndarray
) -> Passage:
    device, (K, C) = layer.weight.device, kernels.shape
    out = LiveList.of(np.flatnonzero(rows), K)
    if not out.count or not live.count:
        return Passage("nothing is live", out)
    pick = None
    if not (out.full and live.full):
        pick = (_table(device, rows, None, live.mask(), K, C, 1), out.count, live.count)
    small, read = kernels[out.host][:, live.host], inputs[live.host]
    table = grad_table = None
    if not small.all():
        size = (out.count, live.count, 1)
        table = grad_table = _table(device, None, small, read, *size)
        if layer.weight_grad == "dense":
            grad_table = None if read.all() else _table(device, None, None, read, *size)
    whole = _table(device, None, None, None, out.count, live.count, 1)
    return Passage("", out, True, None, pick, table, grad_table, whole)


def _prepare_depthwise(
    layer: MaskedConv2d, live: LiveList, rows: np.ndarray, kernels: np.ndarray, inputs: np.ndarray
) -> Passage:
    """Filters and channels are the same here: the input is brought to the filters that are live."""
    device, K = layer.weight.device, len(rows)
    out = LiveList.of(np.flatnonzero(rows), K)
    if not out.count:
        return Passage("nothing is live", out)
    move = None if live is out else live.move(out, device)
    pick = None if out.full else (_table(device, rows, None, rows, K, K, K), out.count, 1)
    small, read, size = kernels[out.host][:, None], inputs[out.host], (out.count, out.count, out.count)
    table = None if small.all() and read.all() else _table(device, None, small, read, *size)
    grad_table = table
    if layer.weight_grad == "dense":
        grad_table = None if read.all() else _table(device, None, None, read, *size)
    whole = _table(device, None, None, None, out.count, out.count, out.count)
    return Passage("", out, True, move, pick, table, grad_table, whole, out.count)
