"""Operators of a training step besides the convolutions: fake kernels, and twins in pure torch for want of kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _ext, _table
from ._fallback import _DTYPES, _expect

ops = _ext.ops
SCHEMAS = (
    "masked_sgd_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momenta, Tensor?[] masks,"
    " Tensor(c!)[] abs_updates, Tensor(d!)[] square_updates, float lr, float momentum, float dampening,"
    " float weight_decay, bool nesterov, bool first_step) -> ()",
    "masked_adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] steps, Tensor?[] masks, Tensor(e!)[] abs_updates, Tensor(f!)[] square_updates, float lr,"
    " float beta1, float beta2, float eps, float weight_decay) -> ()",
)


# ---- twins ----------------------------------------------------------------------------------------------------------


def live_elements(op: str, mask: Tensor | None, parameter: Tensor) -> Tensor | None:
    """bool, to broadcast against the parameter; None: nothing is dead."""
    if mask is None:
        return None
    K, C, G = mask[1:4].tolist()
    is_vector = parameter.dim() == 1
    fits = parameter.dim() and len(parameter) == K and (is_vector or parameter.shape[1] == C // G)
    got = f"one of {K} filters of {C // G} channels"
    _expect(bool(fits), op, "masks", f"a table for a parameter {list(parameter.shape)}", got)
    if is_vector:
        return _table.live_filters(mask, K)
    return _table.live_kernels(mask, K, C, C // G).view(K, C // G, *[1] * (parameter.dim() - 2))


def _check_lists(op: str, weights: list[Tensor], lists: dict[str, list], sums: dict[str, list[Tensor]]) -> None:
    for name, values in (lists | {k: v for k, v in sums.items() if v}).items():
        _expect(len(values) == len(weights), op, name, f"{len(weights)} tensors, one per weight", len(values))
    for i, weight in enumerate(weights):
        _expect(weight.dtype in _DTYPES, op, "weights", "float32, float64, bfloat16 or float16", weight.dtype)
        _expect(weight.dtype == weights[0].dtype, op, "weights", weights[0].dtype, weight.dtype)
        for name, values in lists.items():
            if name in ("masks", "steps"):
                continue
            _expect(values[i].layout == torch.strided, op, name, "dense tensors", values[i].layout)
            _expect(values[i].dtype == weight.dtype, op, name, weight.dtype, values[i].dtype)
            same = values[i].shape == weight.shape
            _expect(same, op, name, f"{list(weight.shape)} as its weight", list(values[i].shape))
        for name, values in sums.items():
            if values and values[i].numel():
                _expect(
                    weight.dim() >= 2, op, name, "no sums for a parameter of fewer than two dimensions", weight.shape
                )


def _write(live: Tensor | None, pairs: list[tuple[Tensor, Tensor]]) -> None:
    for target, new in pairs:
        target.copy_(new if live is None else torch.where(live, new, target))


def _put_updates(i: int, before: Tensor, after: Tensor, abs_updates, square_updates) -> None:
    for updates, power in ((abs_updates, 1), (square_updates, 2)):
        if updates and updates[i].numel():
            updates[i].copy_((after - before).float().abs().pow(power).flatten(1).sum(1))


def masked_sgd_(
    weights, grads, momenta, masks, abs_updates, square_updates, lr, momentum, dampening, weight_decay, nesterov,
    first_step,
):  # fmt: skip
    op = "masked_sgd_"
    lists = {"grads": grads, "masks": masks} | ({"momenta": momenta} if momentum else {})
    _check_lists(op, weights, lists, {"abs_updates": abs_updates, "square_updates": square_updates})
    for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        live, before = live_elements(op, masks[i], weight), weight.clone()
        d = grad.add(weight, alpha=weight_decay) if weight_decay else grad
        update = d
        if momentum:
            buffer = d if first_step else momenta[i].mul(momentum).add_(d, alpha=1 - dampening)
            update = d.add(buffer, alpha=momentum) if nesterov else buffer
            _write(live, [(momenta[i], buffer)])
        _write(live, [(weight, weight.add(update, alpha=-lr))])
        _put_updates(i, before, weight, abs_updates, square_updates)


def masked_adamw_(
    weights, grads, exp_avgs, exp_avg_sqs, steps, masks, abs_updates, square_updates, lr, beta1, beta2, eps,
    weight_decay,
):  # fmt: skip
    op = "masked_adamw_"
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps, "masks": masks}
    _check_lists(op, weights, lists, {"abs_updates": abs_updates, "square_updates": square_updates})
    for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        live, before, t = live_elements(op, masks[i], weight), weight.clone(), float(steps[i].add_(1))
        exp_avg = exp_avgs[i].lerp(grad, 1 - beta1)
        exp_avg_sq = exp_avg_sqs[i].mul(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (exp_avg_sq.sqrt() / (1 - beta2**t) ** 0.5).add_(eps)
        decayed = weight.mul(1 - lr * weight_decay) if weight_decay else weight
        after = decayed.addcdiv(exp_avg, root, value=-(lr / (1 - beta1**t)))
        _write(live, [(exp_avgs[i], exp_avg), (exp_avg_sqs[i], exp_avg_sq), (weight, after)])
        _put_updates(i, before, weight, abs_updates, square_updates)


OPERATORS = (masked_sgd_, masked_adamw_)


def _register() -> None:
    if not _ext.has_extension():
        for schema in SCHEMAS:
            _ext._library.define(schema)
    key = "CUDA" if _ext.has_extension() else "CompositeExplicitAutograd"
    for operator in OPERATORS:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"prunekernels::{operator.__name__}", key):
            _ext._library.impl(operator.__name__, operator, key)


_register()


# ---- shapes ---------------------------------------------------------------------------------------------------------


@torch.library.register_fake("prunekernels::masked_sgd_")
def _(*args):
    return None


@torch.library.register_fake("prunekernels::masked_adamw_")
def _(*args):
    return None
