"""Narrower: what the small network keeps of a traced one, under any masks."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from .analysis import ChannelAnalysis
from .layer_uses import any_weights
from .narrow import Narrowing, kept_in_forward, multiply_adds
from .rules.layers import LayerRule
from .trace import Traced


class Narrower:
    def __init__(self, traced: Traced, stays: Collection[str], literal: bool) -> None:
        self._traced, self._stays, self._literal = traced, stays, literal

    @classmethod
    def of(cls, traced: Traced, model: nn.Module, stays: Collection[str] = (), literal: bool = False) -> Narrower:
        return cls(traced, stays, literal)

    def _analysis(self, model: nn.Module) -> ChannelAnalysis:
        analysis = ChannelAnalysis(self._traced, any_weights(model, self._traced), constants=False)
        for node, rule in analysis.rules.items():
            if isinstance(rule, LayerRule) and analysis.states[node] is not None:
                if rule.name(self._traced, node) in self._stays:
                    for end in rule.ends(analysis, node):
                        analysis.classes.pin(end.ids)
        return analysis

    def narrow(self, model: nn.Module) -> Narrowing:
        analysis = self._analysis(model)
        return Narrowing.of(analysis, kept_in_forward(analysis, literal=self._literal))

    def excess(self, model: nn.Module) -> float:
        analysis = self._analysis(model)
        least = multiply_adds(analysis, analysis.kept())
        return multiply_adds(analysis, kept_in_forward(analysis, literal=self._literal)) / max(least, 1)
