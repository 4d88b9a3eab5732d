"""Runs every operator's rule over a traced network: what its channels are, and which of them are read."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx

from .channels import MOVING, Channels, NetworkChannels
from .rules.base import INSIDE, UNKNOWN, Rule
from .rules.table import rule_for
from .trace import Traced


class ChannelAnalysis(NetworkChannels):
    """One pass forward finds constants and classes of channels, one backward finds what is read; a graph has no loops.

    rules: the rule that each operator followed; UNKNOWN where its own did not fit.
    constants: False counts a channel that holds another constant than zero as live, so it is kept where it is read.
    statistics: True counts the live channels of norms as read, since their running statistics move in training.
    even_groups: True ties channels so far that groups of a convolution are even whatever is kept: all of a group, or
        those at the same place of every group, if they have more places than there are groups.
    """

    def __init__(
        self,
        traced: Traced,
        tensors: Mapping[str, Tensor] | None = None,
        *,
        constants: bool = True,
        statistics: bool = False,
        even_groups: bool = False,
    ) -> None:
        super().__init__(traced, tensors)
        self.statistics, self.even_groups = statistics, even_groups
        self.rules: dict[fx.Node, Rule] = {}
        self.own_rules = {
            node: rule_for(node)
            for node in traced.graph.nodes
            if node.op != "placeholder" and node not in traced.exposed
        }
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                self.states[node] = self._parameter(node)
                continue
            rule = self.own_rules.get(node, UNKNOWN)
            state = MOVING if node in self.moving else rule.forward(self, node)
            if state is MOVING:
                rule = INSIDE
            elif state is None and rule.needs_state:
                rule = UNKNOWN
            self.rules[node], self.states[node] = rule, state
        if not constants:
            self._forget_constants()
        for node in reversed(traced.graph.nodes):
            if node in self.rules:
                self.rules[node].backward(self, node)

    def _parameter(self, node: fx.Node) -> Channels | None:
        """The channels of a parameter that operators of one operand read, such as gamma in gamma.view(1, -1, 1, 1)."""
        reads = [rule for user in node.users if (rule := self.own_rules.get(user)) is not None]
        if node in self.traced.names and any(rule.takes_parameters for rule in reads):
            return self.parameter_state(node)
        return None
