"""CUDA kernels compiled as host C++ and run by csrc/cuda/emulator: how to build them, guarded arrays, and cases.

A family of kernels is a module NAME.py here with CASES, and its exports in csrc/cuda/emulator/exports_NAME.cpp. To run
one family without torch: `python -m cases.emulated NAME [part of a test id] [--sanitized]` in python_tests.
"""
