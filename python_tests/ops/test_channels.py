"""gather_channels and scatter_channels against index_select and index_copy."""

import pytest
import torch

import prunekernels as pk
from cases.conv import assert_zero, generator, lay_out

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CHANNELS = [1, 15, 16, 17, 31, 32, 33, 64, 65]
DENSITIES = [0.0, 0.5, 1.0]
LAYOUTS = ["nchw", "channels_last", "sliced", "expanded"]
SHAPES = [(0, 5, 3, 3), (1, 5, 1, 1), (2, 5, 1, 17), (3, 5, 9, 7), (2, 5, 16, 16), (5, 40, 28, 28)]


def some(channels, density):
    chosen = torch.rand(channels, generator=generator(channels, density)) < density
    return chosen.nonzero().flatten().int()


def draw(*shape, dtype=torch.float32, layout="nchw"):
    return lay_out(torch.randn(shape, generator=generator(shape), dtype=torch.float64).to(dtype), layout)


def scattered(x, index, channels):
    return x.new_zeros(x.shape[0], channels, *x.shape[2:]).index_copy(1, index.long(), x)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_there_and_back(channels, density, dtype, layout):
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN
    index, x = some(channels, density), draw(2, channels, 5, 3, dtype=dtype, layout=layout)
    got = pk.gather_channels(x, index)
    assert got.dtype == dtype and torch.equal(got, x.index_select(1, index))
    small = draw(2, len(index), 5, 3, dtype=dtype, layout=layout)
    back = pk.scatter_channels(small, index, channels)
    assert back.dtype == dtype and torch.equal(back, scattered(small, index, channels))
    dead = torch.ones(channels, dtype=torch.bool).index_fill(0, index.long(), False)
    assert_zero(back[:, dead])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, layout):
    index, x = some(shape[1], 0.5), draw(*shape, layout=layout)
    got = pk.gather_channels(x, index)
    assert torch.equal(got, x[:, index.long()])
    assert torch.equal(pk.scatter_channels(got, index, shape[1] + 3), scattered(got, index, shape[1] + 3))


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_memory_format_is_kept(format):
    x, index = draw(2, 6, 4, 5).contiguous(memory_format=format), some(6, 0.5)
    got = pk.gather_channels(x, index)
    assert got.is_contiguous(memory_format=format)
    assert pk.scatter_channels(got, index, 6).is_contiguous(memory_format=format)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [7, 33])
def test_adjoint(channels, layout):
    """<gather(a), b> == <a, scatter(b)>"""
    index = some(channels, 0.6)
    a = draw(2, channels, 4, 3, dtype=torch.float64, layout=layout)
    b = draw(2, len(index), 4, 3, dtype=torch.float64, layout=layout)
    left, right = (pk.gather_channels(a, index) * b).sum(), (a * pk.scatter_channels(b, index, channels)).sum()
    torch.testing.assert_close(left, right)


@pytest.mark.parametrize(
    ("density", "layout"), [(0.0, "nchw"), (0.3, "nchw"), (0.3, "channels_last"), (1.0, "nchw"), (1.0, "channels_last")]
)
def test_gradients(density, layout):
    index = some(5, density)
    x = draw(2, 5, 3, 2, dtype=torch.float64, layout=layout).requires_grad_()
    small = draw(2, len(index), 3, 2, dtype=torch.float64, layout=layout).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: pk.gather_channels(t, index), x)
    assert torch.autograd.gradcheck(lambda t: pk.scatter_channels(t, index, 5), small)
    assert torch.autograd.gradgradcheck(lambda t: pk.gather_channels(t, index), x)
    assert torch.autograd.gradgradcheck(lambda t: pk.scatter_channels(t, index, 5), small)


def test_poison_in_channels_that_are_not_read():
    x, index = draw(2, 4, 3, 3).requires_grad_(), torch.tensor([0, 2], dtype=torch.int32)
    with torch.no_grad():
        x[:, 1] = float("nan")
    y = pk.gather_channels(x, index)
    assert not y.isnan().any()
    grad_out = torch.ones(2, 4, 3, 3)
    grad_out[:, 3] = float("nan")
    small = y.detach().requires_grad_()
    (grad,) = torch.autograd.grad(pk.scatter_channels(small, index, 4), small, grad_out)
    assert torch.equal(grad, torch.ones_like(y))


BAD_INDICES = {
    "decreasing": torch.tensor([2, 1], dtype=torch.int32),
    "repeated": torch.tensor([1, 1], dtype=torch.int32),
    "too large": torch.tensor([0, 4], dtype=torch.int32),
    "negative": torch.tensor([-1, 2], dtype=torch.int32),
    "int64": torch.tensor([0, 1]),
    "bool": torch.tensor([True, False]),
    "2-D": torch.tensor([[0, 1]], dtype=torch.int32),
    "another device": torch.empty(2, dtype=torch.int32, device="meta"),
}


@pytest.mark.parametrize("name", BAD_INDICES)
def test_bad_index_for_gather(name):
    with pytest.raises((ValueError, RuntimeError), match=r"gather_channels.*index.*expected.*got"):
        pk.gather_channels(torch.zeros(1, 4, 2, 2), BAD_INDICES[name])


@pytest.mark.parametrize("name", BAD_INDICES)
def test_bad_index_for_scatter(name):
    with pytest.raises((ValueError, RuntimeError), match=r"scatter_channels.*index.*expected.*got"):
        pk.scatter_channels(torch.zeros(1, 2, 2, 2), BAD_INDICES[name], 4)


def test_scatter_wants_one_index_per_channel():
    with pytest.raises((ValueError, RuntimeError), match=r"scatter_channels.*expected.*got"):
        pk.scatter_channels(torch.zeros(1, 3, 2, 2), torch.tensor([0, 1], dtype=torch.int32), 4)


@pytest.mark.parametrize("shape", [(4,), (1, 4, 2), (1, 4, 2, 2, 2)], ids=str)
def test_bad_rank(shape):
    bad, index = torch.zeros(shape), torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises((ValueError, RuntimeError), match=r"gather_channels.*x.*expected.*got"):
        pk.gather_channels(bad, index)
    with pytest.raises((ValueError, RuntimeError), match=r"scatter_channels.*x.*expected.*got"):
        pk.scatter_channels(bad, index, 8)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64], ids=str)
def test_bad_dtype(dtype):
    with pytest.raises((ValueError, RuntimeError), match=r"gather_channels.*expected.*got"):
        pk.gather_channels(torch.zeros(1, 4, 2, 2, dtype=dtype), torch.tensor([0], dtype=torch.int32))
