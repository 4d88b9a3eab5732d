"""make wheel-check: installs each wheel of dist/ with pip into an environment of its own, and tests it there.

No compiler is on the PATH. A wheel with the extension runs with all that the CPU has, and capped to AVX-512, AVX2 and
the baseline of x86-64; the wheel for any machine runs in plain torch. Torch comes from where pip takes it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pythons

ROOT = Path(__file__).resolve().parents[1]
CAPS = ("amx", "avx512bf16", "avx512vbmi2", "avx512", "avx2", "scalar")  # each includes those behind it
TESTED = ("avx512", "avx2", "scalar")
SMOKE = ("ops/test_conv.py", "ops/test_batch_norm.py", "ops/test_kernels.py", "optim/test_sgd.py", "nn/test_conv.py")
PASSED_ON = re.compile(r"PIP_|SSL_|REQUESTS_|(?i:https?_proxy$|no_proxy$)|(HOME|LANG|TMPDIR|USER)$")
STATE = """import json, warnings
warnings.simplefilter("ignore")
import prunekernels as pk
from prunekernels.ops.extension import cpu_isa
print(json.dumps([pk.__file__, pk.build_info(), cpu_isa()]))"""


class Failed(Exception):
    """A check that failed, in words."""


class Environment:
    """A virtual environment in a folder, whose PATH holds its own programs alone."""

    def __init__(self, folder: Path, python: Path) -> None:
        subprocess.run([python, "-m", "venv", folder], check=True)
        self.python = folder / "bin" / "python"
        self.env = {name: value for name, value in os.environ.items() if PASSED_ON.match(name)}
        self.env["PATH"] = str(folder / "bin")
        self.tests = folder / "tests"
        shutil.copytree(ROOT / "python_tests" / "cases", self.tests / "python_tests" / "cases")
        for name in ("pyproject.toml", "python_tests/conftest.py", *(f"python_tests/{name}" for name in SMOKE)):
            (self.tests / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, self.tests / name)

    def run(self, *words: str, expected: int = 0, **env: str) -> str:
        command = [str(self.python), *words]
        done = subprocess.run(command, cwd=self.tests, env=self.env | env, capture_output=True, text=True)
        if done.returncode != expected:
            raise Failed(f"exit code {done.returncode} of {' '.join(words)}\n{done.stdout}{done.stderr}")
        return done.stdout

    def install(self, *what: str) -> None:
        self.run("-m", "pip", "install", "-q", "--only-binary", ":all:", *what)

    def smoke(self, **env: str) -> str:
        """The closing line of pytest."""
        files = [f"python_tests/{name}" for name in SMOKE]
        said = self.run("-m", "pytest", "-q", "--fast", "-p", "no:cacheprovider", *files, **env)
        return said.strip().splitlines()[-1]


def check_compiled(wheel: Path, env: Environment) -> Iterator[str]:
    """What was found, line by line."""
    env.install("--force-reinstall", "--no-deps", str(wheel))
    where, build, cpu = json.loads(env.run("-c", STATE))
    if "site-packages" not in where:
        raise Failed(f"imported from {where}")
    release = ".".join(build["torch"].split("+")[0].split(".")[:2])
    if f"+torch{release}." not in wheel.name:
        raise Failed(f"built for torch {build['torch']}, which its name does not say")
    doctor = json.loads(env.run("-m", "prunekernels", "doctor", "--json"))
    yield f"doctor: {'fine' if doctor['ok'] else doctor}; {build}"
    yield f"{build['isa']}: {env.smoke()}"
    for cap in TESTED:
        if CAPS.index(cap) <= CAPS.index(cpu):
            yield f"{cap}: not checked, this CPU has at best {cpu}" if cap != cpu else f"{cap}: as above"
            continue
        _, capped, _ = json.loads(env.run("-c", STATE, PRUNEKERNELS_ISA=cap))
        if capped["isa"] != cap:
            raise Failed(f"PRUNEKERNELS_ISA={cap} gives {capped['isa']}")
        yield f"{cap}: {env.smoke(PRUNEKERNELS_ISA=cap)}"


def check_plain(wheel: Path, env: Environment) -> Iterator[str]:
    """The wheel without extension: it says so once, and computes the same."""
    env.install("--force-reinstall", "--no-deps", str(wheel))
    where, build, _ = json.loads(env.run("-c", STATE))
    if build or "site-packages" not in where:
        raise Failed(f"{where} has an extension: {build}")
    doctor = json.loads(env.run("-W", "ignore", "-m", "prunekernels", "doctor", "--json", expected=1))
    (extension,) = (check for check in doctor["checks"] if check["name"] == "extension")
    yield f"doctor: {extension['mend']}"
    yield f"plain torch: {env.smoke()}"


def check_choice(dist: Path, env: Environment, wheel: Path | None) -> Iterator[str]:
    """pip takes the compiled wheel where one fits, and the plain one everywhere else; never the source archive."""
    options = ("--no-index", "--no-deps", "--find-links", str(dist), "prunekernels")
    with tempfile.TemporaryDirectory() as folder:
        env.run("-m", "pip", "download", "-q", "-d", folder, *options)
        (taken,) = Path(folder).iterdir()
    if taken.name != (wheel.name if wheel else plain_wheel(dist).name):
        raise Failed(f"pip takes {taken.name}")
    with tempfile.TemporaryDirectory() as folder:
        foreign = ("--platform", "win_amd64", "--only-binary", ":all:")
        env.run("-m", "pip", "download", "-q", "-d", folder, *foreign, *options)
        (elsewhere,) = Path(folder).iterdir()
    if elsewhere.name != plain_wheel(dist).name:
        raise Failed(f"pip takes {elsewhere.name} on another system")
    yield f"pip takes {taken.name} here and {elsewhere.name} on Windows"


def plain_wheel(dist: Path) -> Path:
    (found,) = dist.glob("prunekernels-*-py3-none-any.whl")
    return found


def check(python: pythons.Python, dist: Path) -> Iterator[str]:
    """All wheels of a Python, in one environment, one after the other."""
    wheel = next(dist.glob(f"prunekernels-*-{python.tag}-*.whl"), None)
    with tempfile.TemporaryDirectory() as folder:
        env = Environment(Path(folder) / "env", python.path)
        yield from check_choice(dist, env, wheel)
        env.install(str(wheel or plain_wheel(dist)), "pytest")
        if wheel:
            yield from check_compiled(wheel, env)
        yield from check_plain(plain_wheel(dist), env)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="folder with the wheels (dist)")
    parser.add_argument("--only", nargs="*", metavar="TAG", help="the Pythons to check, such as cp311 (all)")
    given = parser.parse_args()
    if not given.dist.is_dir() or not any(given.dist.glob("*-py3-none-any.whl")):
        parser.error(f"--dist: expected what `make wheel` makes, got {given.dist}")
    failed, chosen = 0, [p for p in pythons.find() if not given.only or p.tag in given.only]
    if not chosen:
        parser.error(f"--only: expected some of {', '.join(p.tag for p in pythons.find())}")
    for python in chosen:
        print(f"{python.tag}, {python.path}", flush=True)
        try:
            for line in check(python, given.dist.resolve()):
                print(f"  {line}", flush=True)
        except Failed as error:
            failed += 1
            print(f"  failed: {error}", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
