"""A small masked layer with its masks, and a check of what it computes."""

import torch

import prunekernels as pk
from cases.conv import assert_same
from prunekernels import reference

MASKS = ("filter_mask", "kernel_mask", "input_mask", "hard_mask")


def bools(*values):
    return torch.tensor(values, dtype=torch.bool)


FILTERS, INPUTS = bools(1, 0, 1, 1, 0, 1), bools(1, 0, 1, 1)
KERNELS = torch.arange(24).view(6, 4) % 6 != 2
HARD = bools(1, 1, 1, 1, 0, 1)


def integers(*shape):
    return torch.randint(-4, 5, shape).float()


def make(masked=True, **args):
    layer = pk.MaskedConv2d(4, 6, 3, **({"padding": 1} | args))
    with torch.no_grad():
        layer.weight.copy_(integers(*layer.weight.shape))
        if layer.bias is not None:
            layer.bias.copy_(integers(6))
    if masked:
        layer.set_masks(filter=FILTERS, kernel=KERNELS[:, : layer.weight.shape[1]], input=INPUTS)
    return layer


def state(layer):
    return {name: getattr(layer, name).clone() for name in MASKS}


def assert_computes(layer, **masks):
    """The layer gives the reference's output and gradients under these masks."""
    x, grad_out = integers(2, 4, 5, 6).requires_grad_(), integers(2, 6, 5, 6)
    y = layer(x)
    got = (y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), grad_out))
    assert_same(got, reference.gradients(x, layer.weight, layer.bias, grad_out, padding=1, **masks))
