"""The imports of benchmarks/: no circle, and the harness knows nothing of what it times."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = {".".join(p.relative_to(FOLDER).with_suffix("").parts): p for p in FOLDER.rglob("*.py")}


def imported(module: str) -> set[str]:
    """The modules of benchmarks/ that a module imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & set(MODULES)


def reached(module: str) -> set[str]:
    found, todo = set(), [module]
    while todo:
        new = imported(todo.pop()) - found
        found |= new
        todo += new
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_imports_itself_by_way_of_others(module):
    assert module not in reached(module)


@pytest.mark.parametrize("module", sorted(m for m in MODULES if "." in m))
def test_arrows_between_folders(module):
    folder = module.split(".")[0]
    assert {name.split(".")[0] for name in imported(module)} <= {folder, "harness"}


def test_imports_are_seen():
    assert {"harness.command", "layers.report"} <= imported("conv") and "harness.timing" in reached("conv")
