"""The rule of every operator that has one, by its ATen name."""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..trace import op_name
from .base import SIZE, UNKNOWN, Rule
from .elementwise import ELEMENTWISE
from .layers import LAYERS
from .moves import MOVES
from .norms import NORMS
from .pointwise import POINTWISE_RULES
from .slicing import SLICING

RULES: dict[str, Rule] = {**POINTWISE_RULES, **MOVES, **ELEMENTWISE, **SLICING, **LAYERS, **NORMS}


def rule_for(node: fx.Node) -> Rule:
    if node.op == "call_function" and (_has_only_sizes(node)):
        return SIZE
    return RULES.get("getitem" if node.target is operator.getitem else op_name(node), UNKNOWN)


def _has_only_sizes(node: fx.Node) -> bool:
    """Whether a node reads no channel: sizes, arithmetic on them, the exporter's own checks of types."""
    if node.target is torch.ops.aten.sym_size.int or op_name(node) == "_assert_tensor_metadata":
        return True
    return isinstance(node.meta.get("val"), (torch.SymInt, int))
