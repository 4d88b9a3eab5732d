"""Operators of a training step besides the convolutions: their fallbacks in pure torch, and their fake kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from . import extension, mask_table
from .fallback import _DTYPES, _check_scale, _expect

ops = extension.ops
SCHEMAS = (
    "masked_sgd_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momenta, Tensor?[] masks,"
    " Tensor(c!)[] abs_updates, Tensor(d!)[] square_updates, float lr, float momentum, float dampening,"
    " float weight_decay, bool nesterov, bool first_step) -> ()",
    "masked_adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] steps, Tensor?[] masks, Tensor(e!)[] abs_updates, Tensor(f!)[] square_updates, float lr,"
    " float beta1, float beta2, float eps, float weight_decay) -> ()",
    "mask_grad_(Tensor(a!)[] grads, Tensor?[] masks, Tensor?[] grad_scales, Tensor[] weights,"
    " Tensor(b!)[] accumulated, Tensor(c!)[] abs_sums, Tensor(d!)[] square_sums, Tensor(e!)[] product_sums,"
    " bool add_to_sums) -> ()",
    "filter_norms(Tensor[] weights, Tensor?[] masks, bool per_kernel) -> (Tensor[] abs_sums, Tensor[] square_sums)",
    "channel_mean(Tensor[] xs, bool relu) -> Tensor[]",
    "cluster_mean_(Tensor(a!)[] grads, Tensor[] clusters, Tensor[] weights, float strength) -> ()",
)


# ---- fallbacks ------------------------------------------------------------------------------------------------------


def live_elements(op: str, mask: Tensor | None, parameter: Tensor) -> Tensor | None:
    """Which elements of a parameter are live, bool, to broadcast against it; None: nothing is dead."""
    if mask is None:
        return None
    K, C, G = mask[1:4].tolist()
    is_vector = parameter.dim() == 1
    fits = parameter.dim() and len(parameter) == K and (is_vector or parameter.shape[1] == C // G)
    got = f"one of {K} filters of {C // G} channels"
    _expect(bool(fits), op, "masks", f"a table for a parameter {list(parameter.shape)}", got)
    if is_vector:
        return mask_table.live_filters(mask, K)
    return mask_table.live_kernels(mask, K, C, C // G).view(K, C // G, *[1] * (parameter.dim() - 2))


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
    """Writes the live elements of the second tensor of each pair into the first."""
    for target, new in pairs:
        target.copy_(new if live is None else torch.where(live, new, target))


def _put_updates(i: int, before: Tensor, after: Tensor, abs_updates, square_updates) -> None:
    """Writes the sums over each row of |after - before| and of its square to place i of the lists."""
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


def _sum_type(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _check_length(op: str, argument: str, values: list, count: int, may_be_empty: bool = True) -> None:
    holds = len(values) == count or (may_be_empty and not values)
    _expect(holds, op, argument, f"{count} tensors", len(values))


def _check_tensors(op: str, argument: str, tensors: list[Tensor]) -> None:
    for tensor in tensors:
        _expect(tensor.dtype in _DTYPES, op, argument, "float32, float64, bfloat16 or float16", tensor.dtype)
        _expect(tensor.dtype == tensors[0].dtype, op, argument, tensors[0].dtype, tensor.dtype)
        _expect(tensor.dim() >= 1, op, argument, "tensors of at least one dimension", list(tensor.shape))


def _check_mask_grad(op, grads, named, sums, weights):
    count = len(grads)
    _check_tensors(op, "grads", grads)
    for name, values in (named | sums).items():
        _check_length(op, name, values, count)
    _check_length(op, "weights", weights, count, not sums["product_sums"])
    for i, grad in enumerate(grads):
        K, expected = len(grad), _sum_type(grad)
        for name, values in sums.items():
            if values and values[i].numel():
                holds = values[i].shape == (K,) and values[i].dtype == expected
                _expect(holds, op, name, f"{expected} [{K}], contiguous", f"{values[i].dtype} {list(values[i].shape)}")
        accumulated = named["accumulated"]
        if accumulated and accumulated[i].numel():
            _expect(accumulated[i].dtype == expected, op, "accumulated", expected, accumulated[i].dtype)
            _expect(accumulated[i].shape == grad.shape, op, "accumulated", list(grad.shape), list(accumulated[i].shape))
        if named["grad_scales"]:
            _check_scale(op, named["grad_scales"][i], K)


def mask_grad_(grads, masks, grad_scales, weights, accumulated, abs_sums, square_sums, product_sums, add_to_sums):
    op = "mask_grad_"
    named = {"masks": masks, "grad_scales": grad_scales, "accumulated": accumulated}
    sums = {"abs_sums": abs_sums, "square_sums": square_sums, "product_sums": product_sums}
    _check_mask_grad(op, grads, named, sums, weights)
    for i, grad in enumerate(grads):
        live = live_elements(op, masks[i], grad) if masks else None
        live = torch.ones_like(grad, dtype=torch.bool) if live is None else live.expand_as(grad)
        if grad_scales and grad_scales[i] is not None:
            scale = grad_scales[i].to(_sum_type(grad)).view(-1, *[1] * (grad.dim() - 1))
            grad.copy_((grad * scale).to(grad.dtype))
            live = live & (scale != 0)
        grad.copy_(torch.where(live, grad, 0))
        g = grad.to(_sum_type(grad))
        if accumulated and accumulated[i].numel():
            accumulated[i].add_(g)
        terms = {"abs_sums": g.abs(), "square_sums": g * g}
        if product_sums and product_sums[i].numel():
            terms["product_sums"] = torch.where(live, weights[i], 0).to(g.dtype) * g
        for name, values in sums.items():
            if values and values[i].numel():
                total = terms[name].reshape(len(g), -1).sum(1)
                values[i].copy_(values[i] + total if add_to_sums else total)


def filter_norms(weights, masks, per_kernel):
    op = "filter_norms"
    _check_tensors(op, "weights", weights)
    _check_length(op, "masks", masks, len(weights))
    abs_sums, square_sums = [], []
    for i, weight in enumerate(weights):
        enough = weight.dim() >= 2 or not per_kernel
        _expect(enough, op, "weights", "two or more dimensions for norms of kernels", list(weight.shape))
        live = live_elements(op, masks[i], weight) if masks else None
        wide = weight.to(_sum_type(weight))
        wide = wide if live is None else torch.where(live, wide, 0)
        rows = wide.reshape(*weight.shape[: 2 if per_kernel else 1], -1)
        abs_sums.append(rows.abs().sum(-1))
        square_sums.append((rows * rows).sum(-1))
    return abs_sums, square_sums


def channel_mean(xs, relu):
    means = []
    for x in xs:
        _expect(x.dim() >= 2, "channel_mean", "xs", "tensors [N, C, ...]", list(x.shape))
        flat = x.relu().double().transpose(0, 1).flatten(1) if relu else x.double().transpose(0, 1).flatten(1)
        means.append(flat.mean(1).float() if flat.shape[1] else flat.new_zeros(len(flat), dtype=torch.float32))
    return means


def cluster_mean_(grads, clusters, weights, strength):
    op = "cluster_mean_"
    _check_length(op, "clusters", clusters, len(grads), False)
    _check_length(op, "weights", weights, len(grads))
    _check_tensors(op, "grads", grads)
    for i, (grad, ids) in enumerate(zip(grads, clusters, strict=True)):
        holds = ids.dtype == torch.int32 and ids.shape == grad.shape[:1]
        _expect(holds, op, "clusters", f"int32 [{len(grad)}] on the CPU", f"{ids.dtype} {list(ids.shape)}")
        for cluster in ids.unique().tolist():
            members = (ids == cluster).nonzero().flatten().to(grad.device)
            if cluster < 0 or len(members) < 2:
                continue
            new = grad[members].to(_sum_type(grad)).mean(0, keepdim=True)
            if weights:
                w = weights[i][members].to(_sum_type(grad))
                new = new + strength * (w - w.mean(0, keepdim=True))
            grad[members] = new.expand(len(members), *grad.shape[1:]).to(grad.dtype)


OPERATORS = (masked_sgd_, masked_adamw_, mask_grad_, filter_norms, channel_mean, cluster_mean_)


extension.register(SCHEMAS, OPERATORS)


# ---- shapes ---------------------------------------------------------------------------------------------------------


def _nothing(*args):
    return None


for _name in ("masked_sgd_", "masked_adamw_", "mask_grad_", "cluster_mean_"):
    torch.library.register_fake(f"prunekernels::{_name}", _nothing)


@torch.library.register_fake("prunekernels::filter_norms")
def _(weights, masks, per_kernel):
    sizes = [w.shape[: 2 if per_kernel else 1] for w in weights]
    made = [[w.new_empty(size, dtype=_sum_type(w)) for w, size in zip(weights, sizes, strict=True)] for _ in range(2)]
    return made[0], made[1]


@torch.library.register_fake("prunekernels::channel_mean")
def _(xs, relu):
    return [x.new_empty(x.shape[1], dtype=torch.float32) for x in xs]
