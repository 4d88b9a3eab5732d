"""CUDA kernels as host C++ under the emulator of csrc/cuda/emulator: building, arrays, and the cases of each family.

A family is a module NAME.py here with CASES beside csrc/cuda/emulator/exports_NAME.cpp. One family by hand, without
torch: `python -m cases.emulated NAME [part of a test id] [--sanitized]` in python_tests.
"""
