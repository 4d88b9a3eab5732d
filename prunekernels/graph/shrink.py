"""shrink: a small network of plain layers that computes what the masked one does."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal, overload

import torch
from torch import fx, nn

from .analysis import ChannelAnalysis
from .build import Builder
from .known_example import remember_example
from .layer_uses import any_weights
from .narrow import LITERALS, Narrowing, kept_in_forward, multiply_adds
from .optimizer import Origin, gather_optimizer
from .trace import Traced, plain_copy, read_example, trace
from .verify import Misfit, verify, verify_module

Form = Literal["auto", "module", "graph"]
WIDER = 1.1  # times the multiply-adds of the graph form, from which on "auto" gives that
Made = tuple[nn.Module, Mapping[int, Origin], str]  # the small network, where its parameters are from, what to print


@overload
def shrink(
    model: nn.Module, example_input: Any, *, optimizer: None = None, form: Form = "auto", fold_constants: bool = False
) -> nn.Module: ...
@overload
def shrink(
    model: nn.Module,
    example_input: Any,
    *,
    optimizer: torch.optim.Optimizer,
    form: Form = "auto",
    fold_constants: bool = False,
) -> tuple[nn.Module, torch.optim.Optimizer]: ...
def shrink(
    model: nn.Module,
    example_input: Any,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    form: Form = "auto",
    fold_constants: bool = False,
) -> nn.Module | tuple[nn.Module, torch.optim.Optimizer]:
    """Builds a small network of plain torch.nn layers with the outputs that model has in eval mode.

    Filters that are dead, or whose outputs no layer reads, are gone, and so is everything that processed them. Channels
    that meet in an add keep the union of what its operands keep. Each group of a grouped convolution keeps channels of
    its own, as many as the group that keeps most. Single dead kernels stay as zeros. Masks alone decide: whatever the
    weights are, a network without masks keeps everything. The small network comes in one of two forms.

    The *module form* is a copy of model in which layers are small: the same class and forward, any image size and batch
    that model takes, keyword arguments, hooks, several outputs. Operators without a rule get all of their channels, and
    where the forward splits a value into equal parts, all parts keep as many channels as the largest. Paths of the
    forward that the example does not take, for other arguments say, are neither traced nor compared.

    The *graph form* is a torch.fx.GraphModule made of the operators that one run of model executed. Operators without a
    rule get the full width from an index, so their inputs can be small; a channel that is padded, gathered or cut may
    go. Batch and image size are free where torch.export allows it; another size is an error. It exports to ONNX. A
    network whose forward depends on values, as that of a detector that chooses boxes, has the module form alone.

    The result is compared with model before it is returned, at several sizes and batches: one line is printed, and a
    difference beyond rounding raises RuntimeError. model itself does not change. save_small writes the result to files.

    Args:
        model: The masked network; any network that torch.export can trace.
        example_input: What model takes: a tensor such as [N, C, H, W], a tuple or a dict of arguments (see Example).
        optimizer: An optimizer over model's parameters (or a wrapper with it), whose state the small network's training
            goes on from.
        form: "module", "graph", or "auto": the module form, and the graph form where that does not serve or saves 10 %
            more of the multiply-adds.
        fold_constants: True lets values decide as well as masks: a channel that holds a constant, because its weights
            are zero or because a plain norm follows a dead filter, is folded into the next bias where that is exact (no
            padding in between). Not for networks that are still untrained: norms that begin with zeros make constants
            of whole branches. Gives the graph form.

    Returns:
        The small network; with optimizer, a tuple of the small network and an optimizer of the same class for it, whose
        state is the part of the old one that belongs to the parameters that are left.

    Examples:
        >>> model = torch.nn.Sequential(pk.MaskedConv2d(3, 8, 3), torch.nn.ReLU(), pk.MaskedConv2d(8, 4, 1))
        >>> model[0].set_masks(filter=torch.arange(8) < 5)
        >>> small = pk.shrink(model, torch.randn(2, 3, 16, 16))  # doctest: +ELLIPSIS
        shrink: module form, 260 -> 164 parameters; max abs difference ...
        >>> small
        Sequential(
          (0): Conv2d(3, 5, kernel_size=(3, 3), stride=(1, 1))
          (1): ReLU()
          (2): Conv2d(5, 4, kernel_size=(1, 1), stride=(1, 1))
        )
    """
    if form not in ("auto", "module", "graph"):
        raise ValueError(f"shrink: form: expected 'auto', 'module' or 'graph', got {form!r}")
    if fold_constants and form == "module":
        raise ValueError(
            "shrink: form: expected 'graph' or 'auto' with fold_constants=True, got 'module': constants are folded "
            "into biases, for which the forward of a module may have no place"
        )
    traced = trace("shrink", model, example_input)
    small, origins, line = _make(model, traced, example_input, form, fold_constants)
    print(line)
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in small.named_modules():
        module.training = modes.get(name, model.training)
    remember_example(small, read_example("shrink", example_input))
    if optimizer is None:
        return small
    return small, gather_optimizer(optimizer, model, small, origins)


def _make(model: nn.Module, traced: Traced, example_input: Any, form: Form, fold_constants: bool) -> Made:
    if traced.by_values:
        if form == "graph" or fold_constants:
            asked = "fold_constants=True" if fold_constants else "form='graph'"
            raise ValueError(
                f"shrink: form: expected a network whose path does not depend on values with {asked}: give it "
                "form='module', or a part of the network"
            )
        form = "module"
    if form == "graph" or fold_constants:
        return _graph_form(model, traced, example_input, fold_constants, "")
    try:
        made, more = _module_form(model, traced)
    except Misfit as misfit:
        if form == "module":
            raise RuntimeError(f"shrink: form: expected a network that the module form serves, but {misfit}") from None
        return _graph_form(model, traced, example_input, False, f" (module form: {misfit})")
    if form == "auto" and more > WIDER:
        with suppress(Exception):
            why = f" (module form: {more:.2f} times the multiply-adds; form='module' gives it all the same)"
            return _graph_form(model, traced, example_input, False, why)
    return made


def _module_form(model: nn.Module, traced: Traced) -> tuple[Made, float]:
    """Also returns how many times the multiply-adds of the graph form it has.

    Tries several times: numbers in the forward may be computed from sizes, or else be constants.
    """
    tensors = any_weights(model, traced)
    misfit: Misfit | None = None
    tried: object = None
    for literal in LITERALS:
        analysis = ChannelAnalysis(traced, tensors, constants=False)
        least = multiply_adds(analysis, analysis.kept())
        kept = kept_in_forward(analysis, literal=literal)
        narrowing = Narrowing.of(analysis, kept)
        if narrowing.counts == tried:
            continue
        small = plain_copy(model)
        origins = narrowing.apply(small)
        try:
            line = verify_module(model, small, traced, narrowing.apply, tensors)
        except Misfit as error:
            misfit, tried = misfit or error, narrowing.counts
            continue
        more = multiply_adds(analysis, kept) / max(least, 1)
        line += f"; {more:.2f} times the multiply-adds of the graph form" if more > WIDER else ""
        return (small, origins, line), more
    assert misfit is not None
    raise misfit


def _graph_form(model: nn.Module, traced: Traced, example_input: Any, fold_constants: bool, why: str) -> Made:
    """Tries traces of less and less freedom. traced: with a free batch."""
    analysis = _analysed(model, traced, fold_constants)
    kept = Narrowing.of(analysis, analysis.kept())
    with suppress(Exception):  # the forward may need the sizes of the example
        free = _analysed(model, trace("shrink", model, example_input, "images"), fold_constants)
        if Narrowing.of(free, free.kept()).counts == kept.counts:
            return _built(model, free, why)
    with suppress(Exception):
        return _built(model, analysis, why)
    return _built(model, _analysed(model, trace("shrink", model, example_input, "none"), fold_constants), why)


def _analysed(model: nn.Module, traced: Traced, fold_constants: bool) -> ChannelAnalysis:
    tensors = None if fold_constants else any_weights(model, traced)
    return ChannelAnalysis(traced, tensors, constants=fold_constants)


def _built(model: nn.Module, analysis: ChannelAnalysis, why: str) -> Made:
    builder, needed = _choose(analysis)
    builder.add_inputs()
    for node in analysis.traced.graph.nodes:
        if node in needed and node.op not in ("placeholder", "output"):
            builder.add(node, analysis.rules[node].emit(builder, node))
    small = builder.finish()
    return small, builder.origins, verify(model, small, builder, why)


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
