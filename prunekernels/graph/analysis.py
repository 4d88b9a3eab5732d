"""Runs every operator's rule over a traced network: what its channels are, and which of them are read."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx

from .channels import NetworkChannels
from .rules.base import UNKNOWN, Rule
from .rules.table import rule_for
from .trace import Traced


class ChannelAnalysis(NetworkChannels):
    """One pass forward finds constants and classes of channels, one backward finds what is read; a graph has no loops.

    rules: the rule that each operator followed; UNKNOWN where its own did not fit.
    constants: False counts a channel that holds another constant than zero as live, so it is kept where it is read.
    statistics: True counts the live channels of norms as read, since their running statistics move in training.
    whole_groups: True ties all that a group of a grouped convolution reads and computes.
    """

    def __init__(
        self,
        traced: Traced,
        tensors: Mapping[str, Tensor] | None = None,
        *,
        constants: bool = True,
        statistics: bool = False,
        whole_groups: bool = False,
    ) -> None:
        super().__init__(traced, tensors)
        self.statistics, self.whole_groups = statistics, whole_groups
        self.rules: dict[fx.Node, Rule] = {}
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                self.states[node] = None
                continue
            rule = UNKNOWN if node in traced.exposed else rule_for(node)
            state = rule.forward(self, node)
            if state is None and rule.needs_state:
                rule = UNKNOWN
            self.rules[node], self.states[node] = rule, state
        if not constants:
            self._forget_constants()
        for node in reversed(traced.graph.nodes):
            if node in self.rules:
                self.rules[node].backward(self, node)
