"""explain and time_modes on networks with masked linear layers and transposed convolutions."""

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.decoders import Adding

X = torch.randn(2, 3, 8, 8)


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.hidden, self.last = Adding(), nn.Linear(4, 16), nn.Linear(16, 2)

    def forward(self, x):
        return self.last(self.hidden(self.net(x).mean((2, 3))).relu())


@pytest.mark.parametrize("live", [False, True])
def test_rows(live):
    net = Pooled()
    pk.convert(net, linears=True)
    for group in pk.coupled_groups(net, X):
        if not group.is_output:
            group.set_masks(net, torch.arange(group.width) % 2 == 0)
    found = pk.explain(pk.flow(net) if live else net, X, modes=["compacted"])
    rows = {row["layer"]: row for row in found.rows}
    assert set(rows) == {"net.low", "net.high", "net.up", "net.last", "hidden", "last"}
    assert not found.fallbacks and all(row["untimed"] is None and row["ms"] > 0 for row in found.rows)
    for name in ("net.up", "hidden"):
        row = rows[name]
        assert row["mode"] == ("live" if live else "masked") and row["compacted_filters"] == row["live_filters"]
        assert row["live_filters"] == row["filters"] // 2 and row["live_inputs"] == row["inputs"] // 2
        assert row["live_kernels"] == row["kernels"] // 4
    assert "net.up" in str(found)
