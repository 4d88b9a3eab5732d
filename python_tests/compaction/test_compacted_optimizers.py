"""Steps in compacted mode move parameters, statistics and optimizer state as those in masked mode do."""

import functools

import pytest
import torch

from cases.compacted import (
    assert_same_live,
    assert_same_training,
    batches,
    both_modes,
    dead_entries,
    mask_small,
    small,
    tensors_of,
)
from cases.optimizers import OPTIMIZERS, ROUNDS, X, over


@pytest.mark.parametrize("freeze", ["dead", "hard"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bound_optimizers(name, freeze):
    assert_same_training(*both_modes(small(), over(name), X, ROUNDS, freeze=freeze))


@pytest.mark.parametrize("name", ["sgd_nesterov", "sgd_fused", "adamw_foreach", "rmsprop", "adagrad", "masked_adamw"])
def test_an_optimizer_that_is_not_bound_leaves_dead_entries_alone(name):
    net = mask_small(small())
    before = dead_entries(net)
    masked, optimizer, other, its = both_modes(net, over(name), X, [(lambda net: None, batches())], freeze=None)
    assert_same_live(masked, other)
    for parameter, values in dead_entries(other).items():
        assert torch.equal(values, before[parameter]) and values.numel()
    want, got = tensors_of(masked, optimizer), tensors_of(other, its)
    assert got.keys() == want.keys()
    rows = other.second.filter_mask
    for key in [key for key in want if key.startswith("second.") and want[key].shape[:1] == rows.shape]:
        torch.testing.assert_close(got[key][rows], want[key][rows])


@pytest.mark.parametrize("freeze", ["dead", "hard"])
@pytest.mark.parametrize("name", ["sgd_nesterov", "adamw"])
def test_soft_dead_filters_and_dead_kernels_and_inputs(name, freeze):
    def set_masks(net, seed):
        mask_small(net, seed)
        generator = torch.Generator().manual_seed(seed)
        net.second.set_masks(kernel=torch.rand(5, 6, generator=generator) < 0.6)
        net.second.set_masks(input=torch.rand(6, generator=generator) < 0.7)

    rounds = [(functools.partial(set_masks, seed=seed), batches(seed=seed)) for seed in (1, 2, 1)]
    assert_same_training(*both_modes(small(), over(name), X, rounds, freeze=freeze))


@pytest.mark.parametrize("freeze", ["dead", "hard"])
@pytest.mark.parametrize("name", ["sgd", "sgd_nesterov", "masked_sgd", "adamw"])
def test_dead_channels_of_a_norm_alone(name, freeze):
    """The filters before it are live: their weights get no gradient, but momentum and weight decay move them."""

    def set_masks(net):
        net.first[1].set_mask(torch.tensor([1, 0, 1, 1, 0, 1]).bool())

    rounds = [(lambda net: None, batches()), (set_masks, batches(seed=2))]
    assert_same_training(*both_modes(small(), over(name), X, rounds, freeze=freeze))


@pytest.mark.parametrize("freeze", ["dead", "hard"])
@pytest.mark.parametrize("name", ["sgd_momentum", "masked_sgd", "adamw_fused"])
def test_groups_with_options_of_their_own(name, freeze):
    def groups(net):
        decay = [p for p in net.parameters() if p.dim() > 1 and p is not net.last.weight]
        plain = [p for p in net.parameters() if p.dim() == 1]
        return OPTIMIZERS[name]([{"params": decay, "lr": 0.02}, {"params": plain, "weight_decay": 0.0}])

    assert_same_training(*both_modes(small(), groups, X, ROUNDS, freeze=freeze))


def test_an_optimizer_of_named_parameters():
    made = lambda net: OPTIMIZERS["sgd_momentum"](net.named_parameters())  # noqa: E731
    masked, optimizer, other, its = both_modes(small(), made, X, ROUNDS, freeze="hard")
    assert_same_training(masked, optimizer, other, its)
    assert its.param_groups[0]["param_names"] == [name for name, _ in other.named_parameters()]


def test_an_optimizer_over_a_few_parameters():
    def some(net):
        return OPTIMIZERS["sgd_momentum"]([net.first[0].weight, net.hidden.weight])

    masked, optimizer, other, its = both_modes(small(), some, X, ROUNDS)
    assert_same_training(masked, optimizer, other, its)
    assert torch.equal(other.second.weight, small().second.weight)


@pytest.mark.parametrize("name", ["sgd_momentum", "adamw"])
def test_frozen_layers(name):
    net = small()
    net.first.requires_grad_(False)
    masked, optimizer, other, its = both_modes(net, over(name), X, ROUNDS)
    assert_same_training(masked, optimizer, other, its)
    assert torch.equal(other.first[0].weight, small().first[0].weight)


def test_layers_that_are_thawed_later():
    """The same masks come back, so the same small parameters; they train now, and their zeros must not."""
    net = small()
    net.second.requires_grad_(False)

    def union(net, thaw):
        mask_small(net, 1)
        net.first[1].set_mask("all")  # second reads all channels, so dead filters of first stay as zeros
        net.first.requires_grad_(thaw)
        net.second.requires_grad_(thaw)

    rounds = [(functools.partial(union, thaw=thaw), batches(seed=thaw)) for thaw in (False, True)]
    assert_same_training(*both_modes(net, over("sgd_momentum"), X, rounds))
