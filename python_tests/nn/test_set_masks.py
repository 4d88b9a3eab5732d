"""MaskedConv2d's masks: set, edited in place, hard, loaded; what the layer computes with them."""

import pytest
import torch
from torch import nn

from cases.layers import FILTERS, HARD, INPUTS, KERNELS, MASKS, assert_computes, bools, integers, make, state


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
    layer(torch.zeros(1, 4, 5, 6))  # fills every cache
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


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_masks_set_and_used_without_autograd_serve_training_later(mode):
    layer = make(masked=False)
    with mode():
        layer.set_masks(filter=FILTERS, kernel=KERNELS, input=INPUTS)
        layer(integers(2, 4, 5, 6))
    assert_computes(layer, filter_mask=FILTERS, kernel_mask=KERNELS, input_mask=INPUTS)
