"""make sanitize: the CPU kernels and operators under AddressSanitizer with UndefinedBehaviorSanitizer, and under
ThreadSanitizer.

Builds the extension for each into build/sanitize-KIND, checks that errors planted in planted.cpp are reported, and runs
a part of the suite. What it cannot see: inside of torch and its libraries, which are not built for it; an access that
is wrong and yet within a tensor's own memory; under ThreadSanitizer, where at::parallel_for starts plain threads
(ATen/Parallel.h), OpenMP's runtime, and any race whose two sides no test runs at the same time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "csrc"))

OPERATORS = (
    "amx", "batch_norm", "channels", "conv", "conv_edges", "conv_mask", "deferred_norm", "depthwise", "fuzz", "kernels",
    "masked_copy", "parts_compacted", "pixels", "planes", "poison", "products", "sparse_pixels", "threads",
    "weight_dtypes",
)  # fmt: skip
TESTS = (*(f"ops/test_{name}.py" for name in OPERATORS), "optim", "nn/test_fuzz_modes.py")
CPU_TIME = "ops/test_threads.py::test_loops_share_torch_threads"  # tells threads by their times


class Kind(NamedTuple):
    """A sanitizer: what it is preloaded from, its settings, its tests, and which planted errors it must report."""

    libraries: tuple[str, ...]
    environment: dict[str, str]
    tests: tuple[str, ...]
    planted: dict[str, tuple[int, str]]  # function: its argument, and what the report says
    left_out: tuple[str, ...] = ()  # files of the tests


KINDS = {
    "address": Kind(
        ("libasan.so", "libubsan.so"),
        {
            "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PRUNEKERNELS_KEEP_MB": "0",  # an overrun of a block that is larger than asked for would not show
        },
        (*TESTS, "live"),
        {
            "planted_overrun": (7, "heap-buffer-overflow"),
            "planted_overflow": (2**31 - 1, "signed integer overflow"),
        },
    ),
    "thread": Kind(
        ("libtsan.so",),
        {
            # torch locks mutexes where that is not seen and unlocks some of them in headers, where it is, or the other
            # way round: then a thread seems to hold ever more, and the detector of deadlocks has room for 64
            "TSAN_OPTIONS": "exitcode=66:report_mutex_bugs=0:detect_deadlocks=0:"
            f"suppressions={Path(__file__).with_name('thread.supp')}",
            "OMP_NUM_THREADS": "3",
        },
        (*TESTS, "ops/test_caching_allocator.py", "nn/test_serving.py"),
        {"planted_race": (1000, "data race")},
        ("optim/test_live_gradients_ranks.py",),  # threads of torch's process groups, which are not seen to wait
    ),
}


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def environment(kind: str) -> dict[str, str]:
    """That of a process in which the sanitizer watches."""
    asked = [[compiler(), f"-print-file-name={library}"] for library in KINDS[kind].libraries]
    libraries = [
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() for command in asked
    ]
    missing = [library for library in libraries if not Path(library).is_absolute()]
    if missing:
        raise FileNotFoundError(f"sanitize: {compiler()} has no {', '.join(missing)}")
    return os.environ | KINDS[kind].environment | {"LD_PRELOAD": " ".join(libraries)}


def report_of(kind: str, function: str, folder: Path) -> tuple[int, str]:
    """Exit status and output of a process that makes a planted error. folder: for its library."""
    from build_extension import SANITIZERS

    library = folder / "planted.so"
    flags = ["-O1", "-g1", "-shared", "-fPIC", *SANITIZERS[kind]]
    subprocess.run([compiler(), *flags, str(Path(__file__).with_name("planted.cpp")), "-o", str(library)], check=True)
    code = f"import ctypes; ctypes.CDLL({str(library)!r}).{function}({KINDS[kind].planted[function][0]})"
    ran = subprocess.run([sys.executable, "-c", code], env=environment(kind), capture_output=True, text=True)
    return ran.returncode, ran.stdout + ran.stderr


def check_planted(kind: str, folder: Path) -> None:
    """Exits unless every planted error is reported."""
    for function, (_, text) in KINDS[kind].planted.items():
        status, output = report_of(kind, function, folder)
        if status == 0 or text not in output:
            sys.exit(f"sanitize: {kind}: {function} is not reported; exit status {status}\n{output}")
        print(f"{kind}: {function} is reported", flush=True)


def build(kind: str, base: Path) -> Path:
    """Compiles what changed since the last time. Returns the folder of the package."""
    library = base / "lib"
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(base), "--build-lib", str(library)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PRUNEKERNELS_SANITIZE": kind}, check=True)
    return library


def run_tests(kind: str, library: Path, fast: bool) -> int:
    """Runs the tests on the package in a folder; the exit status."""
    tests = [str(ROOT / "python_tests" / test) for test in KINDS[kind].tests]
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}"]
    command += ["--deselect", f"python_tests/{CPU_TIME}", "-p", "no:cacheprovider"]
    command += [f"--ignore={ROOT / 'python_tests' / name}" for name in KINDS[kind].left_out]
    command += ["--capture=sys", *(["--fast"] if fast else []), *tests]  # reports go past sys.stderr to the terminal
    path = os.pathsep.join(map(str, (library, ROOT)))  # the tests' own processes find their functions below ROOT
    return subprocess.run(command, cwd=library, env=environment(kind) | {"PYTHONPATH": path}).returncode


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{' or '.join(KINDS)} (both)")
    parser.add_argument("--fast", action="store_true", help="one case of each test function")
    args = parser.parse_args(argv)
    unknown = [kind for kind in args.kinds if kind not in KINDS]
    if unknown:
        parser.error(f"expected {' or '.join(KINDS)}, got {', '.join(unknown)}")
    failed = []
    for kind in args.kinds or KINDS:
        base = ROOT / "build" / f"sanitize-{kind}"
        base.mkdir(parents=True, exist_ok=True)
        check_planted(kind, base)
        if run_tests(kind, build(kind, base), args.fast) != 0:
            failed.append(kind)
    if failed:
        print(f"sanitize: reports or failures under {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
