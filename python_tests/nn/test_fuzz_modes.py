"""Random convolutions as a function, in masked and in live mode. A failure prints a line that repeats it."""

import random

import pytest

from cases.fuzz_modes import Problem, check, draw

hypothesis = pytest.importorskip("hypothesis")
ALWAYS = 200  # problems, the same ones each time
MODES = ("functional", "masked", "live")


def checked(problem):
    try:
        check(problem)
    except Exception as error:
        repro = f"pytest python_tests/nn/test_fuzz_modes.py --fuzz-problem '{problem}'"
        raise AssertionError(f"{type(error).__name__}: {error}\nrepro: {repro}") from error


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_any_convolution(mode, request):
    """All that hypothesis draws; the problem that it reports is the smallest it found."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    cases, line = request.config.getoption("fuzz_cases"), request.config.getoption("fuzz_problem")
    if line is not None:
        return checked(Problem.parse(line)) if f'"mode":"{mode}"' in line else pytest.skip("of another mode")
    run = settings(
        max_examples=-(-(cases or ALWAYS) // len(MODES)), derandomize=cases is None, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run(given(st.randoms(use_true_random=False))(lambda rng: checked(draw(rng, mode))))()


@pytest.mark.parametrize("mode", MODES)
def test_a_line_gives_its_problem_back(mode):
    for seed in range(20):
        problem = draw(random.Random(seed), mode)
        assert Problem.parse(str(problem)) == problem
