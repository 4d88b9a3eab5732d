"""python -m cases.emulated FAMILY [part of a test id] [--sanitized]: runs the cases of a family, without torch."""

import importlib
import os
import subprocess
import sys

from . import build, shown


def sanitized_environment() -> dict[str, str]:
    libraries = [
        subprocess.run([build.CXX, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PRUNEKERNELS_EMULATE_BACKWARDS": "1",  # nothing may depend on the order of blocks and threads
    }


def main(arguments: list[str]) -> int:
    sanitized = "--sanitized" in arguments
    family, *parts = [a for a in arguments if not a.startswith("-")]
    if sanitized and "LD_PRELOAD" not in os.environ:
        path = build.build([family], sanitized)[family]
        if isinstance(path, build.Broken):
            print(path)
            return 1
        command = [sys.executable, "-m", "cases.emulated", *arguments]
        return subprocess.run(command, env=sanitized_environment()).returncode
    library = build.load(family, sanitized)
    module = importlib.import_module(f"cases.emulated.{family}")
    failures = 0
    for row, cases in module.CASES.items():
        for case in shown(row, cases):
            told = f"{row}-{case}"
            if parts and not all(part in told for part in parts):
                continue
            print(told, flush=True)
            try:
                case.run(library)
            except AssertionError as error:
                failures += 1
                print(f"FAILED {told}: {error}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
