import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads that spin make a busy machine ten times slower

import pytest  # noqa: E402
import torch  # noqa: E402

ALWAYS = 20


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=0, metavar="N", help="N more seeds for test_fuzz.py")
    parser.addoption("--fuzz-seed", type=int, metavar="S", help="only this seed")


def pytest_generate_tests(metafunc):
    if "fuzz_seed" in metafunc.fixturenames:
        only, more = metafunc.config.getoption("fuzz_seed"), metafunc.config.getoption("fuzz")
        metafunc.parametrize("fuzz_seed", range(ALWAYS + more) if only is None else [only])


@pytest.fixture(autouse=True)
def _leave_torch_as_it_was():
    """A test may set seeds, threads and determinism; the next one does not see it."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
