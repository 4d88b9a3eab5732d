"""Whether a rebuilt network computes, and trains, as the one that was saved."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import plan
from ..graph.verify import ROUNDING, compare, dtype_of, outcome, resized_inputs
from ..nn.example import Example
from ..nn.reparametrized import deep_copy
from .errors import first_line


class Different(Exception):
    """Says how: "another output, by 0.1, when it trains"."""


def check_same(network: nn.Module, rebuilt: nn.Module, example: Example) -> None:
    """Raises Different unless both networks give the same outputs in eval mode, and outputs and gradients in training.

    In eval mode they also run on other batches and sizes. A graph of shrink may refuse sizes, with an AssertionError.
    """
    eps = torch.finfo(dtype_of(network, example)).eps
    pair = [deep_copy(each).eval() for each in (network, rebuilt)]
    for i, given in enumerate((example, *resized_inputs(example))):
        want = outcome(pair[0], given)
        if isinstance(want, Exception):
            if i == 0:
                raise want
            continue
        got = outcome(pair[1], given)
        if isinstance(got, AssertionError) and i > 0:
            continue
        if isinstance(got, Exception):
            raise Different(f"an error: {first_line(got)}") from got
        _check("another output", {"": want}, {"": got}, eps)
    for given in (example, example.map(lambda x: torch.cat([x, x]) if x.dim() else x)):  # norms may need a batch
        try:
            wanted = training_step(network, given)
        except Exception:
            continue
        try:
            found = training_step(rebuilt, given)
        except Exception as error:
            raise Different(f"an error when it trains: {first_line(error)}") from error
        for what, a, b in zip(("output", "gradient", "statistic"), wanted, found, strict=True):
            _check(f"another {what} when it trains", a, b, eps)
        return


Tensors = Mapping[str, list[Tensor]]


def training_step(network: nn.Module, example: Example) -> tuple[Tensors, Tensors, Tensors]:
    """Outputs of a copy in training mode, gradients of parameters, and buffers afterwards; by name."""
    own = deep_copy(network).train()
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), plan.measure(False):
        torch.manual_seed(0)
        outputs = [leaf for leaf in pytree.tree_leaves(example.call(own)) if isinstance(leaf, Tensor)]
        losses = [out.double().square().sum() for out in outputs if out.requires_grad]
        if losses:
            torch.autograd.backward(losses)
    gradients = {name: [p.grad] for name, p in own.named_parameters() if p.grad is not None}
    return {"": [out.detach() for out in outputs]}, gradients, {name: [b] for name, b in own.named_buffers()}


def _check(what: str, want: Tensors, got: Tensors, eps: float) -> None:
    for name in want.keys() & got.keys():
        difference, magnitude = compare(want[name], got[name])
        if not difference <= ROUNDING * eps * magnitude:
            raise Different(f"{what}{f' of {name}' if name else ''}, by {difference:.3g}")
    if what.startswith("another gradient") and want.keys() - got.keys():
        raise Different(f"no gradient of {sorted(want.keys() - got.keys())[0]} when it trains")
