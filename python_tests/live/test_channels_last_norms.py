"""MaskedLayerNorm in live mode, between tensors whose channels are the last dimension."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.live import assert_same_step, in_flow, step
from prunekernels.live import LiveTensor, recording, wrap_last
from prunekernels.live.moved import MovedTensor

WIDTH = 12


class Last(nn.Module):
    """Norms of pixels and of tokens, as ConvNeXt, EdgeNeXt and Swin have them."""

    def __init__(self, affine=True):
        super().__init__()
        self.deep = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.norm, self.tokens = (nn.LayerNorm(WIDTH, elementwise_affine=affine) for _ in range(2))

    def forward(self, x):
        y = F.gelu(self.norm(self.deep(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        z = self.tokens(x.flatten(2).transpose(1, 2)).tanh().transpose(1, 2).reshape(x.shape)
        return x + y * z


def network(affine=True):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), Last(affine), Last(), nn.Conv2d(WIDTH, 5, 1)).double()
    pk.convert(net)
    for norm in (m for m in net.modules() if isinstance(m, nn.LayerNorm) and m.weight is not None):
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return net


KEEPS = {"some": lambda c: c % 3 > 0, "all": lambda c: c >= 0, "one": lambda c: c == 4, "most": lambda c: c > 0}


def mask(net, filters, channels):
    for layer in net.modules():
        if isinstance(layer, pk.MaskedConv2d) and layer.out_channels == WIDTH:
            layer.set_masks(filter=filters(torch.arange(WIDTH)))
        elif isinstance(layer, pk.MaskedLayerNorm):
            layer.set_mask(channels(torch.arange(WIDTH)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("channels", KEEPS)
@pytest.mark.parametrize("filters", KEEPS)
def test_networks(filters, channels, affine, layout):
    net = network(affine)
    mask(net, KEEPS[filters], KEEPS[channels])
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64).contiguous(memory_format=layout)
    want = step(copy.deepcopy(net), x)
    with recording(net) as fallbacks:
        got = step(in_flow(net), x)
    assert not [row for row in fallbacks if row["module"].endswith(("norm", "tokens"))]
    assert_same_step(got, want)


@pytest.mark.parametrize("size", [(4,), (3, 4), (2, 3, 4), (2, 3, 5, 4)])
@pytest.mark.parametrize("flow", [True, False], ids=["live", "masked"])
def test_a_norm_alone(size, flow):
    norm = pk.MaskedLayerNorm(4).double()
    norm.set_mask(torch.arange(4) % 2 > 0)
    x = torch.randn(size, dtype=torch.float64)
    want = norm(x)
    pk.flow(nn.Sequential(norm), flow)
    y = norm(x)
    kind = torch.Tensor if len(size) == 1 or not flow else LiveTensor if len(size) == 2 else MovedTensor
    assert type(y) is kind and torch.allclose(y.to_dense() if kind is not torch.Tensor else y, want)
    if len(size) > 1:
        arrives = wrap_last(x[..., :2] * 1, pk.live.LiveList.of_mask(torch.tensor([True, True, False, False])))
        y = norm(arrives)
        assert torch.allclose(y.to_dense() if isinstance(y, LiveTensor) else y, norm(arrives.to_dense()), atol=1e-12)
    with pytest.raises(ValueError, match="expected 4 channels"):
        norm(x[..., :3])


@pytest.mark.parametrize("change", ["hook", "other dimension", "gate"])
def test_what_needs_full_width_says_so(change):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.LayerNorm(8)

        def forward(self, x):
            y = self.conv(x)
            y = torch.sigmoid(y) if change == "gate" else y
            return self.norm(y if change == "other dimension" else y.permute(0, 2, 3, 1))

    net = Net().double()
    pk.convert(net)
    net.conv.set_masks(filter=torch.arange(8) % 3 > 0)
    net.norm.set_mask(torch.arange(8) % 2 > 0)
    if change == "hook":
        net.norm.register_forward_hook(lambda module, args, result: result * 2)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    want = step(copy.deepcopy(net), x)
    with recording(net) as fallbacks:
        got = step(pk.flow(net), x)
    assert [row["op"].split(" ")[0] for row in fallbacks] == ([] if change == "hook" else ["layer_norm"])
    assert_same_step(got, want)


def test_a_plain_norm_needs_all_channels():
    """Its statistics are of all channels, and its bias goes to dead ones."""
    net = network()
    mask(net, KEEPS["some"], KEEPS["some"])
    plain = nn.LayerNorm(WIDTH).double()
    net[1].norm = plain
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    want = step(copy.deepcopy(net), x)
    with recording(net) as fallbacks:
        got = step(in_flow(net), x)
    assert [row["op"] for row in fallbacks] == ["layer_norm"]
    assert_same_step(got, want)
