"""What the small network of compacted mode has of each convolution, and why it keeps filters that are dead."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from ..compaction.compaction import Compaction
from ..graph.analysis import ChannelAnalysis
from ..graph.channels import Channels
from ..graph.layer_uses import any_weights, filter_uses
from ..graph.narrow import kept_in_forward
from ..graph.rules.base import UNKNOWN
from ..graph.rules.layers import WeightRule
from ..graph.rules.norms import NormRule
from ..graph.trace import Traced, trace
from ..nn.masked_filters import MaskedFilters
from .flops import count_flops

SHOWN = 3  # names of a list, before it is cut short


@dataclass
class _Class:
    """Channels that stay or go together: where one of them is not zero although no operand of the node has it."""

    live_in: dict[str, int] = field(default_factory=dict)  # convolutions and linear layers, with their places
    constant_in: dict[str, int] = field(default_factory=dict)  # norms
    nonzero_behind: dict[str, int] = field(default_factory=dict)  # other operators
    taken_by: dict[str, int] = field(default_factory=dict)  # operators without a small form


def filters(model: nn.Module, compaction: Compaction) -> tuple[dict[str, int], dict[str, str]]:
    """By name of a layer: how many filters the small network has, and what dead ones are among them, and why."""
    counts: dict[str, int] = {}
    dead: dict[str, int] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Conv2d, MaskedFilters)) and name not in compaction.wide:
            rows = compaction.rows(name)
            counts[name] = layer.out_channels if rows is None else rows.numel()
            if rows is not None and (zeros := int((rows < 0).sum())):
                dead[name] = zeros
    why = _reasons(model, trace("explain", model, compaction.example), dead) if dead else {}
    unknown = "the trace does not follow its channels"
    return counts, {name: f"{count} dead filters as zeros: {why.get(name, unknown)}" for name, count in dead.items()}


def excess(model: nn.Module, compaction: Compaction, example_input: Any) -> float:
    """Multiply-adds of the small network over those without the dead filters that it has as zeros."""
    small = compaction.net
    all_of_it = without = 0.0
    for row in count_flops(model, example_input).rows:
        whole, part = model.get_submodule(row["layer"]).weight, small.get_submodule(row["layer"]).weight
        cost = row["dense"] * part.numel() / whole.numel()  # type: ignore[operator, union-attr]
        rows = None if row["layer"] in compaction.wide else compaction.rows(row["layer"])
        all_of_it += cost
        without += cost if rows is None else cost * int((rows >= 0).sum()) / rows.numel()
    return all_of_it / without if without else 1.0


def _reasons(model: nn.Module, traced: Traced, names: Collection[str]) -> dict[str, str]:
    analysis = ChannelAnalysis(traced, any_weights(model, traced), constants=False)
    kept = kept_in_forward(analysis, literal=0)
    roots = analysis.classes.roots()
    classes = _classes(analysis, roots)
    in_groups = {int(root) for groups in analysis.groups for ids in groups for root in roots[ids].flatten()}
    found = {}
    for name, uses in filter_uses(analysis, model).items():
        layer = model.get_submodule(name) if name in names else None
        if isinstance(layer, MaskedFilters):
            live = (layer.filter_mask & layer.hard_mask).tolist()
            out = uses[0][1]
            staying = [i for i in kept.of(out).tolist() if not live[i]]
            its = [int(root) for root in roots[out.ids[staying]]]
            known = [classes.get(root, _Class()) for root in its]
            beside = 1 < layer.groups == layer.in_channels < layer.out_channels
            lacking = any(root in in_groups and root not in classes for root in its)
            found[name] = _text(name, known, beside, lacking)
    return found


def _classes(analysis: ChannelAnalysis, roots: Tensor) -> dict[int, _Class]:
    classes: dict[int, _Class] = {}
    traced = analysis.traced
    for place, (node, rule) in enumerate(analysis.rules.items()):
        given = {int(root) for x in _operands(analysis, node) for root in roots[x.ids[x.live]]}
        state = analysis.tracked(node)
        arising = set() if state is None else {int(root) for root in roots[state.ids[state.needed]]} - given
        for root in arising:
            its = classes.setdefault(root, _Class())
            if isinstance(rule, WeightRule):
                its.live_in[rule.name(traced, node)] = place
            elif isinstance(rule, NormRule):
                its.constant_in[rule.name(traced, node)] = place
            else:
                its.nonzero_behind[traced.describe(node)] = place
        if rule is UNKNOWN:
            for root in {int(root) for x in _operands(analysis, node) for root in roots[x.ids]}:
                taker = "the network's output" if node.op == "output" else traced.describe(node)
                classes.setdefault(root, _Class()).taken_by[taker] = place
    return classes


def _operands(analysis: ChannelAnalysis, node: fx.Node) -> Iterable[Channels]:
    for operand in node.all_input_nodes:
        state = analysis.states.get(operand)
        yield from (x for x in (state if isinstance(state, list) else [state]) if x is not None)


def _text(name: str, classes: Collection[_Class], beside: bool, lacking: bool) -> str:
    """beside: several filters of the layer read the same channel. lacking: it is in a group that is not the largest."""
    live = _names((each.live_in for each in classes), name)
    norms = _names((each.constant_in for each in classes), name)
    others = _names((each.nonzero_behind for each in classes), name)
    takers = _names((each.taken_by for each in classes), name)
    told = [
        "in groups with live ones" if beside else f"coupled with live ones of {live}" if live else "",
        f"not masked in {norms}" if norms else "",
        f"not zero behind {others}" if others else "",
        f"all channels go into {takers}" if takers else "",
        "each group has as many as the largest" if lacking else "",
    ]
    return "; ".join(filter(None, told)) or "the forward wants as many channels here as in another place"


def _names(found: Iterable[dict[str, int]], own: str) -> str:
    places = {name: place for each in found for name, place in each.items() if name != own}
    names = sorted(places, key=lambda name: places[name])
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
