"""Masked optimizers on transposed convolutions, whose weights have filters in the second dimension."""

import copy

import pytest
import torch

import prunekernels as pk
from cases.optimizers import OPTIMIZERS

FILTERS, INPUTS = torch.arange(6) % 2 == 0, torch.arange(4) > 0


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("freeze", ["hard", "dead"])
@pytest.mark.parametrize(("masked", "plain"), [("masked_sgd", "sgd_nesterov"), ("masked_adamw", "adamw")])
def test_frozen_entries_stand_still(masked, plain, freeze, groups):
    model = torch.nn.Sequential(torch.nn.ConvTranspose2d(4, 6, 2, groups=groups))
    pk.convert(model)
    layer = model[0]
    if freeze == "hard":
        layer.set_masks(hard=FILTERS)
    else:
        kernels = torch.arange(24 // groups).view(6, -1) % 7 != 3
        layer.set_masks(filter=FILTERS, kernel=kernels, input=INPUTS)
    frozen = layer._dead_parts()["weight"].expand_as(layer.weight)
    before, other = copy.deepcopy(dict(model.named_parameters())), copy.deepcopy(model)
    optimizer, its = OPTIMIZERS[masked](model.parameters(), freeze=freeze), OPTIMIZERS[plain](other.parameters())
    pk.optim.bind(optimizer, model)
    for _ in range(3):
        x = torch.randn(2, 4, 3, 3)
        for net, opt in ((model, optimizer), (other, its)):
            opt.zero_grad()
            net(x).square().sum().backward()
            opt.step()
    assert frozen.any() and torch.equal(layer.weight[frozen], before["0.weight"][frozen])
    torch.testing.assert_close(layer.weight[~frozen], other[0].weight[~frozen])
    assert torch.equal(layer.bias[~FILTERS], before["0.bias"][~FILTERS])
    torch.testing.assert_close(layer.bias[FILTERS], other[0].bias[FILTERS])
