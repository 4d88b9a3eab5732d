"""GPUs that the kernels of a build do not run on: found out before the first launch, and served by pure torch."""

import pytest
import torch

import prunekernels as pk
from cases.without_extension import python
from prunekernels.ops import extension, gpus

if not pk.has_extension():
    pytest.skip("the compiled extension is not there", allow_module_level=True)


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 6), True),
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("sm_80,compute_80", (12, 1), True),
        ("compute_90", (8, 9), False),
        ("sm_90a", (9, 0), True),
        ("sm_90a", (8, 0), False),
        ("sm_90a,compute_90a", (10, 0), False),
        ("sm_100f", (10, 3), True),
        ("compute_100f", (12, 0), False),
        ("sm_80,compute_80,sm_90a", (7, 5), False),
        ("", (5, 0), True),
    ],
)
def test_what_runs_where(architectures, capability, runs):
    assert extension._C.runs_on_gpu(*capability, architectures) == runs


def test_the_build_names_its_architectures():
    named = [name for name in pk.build_info()["cuda_architectures"].split(",") if name]
    assert bool(named) == bool(pk.build_info()["cuda"])
    assert all(row["architectures"] == named for row in pk.kernels() if row["device"] == "cuda")
    assert not any("architectures" in row for row in pk.kernels() if row["device"] == "cpu")


class Cuda:
    """torch.cuda with a GPU of each capability."""

    def __init__(self, *capabilities):
        self.device_count = lambda: len(capabilities)
        self.get_device_capability = lambda index: capabilities[index]


@pytest.fixture
def hopper_build(monkeypatch):
    info = {"cuda": "13.0", "cuda_architectures": "sm_90a", "torch": torch.__version__}
    monkeypatch.setattr(extension, "build_info", lambda: info)
    runs_on = extension._C.runs_on_gpu
    monkeypatch.setattr(extension._C, "runs_on_gpu", lambda major, minor: runs_on(major, minor, "sm_90a"))


def test_pure_torch_where_a_gpu_runs_no_kernel(monkeypatch, hopper_build):
    replaced = []
    monkeypatch.setattr(gpus, "use_fallbacks", lambda: replaced.append(True))
    monkeypatch.setattr(torch, "cuda", Cuda((9, 0)))
    gpus._check()
    assert not replaced
    monkeypatch.setattr(torch, "cuda", Cuda((8, 0), (9, 0)))
    with pytest.warns(RuntimeWarning, match=r"for sm_90a, and a GPU here has compute capability 8.0 .*=\"8.0\""):
        gpus._check()
    assert replaced


CODE = """
import functools, torch, prunekernels as pk
from prunekernels.ops import fallback, gpus
called = set()

def counted(operator):
    @functools.wraps(operator)
    def call(*arguments):
        called.add(operator.__name__)
        return operator(*arguments)
    return call

layer = pk.MaskedConv2d(6, 8, 3)
layer.set_masks(filter=torch.arange(8) < 5)
x = torch.randn(2, 6, 5, 5)
before = layer(x)
fallback.OPERATORS = tuple(map(counted, fallback.OPERATORS))
gpus.use_fallbacks("CPU")  # what it does to CUDA, on the device that is here
y = layer(x)
y.sum().backward()
torch.testing.assert_close(y, before)
assert layer.weight.grad[5:].eq(0).all() and layer.weight.grad[:5].ne(0).any() and y[:, 5:].eq(0).all()
print(*sorted(called))
"""


def test_operators_are_replaced():
    done = python(CODE, PRUNEKERNELS_NO_EXT="")
    assert done.stdout.split() == ["masked_conv2d", "masked_conv2d_grad_bias", "masked_conv2d_grad_weight"], done.stderr
    assert not done.stderr
