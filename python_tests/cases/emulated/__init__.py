"""CUDA kernels compiled as host C++ and run by csrc/cuda/emulator: how to build them, guarded arrays, and cases.

A family of kernels is a module NAME.py here with CASES, and its exports in csrc/cuda/emulator/exports_NAME.cpp. To run
one family without torch: `python -m cases.emulated NAME [part of a test id] [--sanitized]` in python_tests.
"""


def shown(row: str, cases: list) -> list:
    """The cases of a kernel that run: of an f16 kernel every third, as it differs from the bf16 one in conversions
    alone."""
    return cases[::3] if "_f16_" in row else cases
