"""Small networks with transposed convolutions and linear layers leave home: saved, loaded, with a model card."""

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.decoders import UNet

X = torch.randn(2, 3, 8, 8)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.hidden, self.last = UNet(out=6), nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x):
        return self.last(self.hidden(self.net(x).mean((2, 3))).relu())


@pytest.mark.parametrize("form", ["module", "graph"])
def test_saved_and_loaded(tmp_path, form):
    torch.manual_seed(0)
    net = Classifier()
    pk.convert(net, linears=True)
    for group in pk.coupled_groups(net, X):
        if not group.is_output:
            group.set_masks(net, torch.arange(group.width) % 2 == 0)
    net.eval()
    small = pk.shrink(net, X, form=form)
    pk.save_small(small, tmp_path, X, model=net)
    again = pk.load_small(tmp_path)
    torch.testing.assert_close(again(X), net(X))
    card = (tmp_path / "README.md").read_text()
    assert "| `net.up1` | 4 | 8 | 4 |" in card and "| `hidden` | 5 | 10 | 5 |" in card
