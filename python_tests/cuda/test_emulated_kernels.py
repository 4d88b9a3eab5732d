"""Every CUDA kernel of the kernel table under the emulator, against numpy; the cases are in cases/emulated."""

import importlib
import os
import pathlib
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from cases.emulated import build, shown

TESTS = pathlib.Path(__file__).parents[1]
NOT_FAMILIES = {"__init__", "__main__", "build", "arrays"}


def _table() -> set[str]:
    text = (build.CSRC / "kernel_table.inc").read_text()
    return {"_".join(row) for row in re.findall(r"^PK_CUDA\((\w+), (\w+), (\w+)\)", text, re.MULTILINE)}


def _families() -> dict:
    """NAME -> its CASES, or the exception that importing it raises."""
    found = {}
    for path in sorted((TESTS / "cases" / "emulated").glob("*.py")):
        if path.stem in NOT_FAMILIES or "CASES" not in path.read_text():
            continue
        try:
            found[path.stem] = importlib.import_module(f"cases.emulated.{path.stem}").CASES
        except Exception as error:  # a broken family must not hide the others
            found[path.stem] = error
    return found


FAMILIES = _families()
SOUND = {name: cases for name, cases in FAMILIES.items() if isinstance(cases, dict)}


@pytest.fixture(scope="session")
def libraries():
    return build.build(list(FAMILIES))


@pytest.fixture(scope="session")
def sanitized():
    """NAME -> a process that runs all cases of the family under sanitizers."""
    build.build(list(FAMILIES), sanitized=True)

    def run(family):
        command = [sys.executable, "-m", "cases.emulated", family, "--sanitized"]
        return subprocess.run(command, cwd=TESTS, capture_output=True, text=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {family: pool.submit(run, family) for family in FAMILIES}


def test_every_family_can_be_imported():
    assert {name: cases for name, cases in FAMILIES.items() if name not in SOUND} == {}


def test_every_kernel_of_the_table_has_cases():
    covered = {row for cases in SOUND.values() for row, each in cases.items() if each}
    assert _table() - covered == set()


def test_every_case_is_of_a_kernel_in_the_table():
    named = {row for cases in SOUND.values() for row in cases}
    assert named - _table() == set()


def _each_case():
    for family, cases in SOUND.items():
        for row, each in cases.items():
            for case in shown(row, each):
                yield pytest.param(family, case, id=f"{row}-{case}")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "case"), list(_each_case()))
def test_kernel(family, case, libraries):
    if isinstance(libraries[family], build.Broken):
        pytest.fail(str(libraries[family]), pytrace=False)
    case.run(build.library(libraries[family]))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_family_under_sanitizers(family, sanitized):
    done = sanitized[family].result()
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
