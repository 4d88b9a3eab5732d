"""Each function of ptx.cuh on a GPU against its host twin in the emulator, on random numbers: the emulator's tests of
kernels say what a GPU does only as far as the twins are right.
"""

import ctypes
import importlib.util
import subprocess

import numpy as np
import pytest
import torch

from cases.cuda import WHY_NOT
from cases.emulated import arrays, build

if WHY_NOT:
    pytest.skip(WHY_NOT, allow_module_level=True)

spec = importlib.util.spec_from_file_location("find_toolkit", build.CSRC / "find_toolkit.py")
find_toolkit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(find_toolkit)


@pytest.fixture(scope="module")
def host():
    return build.load("emulator")


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    toolkit = find_toolkit.find_toolkit()
    if not toolkit:
        pytest.skip("nvcc cannot be found")
    path = tmp_path_factory.mktemp("instructions") / "instructions.so"
    number = "{}{}".format(*torch.cuda.get_device_capability())
    number += "a" if number == "90" else ""  # the instructions of warpgroups
    command = [
        toolkit / "bin" / "nvcc", "-std=c++17", f"-I{build.CSRC}", "-shared", "-Xcompiler", "-fPIC",
        f"-gencode=arch=compute_{number},code=sm_{number}",
        build.EMULATOR / "instructions.cu", "-o", path,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(path))


def both(host, device, name, *arguments):
    """Calls a function on the host and on the GPU, with equal arrays. Gives the arrays as the GPU left them."""
    copies = [torch.from_numpy(a.copy().view(np.uint8)).cuda() if isinstance(a, np.ndarray) else a for a in arguments]
    types = host._types[name]
    torch.cuda.synchronize()
    passed = [t(a.data_ptr() if isinstance(a, torch.Tensor) else a) for t, a in zip(types, copies, strict=True)]
    assert getattr(device, name)(*passed) == 0
    torch.cuda.synchronize()
    host.call(name, *arguments)
    return [
        c.cpu().numpy().view(a.dtype).reshape(a.shape) if isinstance(a, np.ndarray) else None
        for c, a in zip(copies, arguments, strict=True)
    ]


def words(rng, *size):
    return arrays.guarded(rng.integers(0, 1 << 32, size, dtype=np.uint64).astype(np.uint32), np.uint32)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("matrices", [2, 4])
def test_ldmatrix(matrices, transposed, seed, host, device):
    rng = np.random.default_rng(seed)
    addresses = arrays.guarded(16 * rng.integers(0, 40, 32), np.uint32)
    arguments = [words(rng, 160), addresses, arrays.guarded(np.zeros((32, 4)), np.uint32), 160, matrices, transposed]
    got = both(host, device, "pk_ldmatrix", *arguments)[2]
    assert np.array_equal(got, arguments[2])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("element", ["bf16", "f16", "tf32"])
def test_mma(element, seed, host, device):
    """Sums may be rounded otherwise: tensor cores keep a few bits more, or fewer, than a float."""
    rng = np.random.default_rng(seed)
    count = 1 if element == "tf32" else 2  # elements of a register
    draw = lambda *size: arrays.narrow(rng.standard_normal(size), element).view(np.uint32)  # noqa: E731
    a, b = (arrays.guarded(draw(32, each * count), np.uint32) for each in (4, 2))
    d = arrays.guarded(rng.standard_normal((32, 4)), np.float32)
    start = np.abs(d).max()
    got = both(host, device, "pk_mma", a, b, d, ["bf16", "f16", "tf32"].index(element))[2]
    assert np.abs(got - d).max() <= 2**-18 * (start + 16 * 16)
    assert np.abs(d).max() > 1


@pytest.mark.parametrize("element", ["bf16", "f16"])
def test_wgmma(element, host, device):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    rng = np.random.default_rng(0)
    a, b = (arrays.narrow(rng.standard_normal(size), element) for size in ((64, 64), (128, 64)))
    d = arrays.poison((128, 64))
    got = both(host, device, "pk_wgmma", a, b, d, ["bf16", "f16"].index(element))[2]
    assert np.abs(got - d).max() <= 2**-18 * 64 * 16 and np.abs(d).max() > 1


def test_conversions(host, device):
    rng = np.random.default_rng(0)
    every = np.arange(1 << 16, dtype=np.uint32)
    bits = np.concatenate([every, every << 16, (every << 16) + 0x8000, (every << 13) + 0x1000, words(rng, 1 << 16)])
    values, n = arrays.guarded(bits.astype(np.uint32).view(np.float32), np.float32), len(bits)
    narrow = [arrays.poison(n, np.uint16) for _ in range(2)]
    wide = [arrays.poison(n, np.uint32), arrays.poison(n), arrays.poison(n)]
    got = both(host, device, "pk_convert", values, *narrow, *wide, n)
    for name, mine, want in zip(("bf16", "f16"), got[1:3], narrow, strict=True):
        assert np.array_equal(mine, want), name
    for name, mine, want in zip(("tf32", "from bf16", "from f16"), got[3:6], wide, strict=True):
        assert np.array_equal(mine.view(np.float32), want.view(np.float32), equal_nan=True), name


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bytes_", [4, 8, 16])
def test_cp_async(bytes_, seed, host, device):
    rng = np.random.default_rng(seed)
    to, valid = arrays.poison((64, bytes_ // 4), np.uint32), arrays.guarded(rng.integers(0, 2, 64), np.int32)
    got = both(host, device, "pk_copy", words(rng, 64, bytes_ // 4), valid, to, bytes_, 64)[2]
    assert np.array_equal(got, to)
