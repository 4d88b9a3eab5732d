"""What torch.utils.flop_counter.FlopCounterMode counts for the operators: the work on what is live.

A multiply-add counts as two, as in torch's own formulas. Operators that are not here count as nothing, as torch's
copies, norms and elementwise operators do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.utils.flop_counter import register_flop_formula

from . import mask_table
from .extension import ops


def _flops(batch: int, plane: torch.Size, weight: Tensor, mask: Tensor | None) -> int:
    """2 N P Q R S times the live pairs of filter and input channel; a table without values counts as all live."""
    pairs = weight.shape[0] * weight.shape[1]
    if mask is not None and not mask.is_meta and detect_fake_mode((mask,)) is None:
        pairs = int(mask[mask_table.LIVE_PAIRS])
    taps = weight.shape[2:].numel()
    return 2 * batch * plane.numel() * taps * pairs


@register_flop_formula(ops.masked_conv2d, get_raw=True)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, *_: Any, out_val: Tensor, **__: Any) -> int:
    return _flops(x.shape[0], out_val.shape[2:], weight, mask)


@register_flop_formula(ops.masked_conv2d_grad_input, get_raw=True)
def _(grad_out: Tensor, weight: Tensor, mask: Tensor | None, *_: Any, **__: Any) -> int:
    return _flops(grad_out.shape[0], grad_out.shape[2:], weight, mask)


@register_flop_formula(ops.masked_conv2d_grad_weight, get_raw=True)
def _(grad_out: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None, *_: Any, **__: Any) -> int:
    return _flops(grad_out.shape[0], grad_out.shape[2:], weight, mask)
