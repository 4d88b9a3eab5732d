"""MaskedConv2d as a layer: equal to nn.Conv2d where nothing is dead, and usable wherever nn.Conv2d is."""

import copy
import io
import pickle

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import prunekernels as pk
from cases.conv import assert_zero
from cases.layers import FILTERS, INPUTS, KERNELS, MASKS, assert_computes, integers, make
from prunekernels import reference


def test_is_a_conv_all_live_at_birth():
    layer = pk.MaskedConv2d(4, 6, 3, groups=2)
    assert isinstance(layer, nn.Conv2d)
    assert {name: tuple(getattr(layer, name).shape) for name in MASKS} == {
        "filter_mask": (6,),
        "kernel_mask": (6, 2),
        "input_mask": (4,),
        "hard_mask": (6,),
    }
    assert all(getattr(layer, name).all() and getattr(layer, name).dtype == torch.bool for name in MASKS)
    assert layer.density == 1 and layer.weight_grad == "masked" and layer.grad_scale is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, 1, (1, 2), "same", "valid"])
def test_all_live_equals_conv2d_bit_for_bit(padding, mode, bias):
    args = {"padding": padding, "padding_mode": mode, "bias": bias}
    layer = pk.MaskedConv2d(4, 6, 3, **args)
    plain = nn.Conv2d(4, 6, 3, **args)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k in ("weight", "bias")})
    x = torch.randn(2, 4, 6, 5)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(a).square().sum().backward()
    plain(b).square().sum().backward()
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(a.grad, b.grad) and torch.equal(layer.weight.grad, plain.weight.grad)
    assert not bias or torch.equal(layer.bias.grad, plain.bias.grad)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, (1, 2), "same"])
@pytest.mark.parametrize("kernel_size", [3, (2, 3)])
def test_padding_modes_with_masks(kernel_size, padding, mode):
    layer = pk.MaskedConv2d(4, 6, kernel_size, padding=padding, padding_mode=mode)
    layer.set_masks(filter=FILTERS, kernel=KERNELS, input=INPUTS)
    plain = nn.Conv2d(4, 6, kernel_size, padding=padding, padding_mode=mode)
    filters, _, live = reference.live_masks(layer.weight, FILTERS, KERNELS, INPUTS, 1)
    with torch.no_grad():
        plain.weight.copy_(layer.weight * live[:, :, None, None])
        plain.bias.copy_(layer.bias * filters)
    x = torch.randn(2, 4, 6, 7)
    torch.testing.assert_close(layer(x), plain(x))
    assert_zero(layer(x)[:, ~FILTERS])
    x[:, ~INPUTS] = float("nan")
    assert not layer(x).isnan().any()


def through_save(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), through_save])
def test_copies(copied, used):
    layer = make()
    if used:
        layer(torch.zeros(1, 4, 5, 6))
    other = copied(layer)
    assert type(other) is pk.MaskedConv2d and torch.equal(other.weight, layer.weight)
    assert_computes(other, filter_mask=FILTERS, kernel_mask=KERNELS, input_mask=INPUTS)


def test_a_deep_copy_is_independent():
    layer = make()
    layer(torch.zeros(1, 4, 5, 6))
    other = copy.deepcopy(layer)
    other.set_masks(filter="all", kernel="all", input="all")
    assert_computes(other)
    assert_computes(layer, filter_mask=FILTERS, kernel_mask=KERNELS, input_mask=INPUTS)


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_a_deep_copy_of_a_compiled_layer_computes_itself():
    layer = make()
    layer.compile(backend="eager")
    other = copy.deepcopy(layer)
    x = integers(1, 4, 5, 6)
    with torch.no_grad():
        expected = layer(x)
        layer.weight.zero_()
        layer.bias.zero_()
    assert expected.abs().max() > 0 and torch.equal(other(x), expected)


@pytest.mark.parametrize("to", [nn.Module.double, nn.Module.half, nn.Module.bfloat16], ids=lambda f: f.__name__)
def test_dtypes(to):
    layer = to(make())
    assert all(getattr(layer, name).dtype == torch.bool for name in MASKS)
    y = layer(torch.ones(1, 4, 5, 6, dtype=layer.weight.dtype))
    assert y.dtype == layer.weight.dtype
    assert_zero(y[:, ~FILTERS])


def test_meta_device_and_to_empty():
    layer = pk.MaskedConv2d(4, 6, 3, device="meta")
    assert layer.filter_mask.device.type == "meta" and layer.weight.device.type == "meta"


def test_channels_last_module():
    layer = make().to(memory_format=torch.channels_last)
    x = integers(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


def test_repr_tells_what_is_live():
    assert repr(make(masked=False)).startswith("MaskedConv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)")
    text = make().extra_repr()
    live = int((FILTERS[:, None] & KERNELS & INPUTS).sum())
    assert "filters=4/6" in text and "inputs=3/4" in text and f"kernels={live}/24" in text


def test_from_conv_shares_parameters():
    conv = nn.Conv2d(4, 6, 3, padding="same", dilation=2, groups=2, padding_mode="reflect")
    layer = pk.MaskedConv2d.from_conv(conv)
    assert type(layer) is pk.MaskedConv2d and layer.weight is conv.weight and layer.bias is conv.bias
    x = torch.randn(2, 4, 7, 7)
    assert torch.equal(layer(x), conv(x))


@pytest.mark.parametrize("training", [True, False])
def test_from_conv_keeps_mode_and_dtype(training):
    layer = pk.MaskedConv2d.from_conv(nn.Conv2d(4, 6, 3, bias=False, dtype=torch.float64).train(training))
    assert layer.training is training and layer.bias is None
    assert layer(torch.zeros(1, 4, 5, 5, dtype=torch.float64)).dtype == torch.float64


def test_to_conv_is_independent_and_plain():
    layer = make()
    conv = layer.to_conv()
    assert type(conv) is nn.Conv2d and set(conv.state_dict()) == {"weight", "bias"}
    assert_zero(conv.weight[~(FILTERS[:, None] & KERNELS & INPUTS)])
    assert_zero(conv.bias[~FILTERS])
    x = integers(2, 4, 5, 6)
    assert torch.equal(conv(x), layer(x))
    before = layer.weight.clone()
    with torch.no_grad():
        conv.weight.zero_()
    assert torch.equal(layer.weight, before)


def test_trains():
    """The weights of a dead filter do not move under plain SGD; those of live filters do."""
    layer = make()
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(integers(2, 4, 5, 6)).square().mean().backward()
    optimizer.step()
    live = FILTERS[:, None] & KERNELS & INPUTS
    assert torch.equal(layer.weight[~live], before[~live])
    assert (layer.weight[live] != before[live]).any()


@pytest.mark.parametrize("name", ["weight_grad", "grad_scale"])
def test_bad_attributes_are_told_no_later_than_forward(name):
    layer = make()
    bad = {"weight_grad": "soft", "grad_scale": torch.ones(5)}[name]
    with pytest.raises((ValueError, RuntimeError), match=rf"(?s){name}.*expected.*got"):
        setattr(layer, name, bad)
        layer(integers(2, 4, 5, 6))


def test_takes_3d_input():
    layer, x = make(), integers(4, 5, 6)
    assert torch.equal(layer(x), layer(x[None])[0])


@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (2, 5, 5, 6), (4, 5), (1, 2, 4, 5, 6)], ids=str)
def test_wrong_input(shape):
    with pytest.raises((ValueError, RuntimeError), match=r"(?s)MaskedConv2d|masked_conv2d.*expected.*got"):
        make()(torch.zeros(shape))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    layer, x = make(), integers(2, 4, 5, 6).requires_grad_()
    want = torch.autograd.grad(layer(x).square().sum(), (x, *layer.parameters()))
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
    y.square().sum().backward()
    assert all(map(torch.equal, (x.grad, layer.weight.grad, layer.bias.grad), want))


def test_backward_twice():
    layer, x = make(), integers(2, 4, 5, 6).requires_grad_()
    total = layer(x).square().sum()
    total.backward(retain_graph=True)
    once = layer.weight.grad.clone()
    total.backward()
    assert torch.equal(layer.weight.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()
