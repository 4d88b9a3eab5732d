"""Docstrings of the public names: each has an example, which runs, and the arguments that it names exist."""

import doctest
import inspect
import re

import pytest
import torch

import prunekernels as pk
from prunekernels import methods
from prunekernels.methods import criteria, presets, schedules

NAMES = {name: getattr(methods, name) for name in methods.__all__ if inspect.isclass(getattr(methods, name))}
for module in (criteria, presets, schedules):
    own = {name: value for name, value in vars(module).items() if callable(value) and not name.startswith("_")}
    prefix = module.__name__.rpartition(".")[2]
    NAMES |= {f"{prefix}.{n}": v for n, v in own.items() if getattr(v, "__module__", "").startswith(module.__name__)}


@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs(name):
    torch.manual_seed(0)
    found = doctest.DocTestFinder(recurse=False).find(NAMES[name], name, globs={"torch": torch, "pk": pk})
    assert len(found) == 1 and found[0].examples
    said = []
    failed, _ = doctest.DocTestRunner().run(found[0], out=said.append)
    assert not failed, "".join(said)


WITH_ARGUMENTS = [
    name
    for name, value in NAMES.items()
    if inspect.isfunction(value) or ("__init__" in vars(value) and not issubclass(value, tuple))
]


@pytest.mark.parametrize("name", WITH_ARGUMENTS)
def test_arguments_are_described(name):
    """Args has what the function or constructor itself takes, in that order."""
    value = NAMES[name]
    function = value.__init__ if inspect.isclass(value) else value
    _, _, after = inspect.getdoc(value).partition("Args:\n")
    section = re.split(r"^\w", after, maxsplit=1, flags=re.MULTILINE)[0]
    described = re.findall(r"^    \*{0,2}(\w+): ", section, re.MULTILINE)
    assert described == [p for p in inspect.signature(function).parameters if p != "self"]


@pytest.mark.parametrize(
    "name", [name for name in methods.__all__ if name in NAMES and name not in ("Counts", "Method", "Sensitivity")]
)
def test_signatures_name_every_keyword(name):
    """Those that a class hands on to its parents too, with the parents' defaults."""
    parameters = inspect.signature(getattr(methods, name)).parameters
    common = inspect.signature(methods.Method).parameters
    assert not [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]
    assert list(parameters)[:4] == ["model", "optimizer", "rate", "epochs"] and set(common) <= set(parameters)
    assert parameters["duty"] == common["duty"]
