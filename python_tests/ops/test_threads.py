"""Thread counts: one thread works, more threads give the same result."""

import ast
import subprocess
import sys
import time

import pytest
import torch

import prunekernels as pk
from cases.conv import TOLERANCE


@pytest.fixture(autouse=True)
def compact():
    """Around a whole test: plan.force() is one setting for all threads."""
    with pk.plan.force("compact"):
        yield


def step(layout):
    gen = torch.Generator().manual_seed(0)
    x, w = (torch.randn(size, generator=gen) for size in ((9, 24, 15, 13), (40, 24, 3, 3)))
    x, w = x.contiguous(memory_format=layout).requires_grad_(), w.requires_grad_()
    masks = {"filter_mask": torch.rand(40, generator=gen) < 0.5, "input_mask": torch.rand(24, generator=gen) < 0.5}
    y = pk.masked_conv2d(x, w, padding=1, **masks)
    y.backward(torch.randn(y.shape, generator=gen))
    return y.detach(), x.grad, w.grad


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads(threads, layout):
    torch.set_num_threads(2)
    want = step(layout)
    torch.set_num_threads(threads)
    got = step(layout)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE[torch.float32])


def test_called_from_a_python_thread():
    from concurrent.futures import ThreadPoolExecutor

    want = step(torch.contiguous_format)
    with ThreadPoolExecutor(3) as pool:
        for got in pool.map(step, [torch.contiguous_format] * 6):
            assert all(torch.allclose(a, b, **TOLERANCE[torch.float32]) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(not pk.has_extension() or sys.platform != "linux", reason="the compiled loops on Linux")
def test_loops_share_torch_threads():
    x, index = torch.randn(8, 64, 64, 64), torch.arange(0, 64, 2, dtype=torch.int32)

    def seconds(threads):
        """Of this thread and of all others. This one's are more than its work: it spins while it waits."""
        torch.set_num_threads(threads)
        pk.gather_channels(x, index)
        everyone, this_thread = time.process_time(), time.thread_time()
        for _ in range(500):  # long beside what a test runner's own threads take
            pk.gather_channels(x, index)
        here = time.thread_time() - this_thread
        return here, time.process_time() - everyone - here

    alone, idle = seconds(1)
    _, others = seconds(2)
    assert idle < 0.01 * alone and others > 0.1 * alone, "one thread did all the work"


@pytest.mark.skipif(not pk.has_extension() or sys.platform != "linux", reason="the compiled loops on Linux")
def test_one_pool_of_threads():
    """That of torch. In a process of its own: other packages bring others along."""
    program = """if True:
        import torch, prunekernels
        prunekernels.gather_channels(torch.ones(8, 64, 64, 64), torch.arange(0, 64, 2, dtype=torch.int32))
        print({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line or "libiomp" in line})
    """
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert len(ast.literal_eval(said)) == 1
