"""What `make wheel` builds from: interpreters, the source archive, the plain wheel. The compiled ones take too long."""

import ast
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import prunekernels as pk
from cases.pages import ROOT

sys.path.append(str(ROOT / "wheels"))  # as for its scripts
import check  # noqa: E402
import pythons  # noqa: E402
import repair  # noqa: E402

TREE = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")

# ---- interpreters


def interpreter(folder, name, said, status=0):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{said}'\nexit {status}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


def test_one_interpreter_for_each_tag(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    interpreter(a, "python3.12", '["CPython", [3, 12, 1], "cp312", true]')
    newer = interpreter(b, "python3.12", '["CPython", [3, 12, 4], "cp312", true]')
    threaded = interpreter(b, "python3.13t", '["CPython", [3, 13, 0], "cp313t", true]')
    assert pythons.find([a, b]) == [
        pythons.Python(newer, (3, 12, 4), "cp312"), pythons.Python(threaded, (3, 13, 0), "cp313t"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "said",
    [
        '["CPython", [3, 9, 18], "cp39", true]',
        '["PyPy", [3, 11, 1], "cp311", true]',
        '["CPython", [3, 11, 1], "cp311", false]',
        "pyenv: python3.10: command not found",
        "[]",
    ],
)
def test_interpreters_that_will_not_do(tmp_path, said):
    interpreter(tmp_path, "python3.11", said)
    assert pythons.find([tmp_path]) == []


def test_other_names_are_not_interpreters(tmp_path):
    interpreter(tmp_path, "python3.11-config", '["CPython", [3, 11, 1], "cp311", true]')
    assert pythons.find([tmp_path, tmp_path / "missing"]) == []


def test_this_interpreter_is_probed():
    found = pythons.probe(Path(sys.executable))
    assert found is None or (found.version == sys.version_info[:3] and found.tag == f"cp3{sys.version_info[1]}")


# ---- versions


def test_the_version_stands_in_one_place():
    for name in ("pyproject.toml", "setup.py", "csrc/build_extension.py", "mkdocs.yml"):
        assert pk.__version__ not in (ROOT / name).read_text(), name
    (assigned,) = (
        node for node in ast.parse((ROOT / "prunekernels" / "__init__.py").read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__version__"
    )  # fmt: skip
    assert ast.literal_eval(assigned.value) == pk.__version__


# ---- archives


def run_setup(folder, *commands):
    env = os.environ | {"PRUNEKERNELS_NO_EXT": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *commands], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def names_in(archive):
    with tarfile.open(archive) as file:
        return sorted(name.partition("/")[2] for name in file.getnames() if "egg-info" not in name)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The source archive of this tree, made in a copy."""
    tree = tmp_path_factory.mktemp("tree")
    for name in TREE:
        shutil.copy(ROOT / name, tree / name)
    for name in ("csrc", "prunekernels"):
        shutil.copytree(ROOT / name, tree / name)  # with what is built in place
    run_setup(tree, "sdist", "--dist-dir", str(tree / "dist"))
    (found,) = (tree / "dist").iterdir()
    return found


@pytest.fixture(scope="module")
def unpacked(archive, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data") if hasattr(tarfile, "data_filter") else file.extractall(folder)
    (tree,) = folder.iterdir()
    return tree


@pytest.mark.slow
def test_the_source_archive_is_complete(archive):
    names = set(names_in(archive))
    tracked = subprocess.run(
        ["git", "ls-files", "csrc", "prunekernels", *TREE], cwd=ROOT, capture_output=True, text=True
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    assert set(tracked.stdout.split()) <= names
    assert not [name for name in names if re.search(r"\.so$|__pycache__|\.pyc$", name)]
    assert archive.name == f"prunekernels-{pk.__version__}.tar.gz"


@pytest.mark.slow
def test_the_source_archive_makes_itself(archive, unpacked):
    run_setup(unpacked, "sdist", "--dist-dir", str(unpacked.parent / "again"))
    (again,) = (unpacked.parent / "again").iterdir()
    assert names_in(again) == names_in(archive)


@pytest.mark.slow
def test_the_plain_wheel(unpacked, tmp_path):
    """From the source archive, without torch to build."""
    (unpacked / "torch.py").write_text("raise ImportError('torch is not needed to build')")
    run_setup(unpacked, "build", "--build-lib", str(tmp_path / "lib"), "bdist_wheel", "--dist-dir", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"prunekernels-{pk.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        metadata = file.read(f"prunekernels-{pk.__version__}.dist-info/METADATA").decode()
    assert {"prunekernels/py.typed", "prunekernels/_C.pyi", "prunekernels/ops/extension.py"} <= set(names)
    assert not [name for name in names if not re.match(r"prunekernels(/|-)", name) or name.endswith(".so")]
    assert "Requires-Dist: torch>=2.8\n" in metadata and "Requires-Dist: numpy\n" in metadata


# ---- repaired wheels


def fake_wheel(path, *members):
    with zipfile.ZipFile(path, "w") as file:
        for name in members:
            file.writestr(name, "")
    return path


@pytest.mark.parametrize(
    ("name", "members", "text"),
    [
        ("a-manylinux_2_28_x86_64.whl", ["prunekernels/_C.so", "prunekernels.libs/libgomp-1.so.1"], "only library"),
        ("a-manylinux_2_28_x86_64.whl", [], "only library"),
        ("a-linux_x86_64.whl", ["prunekernels/_C.so"], "expected a name with manylinux"),
    ],
)
def test_audit_refuses(tmp_path, name, members, text):
    with pytest.raises(SystemExit, match=text):
        repair.audit(fake_wheel(tmp_path / name, *members))


def test_audit(tmp_path):
    repair.audit(
        fake_wheel(tmp_path / "a-manylinux_2_28_x86_64.whl", "prunekernels/_C.cpython-311.so", "prunekernels/a.py")
    )


def test_the_smoke_set_exists():
    assert all((ROOT / "python_tests" / name).is_file() for name in check.SMOKE)
