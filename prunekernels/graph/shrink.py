"""shrink: a small network of plain layers that computes what the masked one does."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from .build import Build
from .channels import Flow
from .optimizer import gather_optimizer
from .trace import trace
from .verify import verify


def shrink(
    model: nn.Module, example_input: Any, *, optimizer: torch.optim.Optimizer | None = None
) -> fx.GraphModule | tuple[fx.GraphModule, torch.optim.Optimizer]:
    """A small network of plain torch.nn layers with the outputs that model has in eval mode; model stays as it is.

    example_input: a tensor or a tuple of tensors, as model takes them. Filters that are dead or that nobody reads are
    gone, with everything that saw them; what meets in an add is widened to the union. A channel that is a constant is
    folded into the next bias where that is exact (no padding in between) and kept elsewhere. Single dead kernels stay
    as zeros. Operators nobody wrote a rule for get the full width. Layers keep their names; the result trains, takes
    any batch size, images of the example's size, and exports to ONNX. It is compared with model before it is returned:
    one line is printed, and a difference is an error that names the layer. optimizer: one over model's parameters;
    then returns (small network, its optimizer) with the state gathered.

        >>> small = pk.shrink(model, torch.randn(1, 3, 32, 32))
        >>> small, small_optimizer = pk.shrink(model, images, optimizer=optimizer)
    """
    traced = trace("shrink", model, example_input)
    build = Build("shrink", Flow(traced))
    small = build.network
    print(verify(model, build))
    small.train(model.training)
    if optimizer is None:
        return small
    return small, gather_optimizer(optimizer, model, small, build.origins)
