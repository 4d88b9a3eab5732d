"""Rows and columns of many tensors on a real GPU, beside those of the CPU; the lists stay on the CPU."""

import pytest
import torch

from cases.cuda import WHY_NOT, there
from cases.parts import SAMPLES
from prunekernels.ops.parts import gather_parts, scatter_parts

if WHY_NOT:
    pytest.skip(WHY_NOT, allow_module_level=True)

OPS = torch.ops.prunekernels


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("name", SAMPLES)
def test_samples(name, at):
    written, read, *lists = list(SAMPLES[name]())[at]
    on_gpu = list(there(written))
    getattr(OPS, name)(on_gpu, list(there(read)), *lists)
    getattr(OPS, name)(written, read, *lists)
    for got, want in zip(on_gpu, written, strict=True):
        assert torch.equal(got.cpu(), want) and got.stride() == want.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_on_both_devices_at_once(dtype):
    whole = torch.arange(24).view(4, 6).to(dtype)
    parts = [torch.ones(3, 2, dtype=dtype, device=device) for device in ("cuda", "cpu")]
    lists = [torch.tensor([2, -1, 0])] * 2, [torch.tensor([5, 1])] * 2
    wholes = [whole.cuda(), whole.clone()]
    gather_parts(parts, wholes, *lists)
    assert parts[0].tolist() == parts[1].tolist() == [[17, 13], [0, 0], [5, 1]]
    scatter_parts(wholes, [part + 30 for part in parts], *lists)
    assert torch.equal(wholes[0].cpu(), wholes[1]) and wholes[1][2, 5] == 47
