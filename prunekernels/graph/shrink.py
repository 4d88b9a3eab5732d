"""shrink: a small network of plain layers that computes what the masked one does."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from .analysis import ChannelAnalysis
from .build import Builder
from .optimizer import gather_optimizer
from .trace import trace
from .verify import verify


def shrink(
    model: nn.Module, example_input: Any, *, optimizer: torch.optim.Optimizer | None = None
) -> fx.GraphModule | tuple[fx.GraphModule, torch.optim.Optimizer]:
    """Builds a small network of plain torch.nn layers with the outputs that model has in eval mode.

    Filters that are dead, or whose outputs no layer reads, are gone, and so is everything that processed them. Channels
    that meet in an add keep the union of what its operands keep. A channel that holds a constant is folded into the
    next bias where that is exact (no padding in between) and kept elsewhere. Single dead kernels stay as zeros.
    Operators without a rule get the full width. Layers keep their names. The result trains, takes any batch size and
    images of the example's size, and exports to ONNX.

    The result is compared with model before it is returned: one line is printed, and a difference beyond rounding
    raises RuntimeError with the name of the first layer that differs. model itself does not change.

    Args:
        model: The masked network; any network that torch.export can trace.
        example_input: A tensor or a tuple of tensors, as model takes them, for example [N, C, H, W].
        optimizer: An optimizer over model's parameters (or a wrapper with it), whose state the small network's training
            goes on from.

    Returns:
        The small network; with optimizer, a tuple of the small network and an optimizer of the same class for it, whose
        state is the part of the old one that belongs to the parameters that are left.

    Examples:
        >>> model = torch.nn.Sequential(pk.MaskedConv2d(3, 8, 3), torch.nn.ReLU(), pk.MaskedConv2d(8, 4, 1))
        >>> model[0].set_masks(filter=torch.arange(8) < 5)
        >>> small = pk.shrink(model, torch.randn(2, 3, 16, 16))  # doctest: +ELLIPSIS
        shrink: 260 -> 164 parameters; max abs difference ...
        >>> getattr(small, "0")
        Conv2d(3, 5, kernel_size=(3, 3), stride=(1, 1))
    """
    analysis = ChannelAnalysis(trace("shrink", model, example_input))
    builder, needed = _choose(analysis)
    builder.add_inputs()
    for node in analysis.traced.graph.nodes:
        if node in needed and node.op not in ("placeholder", "output"):
            builder.add(node, analysis.rules[node].emit(builder, node))
    small = builder.finish()
    print(verify(model, small, builder))
    small.train(model.training)
    if optimizer is None:
        return small
    return small, gather_optimizer(optimizer, model, small, builder.origins)


def _choose(analysis: ChannelAnalysis) -> tuple[Builder, set[fx.Node]]:
    """A builder over the channels that are kept, and the nodes that it has to compute.

    A value of which nothing would be kept keeps its first channel, since layers without channels do not run.
    """
    while True:
        builder = Builder("shrink", analysis, analysis.kept())
        needed: set[fx.Node] = set()
        for node in reversed(analysis.traced.graph.nodes):
            has_effect = node in analysis.traced.exposed and node.op == "call_function"
            if node in analysis.rules and (node in needed or node.op == "output" or has_effect):
                needed.add(node)
                needed.update(analysis.rules[node].operands(builder, node))
        tracked = [x for node in needed if (x := analysis.tracked(node)) is not None]
        empty = [x for x in tracked if len(x) > 0 and builder.kept.of(x).numel() == 0]
        if not empty:
            return builder, needed
        for x in empty:
            analysis.classes.pin(x.ids[:1])
