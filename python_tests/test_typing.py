"""The types that users see: mypy --strict accepts a script that uses every public name, and knows what comes back."""

import ast

import pytest

import prunekernels as pk
from cases.pages import ROOT

SCRIPT = ROOT / "python_tests" / "cases" / "typed_user.py"


@pytest.mark.slow
def test_a_users_script_is_strictly_typed(tmp_path, monkeypatch):
    """Read as an installed package is: for its types alone. A wrong line at the end shows that they are looked at."""
    api = pytest.importorskip("mypy.api")
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.read_text() + "\n\nassert_type(MaskedConv2d(3, 8, 3).density, int)\n")
    cache = ROOT / ".mypy_cache" / "strict"  # reading torch takes half a minute, once
    options = ["--strict", "--config-file=", "--follow-imports=silent", "--cache-dir", str(cache)]
    out, error, _ = api.run([*options, str(script)])
    found = [line for line in out.splitlines() if ": error: " in line]
    expected = 'Expression is of type "float", not "int"'
    assert not error and len(found) == 1 and expected in found[0], out + error


def test_the_script_uses_every_public_name():
    text = SCRIPT.read_text()
    assert not [name for name in pk.__all__ if name not in text]


def test_types_are_shipped():
    assert (ROOT / "prunekernels" / "py.typed").exists()


STUB = ROOT / "prunekernels" / "_C.pyi"


@pytest.mark.skipif(not pk.has_extension(), reason="the compiled extension is not there")
def test_the_stub_names_what_the_extension_has():
    from prunekernels import _C

    names = {node.name for node in ast.parse(STUB.read_text()).body if hasattr(node, "name")} | {"plan_key_words"}
    assert names == {name for name in dir(_C) if not name.startswith("__")}


LIBRARY_OF = {"lightning_prune": "lightning", "yolo_prune": "ultralytics", "hf_prune": "transformers"}


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_strictly_typed(script, monkeypatch):
    api = pytest.importorskip("mypy.api")
    if library := LIBRARY_OF.get(script.stem):
        pytest.importorskip(library)
    monkeypatch.setenv("MYPYPATH", f"{ROOT}:{ROOT / 'examples'}")
    cache = ROOT / ".mypy_cache" / "strict"
    options = ["--strict", "--config-file=", "--follow-imports=silent", "--cache-dir", str(cache)]
    options += ["--untyped-calls-exclude", "torch", "--untyped-calls-exclude", "transformers"]
    out, error, status = api.run([*options, str(script)])
    assert status == 0 and not error, out + error
