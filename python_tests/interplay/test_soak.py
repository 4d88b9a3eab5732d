"""Thousands of steps with other masks every 50: nothing grows, nothing drifts. make soak: 10,000; --soak-steps N."""

import os

import pytest
import torch

from cases.conv import isas
from cases.soak import train

FEW = 400  # steps where the option is not given
MEGABYTES = 1 << 20
MODES, BOTH = ("masked", "live"), pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outcomes(request):
    """By mode and dtype. Memory is read in a process whose libraries have settled: after as many as 1000 steps."""
    steps = request.config.getoption("soak_steps") or FEW
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dtypes = (torch.float32, torch.float64)
    made = {(mode, dtype): train(mode, dtype, steps, min(1000, steps // 4)) for dtype in dtypes for mode in MODES}
    torch.set_num_threads(threads)
    return made


@BOTH
@pytest.mark.parametrize("mode", MODES)
def test_all_numbers_are_finite_and_normal(outcomes, mode, dtype):
    outcome = outcomes[mode, dtype]
    times = f"CPU seconds of the first tenth {outcome.early:.2f}, of the last {outcome.late:.2f}"
    print(f"{mode} {dtype}: memory +{outcome.growth / MEGABYTES:.1f} MB; {times}; loss {outcome.losses[1]:.4f}")
    assert outcome.finite and outcome.losses[1] < outcome.losses[0]
    assert outcome.subnormal == 0 or "avx2" not in isas()  # only x86 flushes them, and torch's own operators do not


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc: on Linux")
@BOTH
@pytest.mark.parametrize("mode", MODES)
def test_memory_is_flat(outcomes, mode, dtype):
    assert outcomes[mode, dtype].growth < 20 * MEGABYTES


def test_live_mode_ends_where_masked_mode_does(outcomes):
    """In float64: rounding differs, and what is left of it after 10,000 steps is far below 1e-9."""
    masked, live = (outcomes[mode, torch.float64].tensors for mode in MODES)
    torch.testing.assert_close(live, masked, rtol=0, atol=1e-9)
