"""Compiles the rules of a traced network into a channel program."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from ..nn.masked_filters import MaskedFilters
from ..nn.masked_norm import MaskedNorm
from .analysis import ChannelAnalysis
from .channel_program import (
    Input,
    MaskArrays,
    MeetStep,
    NormOverChannelsStep,
    NormStep,
    Places,
    Program,
    Step,
    Term,
    TogetherStep,
    WeightStep,
    places,
)
from .channels import Channels
from .rules.base import InsideRule, Rule, SizeRule, TransparentRule
from .rules.elementwise import CatRule, ElementwiseRule
from .rules.layers import PReLURule, WeightRule
from .rules.moves import MoveRule
from .rules.norms import BatchNormRule, NormOverChannelsRule
from .rules.slicing import CreateRule, ItemRule, PadRule, SliceRule, SplitRule
from .trace import Traced, argument

Ints = npt.NDArray[np.int64]
NAN = torch.full((), torch.nan, dtype=torch.float64)


def weights_without_masks(traced: Traced) -> dict[str, Tensor]:
    """Like any_weights for a network in which everything is live, without memory for the values."""
    own = {name for get in ("named_parameters", "named_buffers")
           for name, _ in getattr(traced.model, get)(remove_duplicate=False)}  # fmt: skip
    return {
        name: NAN.expand(t.shape) if name in own and t.is_floating_point() else t for name, t in traced.tensors.items()
    }


@dataclass
class Value:
    """The channels of one value: where each is, and what it holds where it is not live."""

    at: Ints  # [C], places in the program
    constant: Tensor  # float64 [C]

    def __getitem__(self, which: Any) -> Value:
        return Value(self.at[which], self.constant[which])


class Compiler:
    """Walks the network once. masks: of every masked layer, by name, as the steps read them."""

    def __init__(self, analysis: ChannelAnalysis, model: nn.Module) -> None:
        self.analysis = analysis
        self.masks: dict[str, MaskArrays] = {}
        self.sharing: list[tuple[str, str]] = []  # masked layers that have a parameter in common
        self._owners: dict[int, str] = {}  # by id of a parameter of the traced model
        for name, layer in model.named_modules():
            if isinstance(layer, (MaskedFilters, MaskedNorm)):
                self.masks[name] = MaskArrays()
                plain = analysis.traced.model.get_submodule(name)
                for attribute in ("weight", "bias"):
                    if (tensor := getattr(plain, attribute)) is not None:
                        owner = self._owners.setdefault(id(tensor), name)
                        self.sharing += [(owner, name)] if owner != name else []
        self._values: dict[fx.Node, Value | list[Value]] = {}
        self._untracked: dict[tuple[fx.Node, int], Value] = {}
        self._steps: list[Step] = []
        self._ids: list[Tensor] = []
        self._live: list[bool] = []
        self._constants: list[Tensor] = []
        self._read: list[Places] = []

    def compile(self) -> tuple[Program, Tensor]:
        """The program, and the id of the channel at each place."""
        for node, rule in self.analysis.rules.items():
            if self.analysis.states[node] is not None:
                self._values[node] = self._form_of(rule)(self, rule, node)
            elif not isinstance(rule, SizeRule):
                for operand in node.all_input_nodes:
                    if self.analysis.tracked(operand) is not None:
                        self._read.append(self._value(operand).at)
        ids = torch.cat(self._ids) if self._ids else torch.zeros(0, dtype=torch.long)
        live, read = np.array(self._live, dtype=np.bool_), np.zeros(len(self._live), dtype=np.bool_)
        for at in self._read:
            read[at] = True
        constant = torch.cat(self._constants).numpy() if self._constants else read.copy()
        return Program(live, read, constant, self._steps), ids

    def _form_of(self, rule: Rule) -> Callable[[Compiler, Any, fx.Node], Value | list[Value]]:
        for kind, form in FORMS.items():
            if isinstance(rule, kind):
                return form
        raise TypeError(f"channel program: rule: expected one with a form of its own, got {type(rule).__name__}")

    # ---- values

    def _new(self, ids: Tensor, live: Tensor | bool = False, constant: Tensor | float = 0.0) -> Value:
        first = len(self._live)
        self._ids.append(ids)
        self._live += [live] * len(ids) if isinstance(live, bool) else live.tolist()
        constants = torch.zeros(len(ids), dtype=torch.float64) + constant
        self._constants.append(constants != 0)
        return Value(np.arange(first, first + len(ids)), constants)

    def _value(self, node: fx.Node) -> Value:
        if node not in self._values and self.analysis.traced.is_parameter(node):
            x = self._channels(node)
            self._values[node] = self._new(x.ids, live=x.live, constant=x.values.nan_to_num())
        value = self._values[node]
        assert isinstance(value, Value)
        return value

    def _along(self, node: fx.Node, axis: int) -> Value:
        """The channels of an operand along an axis; live, if they are not followed."""
        if self.analysis.tracked(node) is not None:
            return self._value(node)
        if (node, axis) not in self._untracked:
            channels = self.analysis.channels(node, axis)
            assert channels is not None
            self._untracked[node, axis] = self._new(channels.ids, live=True)
        return self._untracked[node, axis]

    def _channels(self, node: fx.Node) -> Channels:
        channels = self.analysis.tracked(node)
        assert channels is not None
        return channels

    def _input(self, value: Value) -> Input:
        constant = (value.constant != 0).numpy()
        return Input(places(value.at), value.at.size, constant if constant.any() else None)

    def _slice(self, value: Value) -> slice:
        first = int(value.at[0]) if value.at.size else 0
        return slice(first, first + value.at.size)

    # ---- masks

    def _masks_of(self, node: fx.Node | None, by_kernel: bool = False) -> MaskArrays | None:
        """What is live of a parameter: by the masks of its layer, or for good."""
        if node is None:
            return None
        traced = self.analysis.traced
        owner = self._owners.get(id(traced.tensors[traced.names[node]]))
        if owner is not None:
            return self.masks[owner]
        tensor = self.analysis.tensor(node)
        assert tensor is not None
        if by_kernel and not bool((tensor != 0).all()):
            return MaskArrays(kernels=(tensor.reshape(*tensor.shape[:2], -1) != 0).any(2).numpy())
        return MaskArrays() if by_kernel or bool((tensor != 0).all()) else MaskArrays(rows=(tensor != 0).numpy())

    # ---- operators that meet, channel by channel

    def _meet(
        self,
        operands: Sequence[Value],
        ids: Tensor,
        outcome: Callable[[list[Tensor]], Tensor],
        whole: Sequence[Value] = (),
    ) -> Value:
        """The channels that outcome makes of the constants of the operands (NaN = live), all float64 [C]."""
        count = range(len(operands))
        none_live = outcome([x.constant for x in operands])
        terms: list[Term] = []
        for size in range(len(operands) + 1):
            for members in itertools.combinations(count, size):
                given = [
                    torch.full_like(x.constant, torch.nan) if i in members else x.constant
                    for i, x in enumerate(operands)
                ]
                is_live = outcome(given).isnan().numpy()
                known = [t for t in terms if set(t.operands) <= set(members)]
                if is_live.any() and not any(term.where is None for term in known):
                    terms.append(Term(members, None if is_live.all() else is_live))
        if len(operands) == 1 and not whole and terms == [Term((0,), None)]:
            if torch.equal(none_live != 0, operands[0].constant != 0):
                return Value(operands[0].at, none_live)
        out = self._new(ids, constant=none_live)
        self._steps.append(
            MeetStep([places(x.at) for x in operands], self._slice(out), terms, [places(x.at) for x in whole])
        )
        return out

    def _transparent(self, rule: TransparentRule, node: fx.Node) -> Value:
        x = argument(node, 0)
        return self._meet([self._value(x)], self._channels(x).ids, lambda given: rule.values(node, given[0]))

    def _elementwise(self, rule: ElementwiseRule, node: fx.Node) -> Value:
        net, out = self.analysis, self._channels(node)
        fixed: dict[fx.Node, Tensor] = {}  # the same whatever the masks are
        followed: dict[fx.Node, Value] = {}
        whole = []
        for operand in net.operands[node]:
            if operand.whole:
                fixed[operand.node] = NAN.expand(len(out))
                if net.tracked(operand.node) is not None:
                    whole.append(self._value(operand.node))
            elif net.traced.is_parameter(operand.node):
                tensor = net.tensor(operand.node)
                is_vector = tensor is not None and tensor.numel() == len(out)
                fixed[operand.node] = tensor.flatten() if tensor is not None and is_vector else NAN.expand(len(out))
            elif net.tracked(operand.node) is not None:
                followed[operand.node] = self._value(operand.node)
            else:
                followed[operand.node] = self._new(operand.channels.ids, live=True)

        def outcome(given: list[Tensor]) -> Tensor:
            return rule.values(node, fixed | dict(zip(followed, given, strict=True)))

        return self._meet(list(followed.values()), out.ids, outcome, whole)

    def _cat(self, rule: CatRule, node: fx.Node) -> Value:
        out = self._channels(node)
        parts = [self._along(n, rule.axis_of_parts(node, out.axis)) for n in rule.parts(node)]
        if rule.dim(node) == out.axis:
            return _beside(parts)

        def same(given: list[Tensor]) -> Tensor:
            values = given[0]
            for other in given[1:]:
                values = torch.where(values == other, values, torch.nan)
            return values

        return self._meet(parts, out.ids, same)

    # ---- operators that move channels

    def _move(self, rule: MoveRule, node: fx.Node) -> Value:
        move = self.analysis.moves[node]
        x, index = self._value(move.source), move.index.numpy()
        first = x[index[:, 0]]
        if index.shape[1] == 1:
            return first
        constants = x.constant[move.index]
        differs = (constants != constants[:, :1]).any(1)
        out = self._new(self._channels(node).ids, constant=first.constant.masked_fill(differs, torch.nan))
        self._steps.append(TogetherStep(x.at[index], self._slice(out), differs.numpy()))
        return out

    def _inside(self, rule: InsideRule, node: fx.Node) -> list[Value]:
        return []

    def _split(self, rule: SplitRule, node: fx.Node) -> list[Value]:
        x, state = self._value(argument(node, 0)), self._channels(argument(node, 0))
        if not rule.along(node, state):
            return [x] * len(node.meta["val"])
        ends = list(itertools.accumulate(int(part.shape[state.axis]) for part in node.meta["val"]))
        return [x[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def _item(self, rule: ItemRule, node: fx.Node) -> Value:
        part: Value = self._values[argument(node, 0)][argument(node, 1)]  # type: ignore[assignment]
        return part

    def _cut(self, rule: SliceRule, node: fx.Node) -> Value:
        x = argument(node, 0)
        return self._value(x)[rule.positions(node, self._channels(x)).numpy()]

    def _pad(self, rule: PadRule, node: fx.Node) -> Value:
        x, state, ids = self._value(argument(node, 0)), self._channels(argument(node, 0)), self._channels(node).ids
        before, value = rule.around(node, state)[0], rule.arguments(node)[1]
        inner = self._meet([x], state.ids, lambda given: rule.values(node, state, given[0]))
        first, last = (self._new(i, constant=value) for i in (ids[:before], ids[before + len(state) :]))
        return _beside([first, inner, last])

    def _create(self, rule: CreateRule, node: fx.Node) -> Value:
        return self._new(self._channels(node).ids, constant=rule.value)

    # ---- layers

    def _weight(self, rule: WeightRule, node: fx.Node) -> Value:
        x, out = self._along(argument(node, 0), rule.axis(node)), self._new(self._channels(node).ids)
        weight, bias = self._masks_of(argument(node, 1), by_kernel=True), self._masks_of(argument(node, 2))
        assert weight is not None
        self._steps.append(WeightStep(self._input(x), self._slice(out), rule.groups(node), weight, bias))
        return out

    def _norm(self, rule: BatchNormRule, node: fx.Node) -> Value:
        x, out = self._along(argument(node, 0), 1), self._new(self._channels(node).ids)
        weight, bias = self._masks_of(argument(node, 1)), self._masks_of(argument(node, 2))
        by_batch = bool(argument(node, 5)) or argument(node, 3) is None
        if weight is None:  # the mask of a norm without factors has no place in the graph
            weight = self.masks.get(rule.name(self.analysis.traced, node), MaskArrays())
        tracks = argument(node, 3) is not None
        self._steps.append(NormStep(self._input(x), self._slice(out), weight, bias, by_batch, tracks))
        return out

    def _norm_over_channels(self, rule: NormOverChannelsRule, node: fx.Node) -> Value:
        x, out = self._along(argument(node, 0), rule.axis(node)), self._new(self._channels(node).ids)
        weight, bias = (self._masks_of(p) for p in rule.parameters(node))
        if weight is None:
            weight = self.masks.get(rule.name(self.analysis.traced, node), MaskArrays())
        self._steps.append(NormOverChannelsStep(self._input(x), self._slice(out), rule.groups(node), weight, bias))
        return out

    def _prelu(self, rule: PReLURule, node: fx.Node) -> Value:
        x = self._value(argument(node, 0))
        return self._meet([x], self._channels(node).ids, lambda given: rule.values(self.analysis, node, given[0]))


def _beside(parts: Sequence[Value]) -> Value:
    return Value(np.concatenate([p.at for p in parts]), torch.cat([p.constant for p in parts]))


FORMS: Mapping[type[Rule], Callable[[Compiler, Any, fx.Node], Value | list[Value]]] = {
    MoveRule: Compiler._move,
    InsideRule: Compiler._inside,
    TransparentRule: Compiler._transparent,
    ElementwiseRule: Compiler._elementwise,
    CatRule: Compiler._cat,
    SplitRule: Compiler._split,
    ItemRule: Compiler._item,
    SliceRule: Compiler._cut,
    PadRule: Compiler._pad,
    CreateRule: Compiler._create,
    WeightRule: Compiler._weight,
    BatchNormRule: Compiler._norm,
    NormOverChannelsRule: Compiler._norm_over_channels,
    PReLURule: Compiler._prelu,
}
