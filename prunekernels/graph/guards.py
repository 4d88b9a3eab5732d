"""What torch.export says of the sizes that a trace serves, as nodes of a graph that check it."""

from __future__ import annotations

import ast
from functools import reduce
from typing import Any

import torch


def holds(guard: str, arguments: Any) -> Any:
    """Evaluates a guard, such as "L['x'].size()[2] // 4 >= 1 and L['x'].size()[3] != 1", for arguments by name.

    Sizes may be proxies of a graph, which take no part in Python's own logic: `and` becomes `&`.
    """
    tree = ast.fix_missing_locations(_WithoutShortcuts().visit(ast.parse(guard, mode="eval")))
    names = {"__builtins__": {}, "max": torch.sym_max, "min": torch.sym_min}
    return eval(compile(tree, "<guard>", "eval"), names, {"L": arguments})


class _WithoutShortcuts(ast.NodeTransformer):
    """and, or, not and chains of comparisons, in operators that evaluate both sides."""

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        self.generic_visit(node)
        sign = ast.BitAnd() if isinstance(node.op, ast.And) else ast.BitOr()
        return reduce(lambda a, b: ast.BinOp(a, sign, b), node.values)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        self.generic_visit(node)
        return ast.Compare(node.operand, [ast.Eq()], [ast.Constant(False)]) if isinstance(node.op, ast.Not) else node

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        sides = [node.left, *node.comparators]
        steps: list[ast.expr] = [
            ast.Compare(a, [op], [b]) for a, op, b in zip(sides, node.ops, sides[1:], strict=False)
        ]
        return reduce(lambda a, b: ast.BinOp(a, ast.BitAnd(), b), steps)
