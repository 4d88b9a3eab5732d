"""The layout of the package: a dotted name gives the module, whatever functions the packages hand on."""

import functools
import importlib
import pkgutil

import pytest

import prunekernels as pk

MODULES = [module.name for module in pkgutil.walk_packages(pk.__path__, "prunekernels.")]


LIBRARIES = ("lightning", "transformers", "ultralytics")  # each with a module of its own in prunekernels.integrations


@pytest.mark.parametrize("name", MODULES)
def test_a_dotted_name_gives_the_module(name):
    """As in `import prunekernels.live.tensor as t`: no function of the same name shadows the module."""
    library = name.rpartition(".")[2]
    if name.startswith("prunekernels.integrations.") and library in LIBRARIES:
        pytest.importorskip(library, reason=f"needs {library}: pip install prunekernels[{library}]")
    module = importlib.import_module(name)
    assert functools.reduce(getattr, name.split(".")[1:], pk) is module
