"""Calls of the operators of a training step by the emulated CUDA operators and on the CPU: same arguments, results
compared.
"""

import pytest
import torch

from cases.steps import chosen, table
from prunekernels.ops.fallback_steps import live_elements

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
OURS = torch.ops.prunekernels


@pytest.fixture
def emulated(events):
    """The operators, logged in events."""
    return torch.ops.prunekernels_emulated


def draw(*size, dtype=F32, layout="contiguous", seed=0):
    x = torch.randint(-4, 5, size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return torch.cat([x, x], -1)[..., : size[-1]] if layout == "sliced" else x


def tensors_in(value):
    """Of nested lists, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in tensors_in(item)] if isinstance(value, (list, tuple)) else []


def assert_like_the_cpu(emulated, name, make, tolerance=None):
    """What the operators write and return. make() gives new arguments, always the same."""
    sides = []
    for operators in (emulated, OURS):
        arguments = make()
        before = [t._version for t in tensors_in(arguments)]
        returned = getattr(operators, name)(*arguments)
        written = [t._version > v for t, v in zip(tensors_in(arguments), before, strict=True)]
        sides.append((tensors_in([arguments, returned]), written))
    (got, got_written), (want, want_written) = sides
    assert got_written == want_written
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        torch.testing.assert_close(a, b, equal_nan=True, **(tolerance or {"rtol": 0, "atol": 0}))


# ---- parameters and what is dead in them

MASKS = {
    "rows": lambda K, C: table(chosen(K), channels=C),
    "columns": lambda K, C: table(None, torch.ones(K, C, dtype=torch.bool), chosen(C)),
    "kernels": lambda K, C: table(chosen(K), chosen(K, C)),
    "groups": lambda K, C: table(chosen(K), chosen(K, C), chosen(2 * C), groups=2),
    "constants": lambda K, C: table(torch.arange(K) != 1, (torch.arange(K) % 3 > 0)[:, None].expand(K, C)),
    "all": lambda K, C: table(torch.zeros(K, dtype=torch.bool), channels=C),
    "nothing": lambda K, C: table(torch.ones(K, dtype=torch.bool), channels=C),
}


def parameters(mask, dtype, layout, lists=1, size=(8, 33, 3, 3)):
    """Lists of a weight, its bias and a matrix without a mask, and the tables of the first two; what is dead is NaN in
    all lists but the first."""
    torch.manual_seed(5)
    made = MASKS[mask](*size[:2])
    found = []
    for i in range(lists):
        own = layout if layout != "mixed" else ("channels_last", "contiguous", "sliced")[i % 3]
        weight, bias = draw(*size, dtype=dtype, layout=own, seed=i), draw(size[0], dtype=dtype, seed=i + 9)
        for t in (weight, bias) if i else ():
            live = live_elements("test", made, t).expand_as(t)
            t.masked_fill_(~live, torch.nan)
        found.append([weight, bias, draw(4, 50, dtype=dtype, seed=i + 20)])
    return *found, [made, made, None]


def sums(*lengths, dtype=F32):
    return [torch.full((length,), 7.0, dtype=dtype) for length in lengths]


SGD = {  # lr, momentum, dampening, weight_decay, nesterov, first_step
    "plain": (0.5, 0.0, 0.0, 0.0, False, False),
    "momentum": (0.5, 0.5, 0.25, 0.25, False, False),
    "nesterov": (0.5, 0.5, 0.0, 0.25, True, False),
    "first step": (0.5, 0.5, 0.0, 0.25, True, True),
}


def ids(*values):
    return torch.tensor(values, dtype=torch.int32)


CLUSTERS = [ids(0, 3, 0, -1, 3, 0, 7, 0), ids(1, 1, -1, 5, 5, 1, 1, 2), ids(-1, -1, 0, 1)]
