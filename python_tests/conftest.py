import gc
import itertools
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads that spin make a busy machine ten times slower

import pytest  # noqa: E402
import torch  # noqa: E402

from prunekernels import plan  # noqa: E402

ALWAYS = 20
ALWAYS_NETWORKS = 10  # each takes a second
# Tests of whole networks use one thread where several workers share the cores: each of their thousands of small
# operators would wait until the other worker gives the second thread a core. Tests of operators keep all threads.
OF_NETWORKS = {
    "benchmarks",
    "compaction",
    "deploy",
    "graph",
    "inspect",
    "integrations",
    "interplay",
    "methods",
    "train",
}


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=0, metavar="N", help="N more seeds for test_fuzz.py")
    parser.addoption("--fuzz-seed", type=int, metavar="S", help="only this seed")
    parser.addoption("--fuzz-cases", type=int, metavar="N", help="N other random problems for nn/test_fuzz_*.py")
    parser.addoption("--fuzz-problem", metavar="LINE", help="only this problem, as a failure of that file prints it")
    parser.addoption("--soak-steps", type=int, metavar="N", help="train so many steps in test_soak.py")
    parser.addoption("--kills", type=int, metavar="N", help="kill training runs at N moments in test_killed.py")
    parser.addoption("--fast", action="store_true", help="one case of each test function, no test marked slow")


def pytest_generate_tests(metafunc):
    if "fuzz_seed" in metafunc.fixturenames:
        only, more = metafunc.config.getoption("fuzz_seed"), metafunc.config.getoption("fuzz")
        always = ALWAYS_NETWORKS if metafunc.definition.path.parent.name in {"compaction", "graph"} else ALWAYS
        metafunc.parametrize("fuzz_seed", range(always + more) if only is None else [only])


def thinned(tests):
    """Where a function is marked thinned(N): the combinations of its parameters whose positions in their lists add up
    to a multiple of N. Any values of all parameters but one, if that one has N, are still met together.
    """
    marker = tests[0].get_closest_marker("thinned")
    if marker is None:
        return tests
    lengths = [max(1, len(mark.args[1])) for mark in tests[0].iter_markers("parametrize")]  # 0: one test, skipped
    places = itertools.product(*map(range, lengths))
    return [test for test, at in zip(tests, places, strict=True) if sum(at) % marker.args[0] == 0]


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(collector):
    """With --fast, keeps one case of each test function: the one in the middle, since lists of cases and of values
    start with the plain ones and end with the degenerate ones. It leaves out tests marked slow, which take seconds
    even so or compile the emulator.
    """
    made = yield
    if not isinstance(made, list) or not made:
        return made
    made = thinned(made)
    if collector.config.getoption("fast"):
        made = [made[len(made) // 2]] if made[0].get_closest_marker("slow") is None else []
    return made


def pytest_collection_finish():
    """The garbage collector no longer visits the thousands of tests themselves."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _leave_torch_as_it_was(request):
    """A test may set seeds, threads and determinism; the next one does not see it. Plans are tried where a test is
    marked trials: elsewhere numbers are compared to the bit."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(0)
    if "PYTEST_XDIST_WORKER" in os.environ and request.path.parent.name in OF_NETWORKS:
        torch.set_num_threads(1)
    with plan.measure(request.node.get_closest_marker("trials") is not None):
        yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    if "accelerate.state" in sys.modules:  # one state a process
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
