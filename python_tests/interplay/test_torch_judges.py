"""torch's own samples, errors and module inputs of conv2d, put to the masked operator and the masked layer."""

import functools
import itertools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import prunekernels as pk

WHY = "torch's tests need expecttest and more: pip install expecttest hypothesis"


@functools.cache
def of_torch(module, entries, chosen):
    """An entry of torch's own test tables. Their import would forbid this process to set flags of torch.backends."""
    with mock.patch("torch.backends.disable_global_flags", lambda: None):
        tables = pytest.importorskip(f"torch.testing._internal.{module}", reason=WHY, exc_type=ImportError)
    entry = next(filter(chosen, getattr(tables, entries)), None)
    return entry or pytest.skip("this version of torch has no samples of conv2d")


def is_conv2d(op):
    return op.name == "nn.functional.conv2d"


def is_conv2d_module(info):
    return info.module_cls is nn.Conv2d


def op_info():
    return of_torch("common_methods_invocations", "op_db", is_conv2d)


def module_info():
    return of_torch("common_modules", "module_db", is_conv2d_module)


patterns = pytest.mark.parametrize("pattern", ["all-live", "random", "all-dead"])
MODES = ("masked", "live")


def test_flags_can_still_be_set():
    op_info(), module_info()
    assert not torch.backends.flags_frozen()


def samples(dtype=torch.float64):
    torch.manual_seed(0)
    found = list(op_info().sample_inputs("cpu", dtype, requires_grad=dtype.is_floating_point))
    assert len(found) >= 20
    return found


def masks_for(weight, groups, pattern, seed):
    """filter_mask, kernel_mask and input_mask."""
    filters, channels = weight.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    share = {"all-live": 1.1, "random": 0.6, "all-dead": -1.0}[pattern]
    sizes = {"filter_mask": (filters,), "kernel_mask": (filters, channels), "input_mask": (channels * groups,)}
    return {name: torch.rand(size, generator=generator) < share for name, size in sizes.items()}


def contract(x, weight, bias, masks, groups=1, **options):
    """conv2d of masked weights and inputs."""
    filters, kernels, inputs = masks.values()
    weight = torch.where((filters[:, None] & kernels)[:, :, None, None], weight, 0)
    x = torch.where(inputs[:, None, None], x, 0)
    return F.conv2d(x, weight, None if bias is None else torch.where(filters, bias, 0), groups=groups, **options)


def tolerance(dtype):
    return {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}


def split(sample):
    weight, bias = sample.args
    return sample.input, weight, bias, dict(sample.kwargs)


def assert_same_results(run, judge, leaves):
    """Outputs and gradients of all leaves."""
    got, want = run(*leaves), judge(*leaves)
    torch.testing.assert_close(got, want, **tolerance(want.dtype))
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(want.dtype)
    for mine, theirs in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (got, want)), strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance(want.dtype))


@patterns
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_samples(dtype, pattern):
    for i, sample in enumerate(samples(dtype)):
        x, weight, bias, options = split(sample)
        masks = masks_for(weight, options.get("groups", 1), pattern, i)
        leaves = [t for t in (x, weight, bias) if t is not None]
        assert_same_results(
            lambda x, w, b=None, m=masks, o=options: pk.masked_conv2d(x, w, b, **m, **o),
            lambda x, w, b=None, m=masks, o=options: contract(x, w, b, m, **o),
            leaves,
        )


@patterns
@pytest.mark.parametrize("mode", MODES)
def test_samples_through_the_layer(mode, pattern):
    """Twice: the masks change between."""
    for i, sample in enumerate(samples()):
        x, weight, bias, options = split(sample)
        groups, size = options.get("groups", 1), (weight.shape[1], weight.shape[0])
        layer = pk.MaskedConv2d(
            size[0] * groups, size[1], weight.shape[2:], bias=bias is not None, dtype=weight.dtype, **options
        )
        with torch.no_grad():
            layer.weight.copy_(weight)
            if bias is not None:
                layer.bias.copy_(bias)
        net = pk.flow(nn.Sequential(layer), mode == "live")
        for seed in (i, 100 + i):
            masks = masks_for(weight, groups, pattern, seed)
            layer.set_masks(**{name.removesuffix("_mask"): mask for name, mask in masks.items()})
            leaves = [x, *layer.parameters()]
            judge = lambda x, w, b=None, m=masks, o=options: contract(x, w, b, m, **o)  # noqa: E731
            assert_same_results(lambda x, *_, net=net: net(x), judge, leaves)


@patterns
def test_gradients_of_gradients(pattern):
    for i, sample in enumerate(samples()):
        x, weight, bias, options = split(sample)
        masks = masks_for(weight, options.get("groups", 1), pattern, i)
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
        run = lambda x, w, b=None, m=masks, o=options: pk.masked_conv2d(x, w, b, **m, **o)  # noqa: E731
        assert gradcheck(run, leaves, fast_mode=True), sample
        assert gradgradcheck(run, leaves, fast_mode=True), sample


def call(sample):
    """As the sample says, with masks of the right size where there is one."""
    x, weight, bias, options = split(sample)
    live = torch.ones(weight.shape[0], dtype=torch.bool)
    live[0] = False
    return pk.masked_conv2d(x, weight, bias, filter_mask=live, **options)


def test_errors():
    """What conv2d refuses, the masked operator refuses, in words of its own, and does not crash."""
    errors = list(op_info().error_inputs("cpu"))
    assert len(errors) >= 5
    for error in errors:
        with pytest.raises((ValueError, RuntimeError, TypeError)) as caught:
            call(error.sample_input)
        assert "masked_conv2d" in str(caught.value), (error.error_regex, str(caught.value))


def test_errors_of_the_layer():
    """A layer is made of its arguments, or refused, as nn.Conv2d is; wrong inputs are refused alike."""
    for error in op_info().error_inputs("cpu"):
        x, weight, bias, options = split(error.sample_input)
        if weight.dim() != 4:
            continue
        groups = options.get("groups", 1)
        arguments = (weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]))
        refused = []
        for cls in (nn.Conv2d, pk.MaskedConv2d):
            try:
                layer = cls(*arguments, **options)
                if cls is pk.MaskedConv2d:
                    layer.set_masks(filter=torch.arange(weight.shape[0]) > 0)
                layer(x.to(layer.weight.dtype))
            except (ValueError, RuntimeError, TypeError):
                refused.append(cls)
            except ZeroDivisionError:
                refused.append(cls)
        assert refused in ([], [nn.Conv2d, pk.MaskedConv2d]), (arguments, options, refused)


@patterns
@pytest.mark.parametrize("mode", MODES)
def test_module_inputs(mode, pattern):
    inputs = module_info().module_inputs_func(module_info(), "cpu", torch.float64, True, True)
    padded = [("zeros", {}), ("reflect", {"padding": 1}), ("circular", {"padding": 1})]
    assert len(inputs) >= 2
    for (i, given), (padding_mode, more) in itertools.product(enumerate(inputs), padded):
        arguments = given.constructor_input.kwargs | {"padding_mode": padding_mode} | more
        layer = pk.MaskedConv2d(*given.constructor_input.args, dtype=torch.float64, **arguments)
        plain = nn.Conv2d(*given.constructor_input.args, dtype=torch.float64, **arguments)
        masks = masks_for(layer.weight, layer.groups, pattern, i)
        layer.set_masks(**{name.removesuffix("_mask"): mask for name, mask in masks.items()})
        filters, kernels, inputs_live = masks.values()
        with torch.no_grad():
            plain.weight.copy_(torch.where((filters[:, None] & kernels)[:, :, None, None], layer.weight, 0))
            plain.bias.copy_(torch.where(filters, layer.bias, 0))
        net = pk.flow(nn.Sequential(layer), mode == "live")
        (x,) = given.forward_input.args
        want = plain(torch.where(inputs_live[:, None, None], x, 0))
        torch.testing.assert_close(net(x), want)
        if given.reference_fn is not None and padding_mode == "zeros":
            torch.testing.assert_close(net(x), given.reference_fn(net, x))
