"""Batch norm with the statistics of all processes (ranks) of a group: what MaskedSyncBatchNorm computes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_HALF = (torch.bfloat16, torch.float16)
_OVER = (0, 2, 3)


class Ranks(NamedTuple):
    """How the channels of a compact tensor stand among those that all ranks speak of.

    What ranks exchange has the full width, so that ranks whose masks differ for a step do not wait for each other.
    """

    rows: Tensor  # int64 [count]: which channel each one is
    is_live: Tensor | None  # bool [count]: False for padding; None: there is none
    channels: int
    group: Any  # of torch.distributed; None: the default one

    def spread(self, values: Tensor) -> Tensor:
        """[k, count] -> [k, channels], zeros where this rank has nothing."""
        if self.is_live is not None:
            values = torch.where(self.is_live, values, values.new_zeros(()))
        return values.new_zeros(values.shape[0], self.channels).index_copy_(1, self.rows, values)

    def gather(self, values: Tensor) -> Tensor:
        """[k, count] of each rank -> [ranks, k, count]"""
        own = self.spread(values)
        found = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(found, own, group=self.group)
        return torch.stack(found).index_select(2, self.rows)

    def sum(self, values: Tensor) -> Tensor:
        """[k, count] of each rank -> their sums, [k, count]"""
        total = self.spread(values)
        dist.all_reduce(total, group=self.group)
        return total.index_select(1, self.rows)


class Moments(NamedTuple):
    """Of each channel over all ranks, [count]."""

    mean: Tensor
    var: Tensor  # biased
    values: Tensor  # how many there were, as a floating-point number

    @property
    def unbiased_var(self) -> Tensor:
        return self.var * (self.values / (self.values - 1).clamp(min=1))


def moments_of_all(x: Tensor, ranks: Ranks) -> Moments:
    """Combines the moments of each rank's values. x: [N, count, H, W]; N may differ among ranks and be 0."""
    wide = x.float() if x.dtype in _HALF else x
    values = x.numel() // max(x.shape[1], 1)
    own = wide.new_zeros(3, x.shape[1])
    if values:
        var, own[0] = torch.var_mean(wide, _OVER, correction=0)
        own[1], own[2] = var * values, values
    mean, square, count = ranks.gather(own).unbind(1)
    total = count.sum(0)
    safe = total.clamp(min=1)
    of_all = (count * mean).sum(0) / safe
    square = (square + count * (mean - of_all).square()).sum(0)
    return Moments(of_all, square / safe, total)


class SyncedNorm(torch.autograd.Function):
    """(x - mean) / deviation * weight + bias, where mean and deviation are those of all ranks' values.

    The gradient of x takes the other ranks' losses into account. Those of weight and bias are of this rank's loss
    alone, as DistributedDataParallel averages them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, moments: Moments, ranks: Ranks, eps: float
    ) -> Tensor:
        mean, var, count = moments
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.ranks, ctx.eps, ctx.bias_dtype = ranks, eps, None if bias is None else bias.dtype
        return _normalized(x, mean, var, weight, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        along = torch.ones_like(mean)
        sums = torch.zeros_like(mean), torch.zeros_like(mean)
        if x.numel():
            _, *sums = torch.ops.aten.native_batch_norm_backward(
                grad, x, along, mean, var, None, None, False, ctx.eps, [False, True, True]
            )
        of_weight, of_bias = sums
        grad_x = None
        if ctx.needs_input_grad[0]:
            means = ctx.ranks.sum(torch.stack((of_weight, of_bias))) / count.clamp(min=1)
            scale = (var + ctx.eps).rsqrt() * (along if weight is None else weight.to(mean.dtype))
            if ctx.ranks.is_live is not None:
                scale = torch.where(ctx.ranks.is_live, scale, scale.new_zeros(()))
            grad_x = _normalized(x, mean, var, -scale * means[0], -scale * means[1], ctx.eps)
            grad_x.addcmul_(grad, scale.view(1, -1, 1, 1))
        grads = (
            of_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            of_bias.to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None,
        )
        return grad_x, *grads, None, None, None


def _normalized(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    weight, bias = (None if p is None else p.to(mean.dtype) for p in (weight, bias))
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps) if x.numel() else torch.empty_like(x)
