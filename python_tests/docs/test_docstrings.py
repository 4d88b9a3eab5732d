"""Every public name has a docstring with an example that runs, and stands on a page of docs/api."""

from __future__ import annotations

import contextlib
import doctest
import inspect
import io
import re
import warnings

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.pages import ROOT

PLAN = ("LayerPlan", "choose", "clear", "force", "measure", "settle", "table", "trials")
NAMES = [
    *(name for name in pk.__all__ if not inspect.ismodule(getattr(pk, name))),
    *(f"methods.{name}" for name in pk.methods.__all__ if not inspect.ismodule(getattr(pk.methods, name))),
    *(f"optim.{name}" for name in pk.optim.__all__),
    *(f"plan.{name}" for name in PLAN),
]
MODULES = [f"prunekernels.{name}" for name in ("methods.criteria", "methods.presets", "methods.schedules", "reference")]
API = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))


def _get(name: str) -> object:
    found: object = pk
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_stands_on_an_api_page(name):
    assert re.search(rf"^::: prunekernels\.{re.escape(name)}$", API, flags=re.M)


@pytest.mark.parametrize("name", MODULES)
def test_module_stands_on_an_api_page(name):
    assert re.search(rf"^::: {re.escape(name)}$", API, flags=re.M)


def test_api_pages_name_what_is_public():
    """No page documents what prunekernels.__all__ and its like do not offer."""
    shown = re.findall(r"^::: prunekernels\.(\S+)$", API, flags=re.M)
    assert not sorted(set(shown) - set(NAMES) - {name.removeprefix("prunekernels.") for name in MODULES})


@pytest.mark.parametrize("name", NAMES)
def test_docstring_has_an_example(name):
    found = _get(name)
    text = found.__dict__.get("__doc__") if inspect.isclass(found) else found.__doc__
    assert text and ">>>" in text


# ---- examples

DOCUMENTED = {name: _get(name) for name in NAMES}
for _module in (pk.methods.criteria, pk.methods.presets, pk.methods.schedules, pk.reference):
    _inside = {f"{_module.__name__}.{n}": v for n, v in vars(_module).items() if not n.startswith("_")}
    DOCUMENTED |= {n: v for n, v in _inside.items() if getattr(v, "__module__", None) == _module.__name__}


def _examples():
    finder = doctest.DocTestFinder(recurse=True)
    tests = [t for n, found in DOCUMENTED.items() for t in finder.find(found, n, globs={})]
    return {test.name: test for test in tests if test.examples}


EXAMPLES = _examples()


class _Checker(doctest.OutputChecker):
    """Compares what an example says it prints; one that says nothing only has to run."""

    def check_output(self, want: str, got: str, flags: int) -> bool:
        return not want or super().check_output(want, got, flags)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name):
    torch.manual_seed(0)
    test = EXAMPLES[name]
    test.globs = {"torch": torch, "nn": nn, "F": nn.functional, "pk": pk}
    runner = doctest.DocTestRunner(_Checker(), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    out = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        result = runner.run(test, out=out.write)
    assert result.failed == 0, out.getvalue()


def test_checker_finds_a_wrong_example():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    runner = doctest.DocTestRunner(_Checker())
    assert runner.run(test, out=lambda text: None).failed == 1
