"""The types that users see: mypy --strict accepts a script that uses every public name, and knows what comes back."""

import sys

import pytest

import prunekernels as pk
from cases.pages import ROOT

SCRIPT = ROOT / "python_tests" / "cases" / "typed_user.py"


@pytest.mark.slow
def test_a_users_script_is_strictly_typed(tmp_path, capfd):
    """follow-imports=silent: the package is read as an installed one is, for its types alone."""
    api = pytest.importorskip("mypy.api")
    options = ["--strict", "--config-file=", "--follow-imports=silent", "--no-error-summary", "--show-error-codes"]
    where = ["--cache-dir", str(tmp_path), "--python-executable", sys.executable]
    out, error, status = api.run([*options, *where, str(SCRIPT)])
    assert (out, error, status) == ("", "", 0)


def test_the_script_uses_every_public_name():
    text = SCRIPT.read_text()
    missing = [name for name in pk.__all__ if name not in text]
    assert not missing


def test_types_are_shipped():
    assert (ROOT / "prunekernels" / "py.typed").exists()
