"""The emulator's own tests are in test_cuda_emulated.py: no kernel of the table is in this family."""

CASES: dict[str, list] = {}
