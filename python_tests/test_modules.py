"""MaskedConv2d."""

import copy
import io
import pickle

import pytest
import torch
from conv_cases import assert_same, assert_zero
from torch import nn

import prunekernels as pk
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


@pytest.mark.parametrize("grad", ["masked", "dense"])
def test_masked(grad):
    layer = make()
    layer.weight_grad = grad
    assert_computes(layer, filter_mask=FILTERS, kernel_mask=KERNELS, input_mask=INPUTS, weight_grad=grad)


@pytest.mark.parametrize("grad", ["masked", "dense"])
def test_grad_scale(grad):
    layer, scale = make(), torch.tensor([0, 0.5, 1, 2, 1, 0])
    layer.weight_grad, layer.grad_scale = grad, scale
    masks = {"filter_mask": FILTERS, "kernel_mask": KERNELS, "input_mask": INPUTS}
    assert_computes(layer, weight_grad=grad, grad_scale=scale, **masks)


def test_density():
    layer = make()
    live = FILTERS[:, None] & KERNELS & INPUTS
    assert layer.density == pytest.approx(live.float().mean().item())
    layer.set_masks(filter="all", kernel="all", input="all")
    assert layer.density == 1


def test_set_masks_none_leaves_and_all_resets():
    layer = make()
    layer.set_masks(filter=~FILTERS)
    assert torch.equal(layer.filter_mask, ~FILTERS) and torch.equal(layer.input_mask, INPUTS)
    layer.set_masks(input="all")
    assert layer.input_mask.all() and torch.equal(layer.kernel_mask, KERNELS)
    assert_computes(layer, filter_mask=~FILTERS, kernel_mask=KERNELS)


def test_set_masks_copies_into_the_same_buffers():
    layer, mine = make(masked=False), FILTERS.clone()
    buffer = layer.filter_mask
    layer.set_masks(filter=mine)
    mine.fill_(True)
    assert layer.filter_mask is buffer and torch.equal(buffer, FILTERS)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"filter": FILTERS[:5]}, "filter"),
        ({"filter": FILTERS.float()}, "filter"),
        ({"filter": FILTERS.to("meta")}, "filter"),
        ({"filter": "none"}, "filter"),
        ({"filter": [True] * 6}, "filter"),
        ({"kernel": KERNELS.T}, "kernel"),
        ({"kernel": KERNELS[0]}, "kernel"),
        ({"input": INPUTS[:1]}, "input"),
        ({"input": INPUTS.byte()}, "input"),
        ({"hard": HARD[None]}, "hard"),
        ({"hard": HARD.int()}, "hard"),
    ],
    ids=str,
)
def test_failed_set_masks_leaves_the_layer_as_it_was(bad, named):
    layer = make()
    before = state(layer)
    good = {"filter": ~FILTERS, "kernel": ~KERNELS, "input": ~INPUTS}
    with pytest.raises(ValueError, match=rf"(?s)set_masks.*{named}.*expected.*got"):
        layer.set_masks(**good | bad)
    assert all(torch.equal(mask, before[name]) for name, mask in state(layer).items())
    assert_computes(layer, filter_mask=FILTERS, kernel_mask=KERNELS, input_mask=INPUTS)


def test_hard_dead_is_dead_and_does_not_learn():
    layer = make(masked=False)
    layer.set_masks(hard=HARD)
    assert torch.equal(layer.hard_mask, HARD) and torch.equal(layer.filter_mask, HARD)
    layer.weight_grad = "dense"
    assert_computes(layer, filter_mask=HARD, weight_grad="dense", grad_scale=HARD.float())


def test_soft_and_hard_dead_together():
    layer = make(masked=False)
    layer.set_masks(filter=FILTERS, hard=HARD)
    layer.weight_grad, layer.grad_scale = "dense", torch.tensor([1, 0.5, 1, 2, 1, 1])
    want = layer.grad_scale * HARD
    assert_computes(layer, filter_mask=FILTERS, weight_grad="dense", grad_scale=want)


@pytest.mark.parametrize("revive", [bools(1, 1, 1, 1, 1, 1), ~HARD], ids=str)
def test_hard_dead_stays_dead(revive):
    layer = make(masked=False)
    layer.set_masks(hard=HARD)
    with pytest.raises(ValueError, match="(?s)set_masks.*filter.*hard"):
        layer.set_masks(filter=revive)
    assert torch.equal(layer.filter_mask, HARD)
    layer.set_masks(filter=HARD & FILTERS)
    assert torch.equal(layer.filter_mask, HARD & FILTERS)


def test_all_revives_all_but_the_hard_dead():
    layer = make(masked=False)
    layer.set_masks(filter=FILTERS, hard=HARD)
    layer.set_masks(filter="all")
    assert torch.equal(layer.filter_mask, HARD)


def test_hard_all_lets_the_filter_come_back():
    layer = make(masked=False)
    layer.set_masks(hard=HARD)
    layer.set_masks(hard="all")
    layer.set_masks(filter="all")
    assert layer.filter_mask.all() and layer.density == 1


@pytest.mark.parametrize("name", MASKS)
def test_in_place_edits_are_noticed(name):
    layer = make(masked=False)
    layer(torch.zeros(1, 4, 5, 6))  # builds whatever is cached
    getattr(layer, name)[2] = False
    masks = {"filter_mask" if name == "hard_mask" else name: getattr(layer, name)}
    assert_computes(layer, **masks)
    assert layer.density < 1
    getattr(layer, name)[2] = True
    assert_computes(layer)


def test_an_edit_of_hard_mask_stops_learning_too():
    layer = make(masked=False)
    layer.weight_grad = "dense"
    layer(torch.zeros(1, 4, 5, 6))
    layer.hard_mask.copy_(HARD)
    assert_computes(layer, filter_mask=HARD, weight_grad="dense", grad_scale=HARD.float())


def test_state_dict_keys():
    assert set(make().state_dict()) == {"weight", "bias", *MASKS}
    assert set(make(bias=False).state_dict()) == {"weight", *MASKS}


def test_loads_a_plain_checkpoint():
    plain, layer = nn.Conv2d(4, 6, 3, padding=1), make(masked=False)
    layer.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(layer(x), plain(x))


def test_a_plain_checkpoint_still_has_to_be_complete():
    with pytest.raises(RuntimeError, match="bias"):
        make().load_state_dict({"weight": torch.zeros(6, 4, 3, 3)}, strict=True)


def test_loads_a_masked_checkpoint():
    layer = make()
    layer.set_masks(hard=HARD)
    other = make(masked=False)
    other(torch.zeros(1, 4, 5, 6))
    other.load_state_dict(layer.state_dict(), strict=True)
    assert all(torch.equal(mask, state(layer)[name]) for name, mask in state(other).items())
    assert_computes(other, filter_mask=FILTERS & HARD, kernel_mask=KERNELS, input_mask=INPUTS)


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
    """A dead filter's weights do not move under plain SGD; live ones do."""
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
