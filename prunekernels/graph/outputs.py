"""Which channels are outputs of a network: what computes them reaches the output without another layer in between."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from .analysis import ChannelAnalysis
from .channels import Channels
from .rules.base import SizeRule
from .rules.pointwise import FillRule
from .trace import argument, op_name, value_of

MIXERS = frozenset(
    "linear matmul mm bmm mv addmm baddbmm einsum bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d "
    "conv_transpose3d lstm gru rnn_tanh rnn_relu".split()
)


def output_ids(analysis: ChannelAnalysis) -> Tensor:
    """The ids of the channels that an output holds, or that reach one by operators without a rule (softmax, topk, ...).

    Layers mix channels, so what they read is no output of itself.
    """
    ids: list[Tensor] = [torch.zeros(0, dtype=torch.long)]
    of_parameters = _made_of_parameters(analysis)
    seen: set[fx.Node] = set()
    output = next(node for node in analysis.traced.graph.nodes if node.op == "output")
    waiting = [node for node in argument(output, 0) if isinstance(node, fx.Node)]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        state = analysis.states.get(node)
        if isinstance(analysis.rules.get(node), (SizeRule, FillRule)):
            continue  # the size of a value, none of its entries
        if state is not None:
            ids += [part.ids for part in (state if isinstance(state, list) else [state]) if isinstance(part, Channels)]
        elif not _mixes(analysis, node, of_parameters):
            waiting += node.all_input_nodes
    return torch.cat(ids)


def _mixes(analysis: ChannelAnalysis, node: fx.Node, of_parameters: set[fx.Node]) -> bool:
    """Whether a node multiplies its input with a matrix or a kernel that is made of parameters."""
    return op_name(node) in MIXERS and any(n in of_parameters and value_of(n).dim() > 1 for n in node.all_input_nodes)


def _made_of_parameters(analysis: ChannelAnalysis) -> set[fx.Node]:
    """Parameters, and what is computed from parameters alone."""
    found: set[fx.Node] = set()
    for node in analysis.traced.graph.nodes:
        name = analysis.traced.names.get(node)
        if name is not None:
            is_own = isinstance(analysis.traced.tensors[name], torch.nn.Parameter)
        else:
            is_own = bool(node.all_input_nodes) and all(n in found for n in node.all_input_nodes)
        if is_own and value_of(node) is not None:
            found.add(node)
    return found
