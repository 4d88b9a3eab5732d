"""Without the compiled extension: one warning, the same numbers."""

import pytest

import prunekernels as pk
from cases.without_extension import python

WARNS = """
import warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import prunekernels as pk, torch
    pk.masked_conv2d(torch.zeros(1, 4, 5, 5), torch.zeros(4, 4, 3, 3), filter_mask=torch.arange(4) > 1)
    pk.masked_conv2d(torch.zeros(1, 4, 5, 5), torch.zeros(4, 4, 3, 3), filter_mask=torch.arange(4) > 1)
    pk.MaskedConv2d(4, 4, 3)(torch.zeros(1, 4, 5, 5))
ours = [w for w in seen if "prunekernels" in str(w.message)]
assert not pk.has_extension()
assert isinstance(pk.build_info(), dict)
print(len(ours), *(w.category.__name__ + ": " + str(w.message) for w in ours))
"""


def test_exactly_one_warning():
    done = python(WARNS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 ") and "Warning" in done.stdout, done.stdout


def test_no_warning_with_the_extension():
    if not pk.has_extension():
        pytest.skip("this run itself is without the extension")
    strict = "import warnings; warnings.simplefilter('error', RuntimeWarning); import prunekernels as pk; "
    done = python(strict + "assert pk.has_extension()", PRUNEKERNELS_NO_EXT="")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "select"),
    [
        ("test_conv.py test_channels.py", "odd_strides or shapes or adjoint or gradients"),
        ("test_conv_edges.py test_poison.py test_errors.py", ""),
    ],
)
def test_the_same_tests_pass(files, select):
    flags = ["-q", "--no-header", "-p", "no:cacheprovider", "-k", select]
    flags += [f"python_tests/ops/{file}" for file in files.split()]
    done = python(f"import sys, pytest; sys.exit(pytest.main({flags!r}))")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


LAYER = """
import copy, torch, prunekernels as pk
from torch import nn
torch.manual_seed(0)
first, last = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 6, 3, groups=2)
net = nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), last)
pk.convert(net)
live = torch.arange(8) % 3 != 0
net[0].set_masks(filter=live); net[1].set_mask(live); net[3].set_masks(input=live)
x = torch.randn(2, 3, 7, 7)
y = net(x); y.square().sum().backward()
print(*(f"{v:.5f}" for v in [y.sum().item(), *(p.grad.abs().sum().item() for p in net.parameters())]))
"""


@pytest.mark.slow
def test_layers_give_the_same_numbers():
    with_extension, without = python(LAYER, PRUNEKERNELS_NO_EXT=""), python(LAYER)
    assert with_extension.returncode == without.returncode == 0, with_extension.stderr + without.stderr
    numbers = [list(map(float, done.stdout.split())) for done in (with_extension, without)]
    assert len(numbers[0]) == 6 and numbers[0] == pytest.approx(numbers[1], rel=1e-3)


COMPILED = """
import torch, prunekernels as pk
x, w, live = torch.randn(2, 4, 6, 6), torch.randn(6, 4, 3, 3).requires_grad_(), torch.arange(6) > 2
call = lambda x, w: pk.masked_conv2d(x, w, filter_mask=live)
y = torch.compile(call, backend="aot_eager", fullgraph=True)(x, w)
assert torch.equal(y, call(x, w)), "numbers"
y.sum().backward()
assert not w.grad[~live].count_nonzero() and w.grad[live].count_nonzero()
"""


@pytest.mark.slow
def test_compiles():
    done = python(COMPILED)
    assert done.returncode == 0, done.stderr
