"""make sanitize: errors that are made on purpose are reported."""

import importlib.util
import pathlib
import shutil
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "csrc" / "sanitize" / "sanitize.py"
needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None or not SCRIPT.exists(), reason="needs a checkout and g++"
)


def script():
    spec = importlib.util.spec_from_file_location("sanitize", SCRIPT)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["address", "thread"])
def test_planted_errors_are_reported(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "g++")
    sanitize = script()
    try:
        sanitize.environment(kind)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    sanitize.check_planted(kind, tmp_path)


@needs_compiler
@pytest.mark.slow
def test_an_error_that_is_not_reported_ends_it(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "g++")
    sanitize = script()
    monkeypatch.setattr(sanitize, "report_of", lambda kind, function, folder: (0, ""))
    with pytest.raises(SystemExit, match="planted_race is not reported"):
        sanitize.check_planted("thread", tmp_path)


@needs_compiler
def test_its_tests_exist():
    sanitize = script()
    tests = [test for kind in sanitize.KINDS.values() for test in kind.tests]
    tests.append(sanitize.CPU_TIME.partition("::")[0])
    assert all((SCRIPT.parents[2] / "python_tests" / test).exists() for test in tests)
