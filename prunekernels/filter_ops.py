"""What pruning methods ask of filters, all layers in one call: masked gradients, norms, mean activations, merging."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .masks import ConvMask, make_table
from .ops.fallback_steps import ops

Mask = ConvMask | Tensor | None


def _table_of(op: str, mask: Mask, weight: Tensor) -> Tensor | None:
    """A mask table of a weight [K, C / groups, ...]; of a vector, of its length."""
    if mask is None or (isinstance(mask, Tensor) and mask.dtype == torch.int32):
        return mask
    K, channels = len(weight), weight.shape[1] if weight.dim() > 1 else 1
    if isinstance(mask, ConvMask):
        groups = mask.groups
        return mask.table(K, channels * groups, groups)
    kernels = mask.dim() == 2
    if mask.dtype != torch.bool or mask.shape != (K, channels)[: 2 if kernels else 1]:
        expected = f"bool [{K}] or [{K}, {channels}], a ConvMask or None"
        raise ValueError(f"{op}: masks: expected {expected}, got {mask.dtype} {list(mask.shape)}")
    return make_table(None, mask, None, K, channels, 1) if kernels else make_table(mask, None, None, K, channels, 1)


def _tables(op: str, masks: Sequence[Mask] | None, weights: Sequence[Tensor]) -> list[Tensor | None]:
    if masks is None:
        return []
    if len(masks) != len(weights):
        raise ValueError(f"{op}: masks: expected {len(weights)} masks, got {len(masks)}")
    return [_table_of(op, mask, weight) for mask, weight in zip(masks, weights, strict=True)]


@torch.no_grad()
def mask_grad_(
    grads: Sequence[Tensor],
    masks: Sequence[Mask] | None = None,
    *,
    grad_scales: Sequence[Tensor | None] | None = None,
    weights: Sequence[Tensor] | None = None,
    accumulated: Sequence[Tensor] | None = None,
    abs_sums: Sequence[Tensor] | None = None,
    square_sums: Sequence[Tensor] | None = None,
    product_sums: Sequence[Tensor] | None = None,
    add_to_sums: bool = False,
) -> None:
    """One pass over each gradient [K, ...]: zeros what is dead and multiplies row k by grad_scale[k].

    Of the result g, where a tensor is given: accumulated += g, and per filter [K] the sums of |g|, of g^2 and of w g
    (which needs weights). The sums replace what the tensors hold, or with add_to_sums are added to it. They and
    accumulated are float32 (of float64: float64); in a list, an empty tensor asks for nothing. A mask is a ConvMask, a
    bool tensor [K] or [K, C / groups] (True = live), a mask table or None.

        >>> sums = [torch.zeros(len(w)) for w in weights]
        >>> mask_grad_([w.grad for w in weights], masks, abs_sums=sums, add_to_sums=True)
    """
    if not grads:
        return
    lists = [list(values or ()) for values in (grad_scales, weights, accumulated, abs_sums, square_sums, product_sums)]
    ops.mask_grad_(list(grads), _tables("mask_grad_", masks, grads), *lists, add_to_sums)


@torch.no_grad()
def filter_norms(
    weights: Sequence[Tensor], masks: Sequence[Mask] | None = None, *, p: int = 2, per_kernel: bool = False
) -> list[Tensor]:
    """The L1 (p=1) or L2 (p=2) norm of each filter [K], or with per_kernel of each kernel [K, C / groups]; what is dead
    counts 0, whatever it holds. float32 (of float64: float64)."""
    if p not in (1, 2):
        raise ValueError(f"filter_norms: p: expected 1 or 2, got {p}")
    if not weights:
        return []
    abs_sums, square_sums = ops.filter_norms(list(weights), _tables("filter_norms", masks, weights), per_kernel)
    return abs_sums if p == 1 else torch._foreach_sqrt(square_sums)  # type: ignore[return-value]


@torch.no_grad()
def channel_mean(xs: Sequence[Tensor], *, relu: bool = False) -> list[Tensor]:
    """The mean over batch and pixels of each channel of activations [N, C, ...], after relu if asked: float32 [C]."""
    return ops.channel_mean(list(xs), relu) if xs else []


@torch.no_grad()
def cluster_mean_(
    grads: Sequence[Tensor],
    clusters: Sequence[Tensor],
    *,
    weights: Sequence[Tensor] | None = None,
    strength: float = 0.0,
) -> None:
    """Centripetal averaging: each row of a gradient becomes the mean of the rows of its cluster, plus, with weights,
    strength times the row's weight less the cluster's mean weight, which pulls the cluster together.

    clusters: int32 [K] on the CPU, the cluster of each row; a row below 0 or alone in its cluster stays as it is.
    """
    if grads:
        ops.cluster_mean_(list(grads), list(clusters), list(weights or ()), strength)
