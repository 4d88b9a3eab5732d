"""Masked linear layers and norms over channels in live mode, between tensors whose channels are the last dimension."""

import copy

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.live import assert_same_step, in_flow, step
from prunekernels.live import LiveTensor, recording
from prunekernels.live.moved import MovedTensor

WIDTH, HIDDEN = 12, 16


class Block(nn.Module):
    """A depthwise convolution, and two linear layers on channels last, scaled and added: as in ConvNeXt."""

    def __init__(self, act):
        super().__init__()
        self.deep = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.first, self.act, self.second = nn.Linear(WIDTH, HIDDEN), act, nn.Linear(HIDDEN, WIDTH)
        self.scale = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x):
        y = self.act(self.first(self.deep(x).permute(0, 2, 3, 1)))
        return x + (self.second(y) * self.scale).permute(0, 3, 1, 2)


class Tokens(nn.Module):
    """Images as rows of tokens, a product with a gate of their mean, and images again."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.gate = (
            nn.Linear(WIDTH, HIDDEN),
            nn.Linear(HIDDEN, WIDTH),
            nn.Linear(HIDDEN, HIDDEN),
        )

    def forward(self, x):
        tokens = self.first(x.flatten(2).transpose(1, 2))
        tokens = tokens * self.gate(tokens.mean(1, keepdim=True)).sigmoid()
        return self.second(tokens).transpose(1, 2).reshape(x.shape)


def network(*blocks):
    torch.manual_seed(0)
    stem, last = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 5, 1)
    net = nn.Sequential(stem, *blocks, last).double()
    pk.convert(net, linears=True)
    return net


def mask(net, width, hidden):
    """Kills filters of all layers of a width; width, hidden: which are live."""
    for layer in net.modules():
        if isinstance(layer, (pk.MaskedConv2d, pk.MaskedLinear)) and layer.out_channels in (WIDTH, HIDDEN):
            layer.set_masks(filter=(width if layer.out_channels == WIDTH else hidden)(torch.arange(layer.out_channels)))


KEEPS = {
    "some": (lambda c: c % 3 > 0, lambda c: c % 2 > 0), "hidden alone": (lambda c: c >= 0, lambda c: c > 8),
    "all": (lambda c: c >= 0, lambda c: c >= 0), "one": (lambda c: c == 4, lambda c: c == 3),
}  # fmt: skip
NETS = {
    "gelu": lambda: network(Block(nn.GELU()), Block(nn.GELU())),
    "in place": lambda: network(Block(nn.ReLU(inplace=True))),
    "tokens": lambda: network(Tokens(), Block(nn.Hardswish())),
}  # fmt: skip


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("name", NETS)
def test_networks(name, keep, layout):
    net = NETS[name]()
    mask(net, *KEEPS[keep])
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64).contiguous(memory_format=layout)
    want = step(copy.deepcopy(net), x)
    with recording(net) as fallbacks:
        got = step(in_flow(net), x)
    assert not fallbacks
    assert_same_step(got, want)


def test_nothing_live():
    net = NETS["gelu"]()
    mask(net, lambda c: c > 2, lambda c: c < 0)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    want = step(copy.deepcopy(net), x)
    assert_same_step(step(in_flow(net), x), want)


@pytest.mark.parametrize("size", [(4,), (3, 4), (2, 3, 4), (2, 3, 5, 4)])
@pytest.mark.parametrize("flow", [True, False], ids=["live", "masked"])
def test_a_linear_layer_alone(size, flow):
    layer = pk.MaskedLinear(4, 6).double()
    layer.set_masks(filter=torch.arange(6) % 2 > 0)
    x = torch.randn(size, dtype=torch.float64)
    want = layer(x)
    pk.flow(nn.Sequential(layer), flow)
    y = layer(x)
    kind = torch.Tensor if len(size) == 1 or not flow else LiveTensor if len(size) == 2 else MovedTensor
    assert type(y) is kind and torch.allclose(y.to_dense() if kind is not torch.Tensor else y, want)
    with pytest.raises(ValueError, match=r"expected \[\.\.\., 4\]"):
        layer(x[..., :3])


class Permuted(nn.Module):
    def __init__(self, *dims):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return x.permute(self.dims)


@pytest.mark.parametrize("change", ["hook", "channels first", "gate"])
def test_what_needs_full_width_says_so(change):
    moves = [] if change == "channels first" else [Permuted(0, 2, 3, 1)]
    linear = nn.Linear(8, 4)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), *moves, *([nn.Sigmoid()] if change == "gate" else []), linear).double()
    pk.convert(net, linears=True)
    net[0].set_masks(filter=torch.arange(8) % 3 > 0)
    if change == "hook":
        net[-1].register_forward_hook(lambda module, args, result: result * 2)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    want = step(copy.deepcopy(net), x)
    with recording(net) as fallbacks:
        got = step(pk.flow(net), x)
    assert [row["op"].split(" ")[0] for row in fallbacks] == ["linear"]
    assert_same_step(got, want)


def test_flops_count_live_weights():
    net = NETS["gelu"]()
    mask(net, *KEEPS["some"])
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    rows = {row["layer"]: row for row in pk.count_flops(pk.flow(net), x).rows}
    assert rows["1.first"]["live"] == 2 * 30 * 8 * 8 and rows["1.first"]["dense"] == 2 * 30 * WIDTH * HIDDEN


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_autocast(dtype, tolerance):
    net = NETS["gelu"]().float()
    mask(net, *KEEPS["some"])
    x = torch.randn(2, 3, 6, 5)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        want = net(x)
        with recording() as fallbacks:
            got = pk.flow(net)(x)
    assert not fallbacks and got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
