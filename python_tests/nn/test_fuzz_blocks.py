"""Random networks in live mode against the same in masked mode. A failure prints a line that repeats it."""

import random

import pytest

from cases.fuzz_blocks import Program, check, draw

hypothesis = pytest.importorskip("hypothesis")
ALWAYS = 150  # programs, the same ones each time


def checked(program):
    try:
        check(program)
    except Exception as error:
        repro = f"pytest python_tests/nn/test_fuzz_blocks.py --fuzz-problem '{program}'"
        raise AssertionError(f"{type(error).__name__}: {error}\nrepro: {repro}") from error


@pytest.mark.filterwarnings("ignore:.*Using a non-full backward hook")
def test_any_network(request):
    """All that hypothesis draws; the program that it reports is the smallest it found."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    cases, line = request.config.getoption("fuzz_cases"), request.config.getoption("fuzz_problem")
    if line is not None:
        return checked(Program.parse(line))
    run = settings(
        max_examples=cases or ALWAYS, derandomize=cases is None, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run(given(st.randoms(use_true_random=False))(lambda rng: checked(draw(rng))))()


def test_a_line_gives_its_program_back():
    for seed in range(20):
        program = draw(random.Random(seed))
        assert Program.parse(str(program)) == program
