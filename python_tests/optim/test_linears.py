"""Masked optimizers on linear layers: frozen entries stand still, all others move as under torch's own optimizer."""

import copy

import pytest
import torch

import prunekernels as pk

FILTERS, INPUTS = torch.arange(6) % 2 == 0, torch.arange(5) > 0
KERNELS = torch.arange(30).view(6, 5) % 7 != 3
OPTIMIZERS = {
    "sgd": (lambda p, **freeze: pk.optim.MaskedSGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, **freeze),
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01)),
    "adamw": (lambda p, **freeze: pk.optim.MaskedAdamW(p, lr=0.1, **freeze), lambda p: torch.optim.AdamW(p, lr=0.1)),
}  # fmt: skip


@pytest.mark.parametrize("freeze", ["hard", "dead"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_frozen_entries_stand_still(kind, freeze):
    model = torch.nn.Sequential(torch.nn.Linear(5, 6))
    pk.convert(model, linears=True)
    layer = model[0]
    if freeze == "hard":
        layer.set_masks(hard=FILTERS)
        frozen = ~FILTERS[:, None].expand(6, 5)
    else:
        layer.set_masks(filter=FILTERS, kernel=KERNELS, input=INPUTS)
        frozen = ~(FILTERS[:, None] & KERNELS & INPUTS)
    before, plain = layer.weight.detach().clone(), copy.deepcopy(model)
    masked, torchs = OPTIMIZERS[kind]
    optimizer, other = masked(model.parameters(), freeze=freeze), torchs(plain.parameters())
    pk.optim.bind(optimizer, model)
    for _ in range(3):
        x = torch.randn(4, 5)
        for net, its in ((model, optimizer), (plain, other)):
            its.zero_grad()
            net(x).square().sum().backward()
            its.step()
    assert torch.equal(layer.weight[frozen], before[frozen])
    torch.testing.assert_close(layer.weight[~frozen], plain[0].weight[~frozen])
    assert not torch.equal(layer.weight[~frozen], before[~frozen])
