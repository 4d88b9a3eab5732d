"""The rule of every operator that has one, by its ATen name."""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..trace import op_name
from .base import SIZE, UNKNOWN, Rule
from .elementwise import ELEMENTWISE
from .layers import LAYERS
from .pointwise import POINTWISE_RULES
from .reshape import RESHAPES
from .slicing import SLICING

RULES: dict[str, Rule] = {**POINTWISE_RULES, **RESHAPES, **ELEMENTWISE, **SLICING, **LAYERS}


def rule_for(node: fx.Node) -> Rule:
    if node.op == "call_function" and (node.target is torch.ops.aten.sym_size.int or _is_size_arithmetic(node)):
        return SIZE
    return RULES.get("getitem" if node.target is operator.getitem else op_name(node), UNKNOWN)


def _is_size_arithmetic(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, int))
