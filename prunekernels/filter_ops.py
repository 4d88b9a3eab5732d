"""Operations of pruning methods on filters, for all layers in one call: masked gradients, norms, means, merging."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .masks import ConvMask, make_table
from .ops.fallback_steps import ops

Mask = ConvMask | Tensor | None


def _table_of(op: str, mask: Mask, weight: Tensor) -> Tensor | None:
    """The mask table of a weight [K, C / groups, ...], or of a vector [K]; None: nothing is dead."""
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
    """Zeros the dead entries of gradients and scales their rows, in place, in one pass over each gradient.

    The same pass can add up what results, g. Sums and accumulated are float32 (float64 for float64 gradients). An empty
    tensor in one of the lists asks for nothing.

    Args:
        grads: Gradients, [K, ...] each.
        masks: For each gradient a ConvMask, a bool tensor [K] or [K, C / groups] (True = live), a mask table or None.
        grad_scales: For each gradient float32 [K], which multiplies its rows, or None.
        weights: The weights w of the gradients, which product_sums needs.
        accumulated: For each gradient a tensor of its shape; g is added to it.
        abs_sums: [K] each; the sum of |g| over each filter.
        square_sums: [K] each; the sum of g * g over each filter.
        product_sums: [K] each; the sum of w * g over each filter.
        add_to_sums: True adds to what the sums hold; False replaces it.

    Examples:
        >>> from prunekernels.filter_ops import mask_grad_
        >>> grads, sums = [torch.ones(4, 3, 3, 3)], [torch.zeros(4)]
        >>> mask_grad_(grads, [torch.tensor([True, False, True, True])], abs_sums=sums)
        >>> sums[0].tolist()
        [27.0, 0.0, 27.0, 27.0]
    """
    if not grads:
        return
    lists = [list(values or ()) for values in (grad_scales, weights, accumulated, abs_sums, square_sums, product_sums)]
    ops.mask_grad_(list(grads), _tables("mask_grad_", masks, grads), *lists, add_to_sums)


@torch.no_grad()
def filter_norms(
    weights: Sequence[Tensor], masks: Sequence[Mask] | None = None, *, p: int = 2, per_kernel: bool = False
) -> list[Tensor]:
    """The norm of each filter, or of each kernel, in which dead entries count as 0 whatever they hold.

    Args:
        weights: [K, C / groups, ...] each.
        masks: As in `mask_grad_`.
        p: 1 for the L1 norm, 2 for the L2 norm.
        per_kernel: True: the norm of each kernel.

    Returns:
        For each weight [K], or [K, C / groups] with per_kernel; float32 (float64 for float64 weights).

    Examples:
        >>> from prunekernels.filter_ops import filter_norms
        >>> [norms.tolist() for norms in filter_norms([torch.ones(2, 4, 1, 1), torch.ones(3, 9, 1, 1)])]
        [[2.0, 2.0], [3.0, 3.0, 3.0]]
    """
    if p not in (1, 2):
        raise ValueError(f"filter_norms: p: expected 1 or 2, got {p}")
    if not weights:
        return []
    abs_sums, square_sums = ops.filter_norms(list(weights), _tables("filter_norms", masks, weights), per_kernel)
    return abs_sums if p == 1 else torch._foreach_sqrt(square_sums)  # type: ignore[return-value]


@torch.no_grad()
def channel_mean(xs: Sequence[Tensor], *, relu: bool = False) -> list[Tensor]:
    """The mean of each channel of activations over batch and pixels.

    Args:
        xs: [N, C, ...] each.
        relu: True: of the activations after a ReLU.

    Returns:
        For each x float32 [C].

    Examples:
        >>> from prunekernels.filter_ops import channel_mean
        >>> channel_mean([torch.tensor([[[[-1.0, 3.0]], [[2.0, 4.0]]]])], relu=True)
        [tensor([1.5000, 3.0000])]
    """
    return ops.channel_mean(list(xs), relu) if xs else []


@torch.no_grad()
def cluster_mean_(
    grads: Sequence[Tensor],
    clusters: Sequence[Tensor],
    *,
    weights: Sequence[Tensor] | None = None,
    strength: float = 0.0,
) -> None:
    """Centripetal averaging, in place: every row of a gradient becomes the mean over the rows of its cluster.

    With weights, strength * (row of the weight - mean over the cluster) is added, which pulls the rows together.

    Args:
        grads: [K, ...] each.
        clusters: For each gradient int32 [K] on the CPU, the cluster of each row. A row with a negative number, or
            alone in its cluster, stays as it is.
        weights: The weights of the gradients.
        strength: How strongly the rows are pulled together.

    Examples:
        >>> from prunekernels.filter_ops import cluster_mean_
        >>> grad = torch.tensor([[1.0], [3.0], [5.0]])
        >>> cluster_mean_([grad], [torch.tensor([0, 0, -1], dtype=torch.int32)])
        >>> grad.flatten().tolist()
        [2.0, 2.0, 5.0]
    """
    if grads:
        ops.cluster_mean_(list(grads), list(clusters), list(weights or ()), strength)
