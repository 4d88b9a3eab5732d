"""What `make versions` does around pip, the build and the tests, which take too long: clones, logs, results."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cases.pages import ROOT

sys.path.append(str(ROOT / "wheels"))  # as for its scripts
import pythons  # noqa: E402
import versions  # noqa: E402

REPORT = """<testsuites><testsuite>
<testcase classname="ops.test_conv" name="test_a"/>
<testcase classname="ops.test_conv" name="test_b[1]"><failure message="no"/></testcase>
<testcase classname="ops.test_conv" name="test_c"><skipped message="no GPU"/></testcase>
<testcase classname="ops.test_conv" name="test_d"><error message="fixture"/></testcase>
<testcase classname="ops.test_conv" name="test_e"/>
</testsuite></testsuites>"""
NEEDS_GIT = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def pair(plain=False):
    return versions.Pair("2.13.0", pythons.Python(Path(sys.executable), (3, 11, 7), "cp311"), plain)


def row(torch="2.13.0+cpu", python="3.11.7", extension="avx2", passed=1, tests=("",), without=()):
    return {"torch": torch, "python": python, "extension": extension, "cases": "all", "passed": passed,
            "tests": list(tests), "without": list(without)}  # fmt: skip


def test_counts(tmp_path):
    (tmp_path / "tests.xml").write_text(REPORT)
    failures = ["ops.test_conv::test_b[1]", "ops.test_conv::test_d"]
    assert versions.counts(tmp_path / "tests.xml") == {"passed": 2, "failed": 2, "skipped": 1, "failures": failures}


def test_a_row_takes_the_place_of_the_same(tmp_path):
    path = tmp_path / "versions.json"
    other = [row("2.8.0+cu128"), row(extension=""), row(python="3.12.1")]
    other += row(tests=("ops", "nn")), row(without=("cuda",))
    for each in (row(), *other, row("2.13.1", python="3.11.9", passed=2)):
        versions.record(each, path)
    found = json.loads(path.read_text())["rows"]
    assert len(found) == 6 and all(each in found for each in other)
    assert found[0] == other[0] and [each["passed"] for each in found if each["torch"] == "2.13.1"] == [2]


def test_tests_that_are_left_out_do_not_run(tmp_path):
    for name in ("ops", "cuda", "nn"):
        (tmp_path / "python_tests" / name).mkdir(parents=True)
        (tmp_path / "python_tests" / name / f"test_{name}.py").write_text(f"def test_{name}(): assert {name != 'cuda'}")
    report = tmp_path / "tests.xml"
    words = versions.pytest_words([""], ["cuda", "optim"], True, report)
    subprocess.run([sys.executable, *words], cwd=tmp_path, check=True)
    assert versions.counts(report) == {"passed": 2, "failed": 0, "skipped": 0, "failures": []}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of one commit, and the folder of an environment that is this one."""
    root, folder = tmp_path / "root", tmp_path / "built"
    root.mkdir()
    (folder / "env" / "bin").mkdir(parents=True)
    (folder / "env" / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setattr(versions, "ROOT", root)
    git(root, "init", "-q")
    commit(root, "print('first')")
    return root, folder


def git(root, *words):
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=root, check=True)


def commit(root, text):
    (root / "say.py").write_text(text)
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "one")


@NEEDS_GIT
def test_the_last_commit_is_what_runs(repository):
    root, folder = repository
    assert versions.Checkout(pair(), folder).run("say.py") == "first\n"
    commit(root, "print('second')")
    (root / "say.py").write_text("print('not committed')")
    checkout = versions.Checkout(pair(), folder)
    assert checkout.run("say.py") == "second\n"
    assert checkout.commit() == subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=root, text=True)[:7]


@NEEDS_GIT
@pytest.mark.parametrize("plain", [False, True])
def test_without_the_extension_where_asked(repository, plain):
    _, folder = repository
    said = versions.Checkout(pair(plain), folder).run("-c", "import os; print(os.environ['PRUNEKERNELS_NO_EXT'])")
    assert said == ("1\n" if plain else "\n")


@NEEDS_GIT
def test_a_step_that_fails(repository):
    _, folder = repository
    checkout = versions.Checkout(pair(), folder)
    with pytest.raises(versions.Failed, match="exit code 3 of .*log.txt"):
        checkout.run("-c", "print('why'); raise SystemExit(3)")
    assert checkout.log.read_text() == "why\n"
    assert checkout.run("-c", "print('again'); raise SystemExit(1)", accepted=(0, 1)) == "again\n"
