"""make versions: builds and tests the last commit with other releases of PyTorch and other Pythons.

Each pair gets an environment and a clone of its own, and the extension without CUDA kernels. pip may take CUDA builds
of torch, of several gigabytes each. What came out goes into a results file, one row a pair, which docs/installing.md
shows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pythons

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "wheels" / "versions.json"
EXTRAS = ".[cli,demo,test]"
TOOLS = ("numpy", "ninja", "pybind11", "setuptools>=64", "wheel")
ABOUT = """import json, platform, torch
import prunekernels as pk
from prunekernels import doctor
wrong = [f"{each.name}: {each.found}" for each in doctor.findings() if each.state == "wrong"]
print(json.dumps([torch.__version__, platform.python_version(), pk.build_info(), wrong]))"""

Row = dict[str, Any]


class Failed(Exception):
    """A step that failed, in words."""


class Pair(NamedTuple):
    """A release of torch with a Python; plain: without the extension."""

    torch: str
    python: pythons.Python
    plain: bool

    @property
    def name(self) -> str:
        return f"torch{self.torch}-{self.python.tag}"


class Checkout:
    """The last commit as a clone in a folder, and an environment beside it, which is taken as it is if it is there."""

    def __init__(self, pair: Pair, folder: Path) -> None:
        self.pair, self.python = pair, folder / "env" / "bin" / "python"
        self.folder = folder / ("plain" if pair.plain else "compiled")
        self.tree, self.log = self.folder / "tree", self.folder / "log.txt"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log.write_text("")
        if not self.tree.exists():
            self._logged(["git", "clone", "-q", "--shared", str(ROOT), str(self.tree)], folder)
        self._logged(["git", "fetch", "-q", "origin", "HEAD"], self.tree)
        self._logged(["git", "checkout", "-q", "--detach", "FETCH_HEAD"], self.tree)
        if not self.python.exists():
            self._logged([str(pair.python.path), "-m", "venv", str(folder / "env")], folder)

    def build(self) -> None:
        torch = f"torch=={self.pair.torch}"
        self.run("-m", "pip", "install", "-q", torch, *TOOLS)
        self.run("-m", "pip", "install", "-q", "--no-build-isolation", "-e", EXTRAS, torch, PRUNEKERNELS_NO_EXT="1")
        if not self.pair.plain:
            self.run("setup.py", "-q", "build_ext", "--inplace", PRUNEKERNELS_CUDA="0")

    def commit(self) -> str:
        command = ["git", "rev-parse", "--short=7", "HEAD"]
        return subprocess.run(command, cwd=self.tree, check=True, capture_output=True, text=True).stdout.strip()

    def run(self, *words: str, accepted: Sequence[int] = (0,), **env: str) -> str:
        return self._logged([str(self.python), *words], self.tree, accepted, **env)

    def _logged(self, command: list[str], folder: Path, accepted: Sequence[int] = (0,), **env: str) -> str:
        """What a command prints. All that it says goes into the log; raises Failed on an exit code that is not
        accepted."""
        path = f"{self.python.parent}{os.pathsep}{os.environ.get('PATH', '')}"  # for ninja
        env = {"PRUNEKERNELS_NO_EXT": "1" if self.pair.plain else "", "PATH": path, **env}
        with open(self.log, "a+") as log:
            start = log.seek(0, os.SEEK_END)
            code = subprocess.run(
                command, cwd=folder, env=os.environ | env, stdout=log, stderr=subprocess.STDOUT
            ).returncode
            log.seek(start)
            said = log.read()
        if code not in accepted:
            raise Failed(f"exit code {code} of {' '.join(command)}, see {self.log}")
        return said


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", info.read_text(), re.M) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def counts(report: Path) -> Row:
    """Of a JUnit file: how many tests passed, failed and were skipped, and which failed."""
    cases = list(xml.parse(report).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = sorted({f"{case.get('classname', '')}::{case.get('name', '')}" for case in failed})
    return {"passed": len(cases) - len(failed) - skipped, "failed": len(failed), "skipped": skipped, "failures": names}


def pytest_words(tests: Sequence[str], without: Sequence[str], whole: bool, report: Path) -> list[str]:
    """What python is called with, in a clone."""
    options = [*([] if whole else ["--fast"]), "-v", "-p", "no:cacheprovider", f"--junitxml={report}"]
    options += [f"--ignore=python_tests/{name}" for name in without]
    return ["-m", "pytest", *options, *(f"python_tests/{name}" for name in tests)]


def check(pair: Pair, folder: Path, tests: Sequence[str], without: Sequence[str], whole: bool) -> Row:
    """Builds, asks the doctor, runs the tests."""
    checkout = Checkout(pair, folder)
    checkout.build()
    said = checkout.run("-c", ABOUT).splitlines()  # and warnings
    torch, python, build, wrong = json.loads(next(line for line in said if line.startswith('["')))
    if bool(build) == pair.plain:
        raise Failed(f"expected {'no' if pair.plain else 'the'} extension, got {build}")
    checkout.run("-m", "prunekernels", "doctor", accepted=(0, 1))
    report = checkout.folder / "tests.xml"
    checkout.run(*pytest_words(tests, without, whole, report), accepted=(0, 1))
    return {
        "torch": torch, "python": python, "extension": build.get("isa", ""), "compiler": build.get("compiler", ""),
        "doctor": wrong, "tests": list(tests), "without": list(without),
        "cases": "all" if whole else "one of each test", **counts(report), "commit": checkout.commit(),
        "system": f"{platform.system()} {platform.machine()}", "cpu": cpu(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def record(row: Row, path: Path) -> None:
    """Puts it among the rows of a results file, in the place of what was found before of the same."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = sorted([old for old in rows if same(old) != same(row)] + [row], key=same)
    text = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text('{\n "command": "make versions",\n "rows": [\n' + text + "\n ]\n}\n")


def same(row: Row) -> tuple[Any, ...]:
    """What a row is of: release of torch, Python, extension or not, tests, and which of them were left out."""
    numbers = [[int(part) for part in re.findall(r"\d+", row[name].split("+")[0])] for name in ("torch", "python")]
    tests = sorted(row["tests"]), sorted(row["without"])
    return numbers[0][:2], numbers[1][:2], not row["extension"], row["cases"] != "all", *tests


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("torches", nargs="+", metavar="TORCH", help="releases, such as 2.8.0")
    parser.add_argument("--only", nargs="*", metavar="TAG", help="Pythons, such as cp312 (that which runs this)")
    parser.add_argument("--plain", action="store_true", help="without the extension")
    parser.add_argument("--whole", action="store_true", help="all cases of the tests, not one of each test function")
    parser.add_argument("--tests", nargs="*", default=[""], metavar="PATH", help="in python_tests (all)")
    parser.add_argument("--without", nargs="*", default=[], metavar="PATH", help="in python_tests, left out (none)")
    parser.add_argument("--json", type=Path, default=RESULTS, help=f"results file ({RESULTS.relative_to(ROOT)})")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "versions", help="of environments and clones")
    parser.add_argument("--keep", action="store_true", help="do not remove an environment, of gigabytes, after its use")
    given = parser.parse_args()
    found = {python.tag: python for python in pythons.find()}
    asked = given.only or ["cp{}{}".format(*sys.version_info)]
    if unknown := [tag for tag in asked if tag not in found]:
        parser.error(f"--only: expected some of {', '.join(found)}, got {', '.join(unknown)}")
    given.pairs = [Pair(torch, found[tag], given.plain) for torch in given.torches for tag in asked]
    return given


def main() -> int:
    given, failed = arguments(), 0
    for pair in given.pairs:
        folder = given.folder.resolve() / pair.name
        try:
            row = check(pair, folder, given.tests, given.without, given.whole)
        except Failed as error:
            failed += 1
            print(f"{pair.name}: {error}", flush=True)
            continue
        record(row, given.json)
        failed += bool(row["failed"])
        print(f"{pair.name}: {row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped", flush=True)
        print("".join(f"  {name}\n" for name in (*row["doctor"], *row["failures"])), end="", flush=True)
        if not given.keep:
            shutil.rmtree(folder)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
