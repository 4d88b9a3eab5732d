"""Group and layer norms in live mode: live tensors in and out, the numbers of masked mode."""

import copy

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.norms import NETWORKS, LayerNorm2d, X, mask, network
from prunekernels.live import LiveTensor, recording

LIVE = torch.tensor([1, 0, 1, 0, 0, 1, 1, 0, 0, 1, 1, 1]).bool()  # groups of 3: 2, 1, 1, 3
EVEN = torch.arange(12) % 3 > 0
NORMS = {
    "group": (lambda: nn.GroupNorm(4, 12), (2, 12, 5, 5)),
    "layer": (lambda: nn.LayerNorm(12), (5, 12)),
    "channels first": (lambda: LayerNorm2d(12), (2, 12, 5, 5)),
}


@pytest.mark.parametrize("align", [None, 4, 16])
@pytest.mark.parametrize("inputs", ["plain", "fewer", "more", "others"])
@pytest.mark.parametrize("live", [LIVE, EVEN], ids=["uneven", "even"])
@pytest.mark.parametrize("name", NORMS)
def test_live_in_and_out(name, live, inputs, align):
    make, shape = NORMS[name]
    norm = make().double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5), norm.bias.uniform_(-0.5, 0.5)
    pk.convert(norm)
    norm.set_mask(live)
    arriving = {"plain": torch.ones(12).bool(), "fewer": LIVE & (torch.arange(12) > 2), "more": LIVE | EVEN}
    given = arriving.get(inputs, ~live)
    conv = pk.MaskedConv2d(12, 12, 1).double()
    conv.set_masks(filter=given)

    def run(norm, conv):
        torch.manual_seed(0)
        x = torch.randn(shape).double().requires_grad_()
        full = x if x.dim() == 4 else x[:, :, None, None]
        z = full if inputs == "plain" else conv(full)
        y = norm(z if x.dim() == 4 else z.flatten(1))
        return x, y

    def grads(x, y, norm):
        y = y.to_dense() if isinstance(y, LiveTensor) else y
        return [y, *torch.autograd.grad(y.square().sum(), [x, norm.weight, norm.bias])]

    want = grads(*run(norm, conv), norm)
    pk.flow(norm, align=align), pk.flow(conv, align=align)
    norm._forward_hooks.clear(), conv._forward_hooks.clear()
    with recording(norm) as fallbacks:
        x, y = run(norm, conv)
    assert not fallbacks
    assert isinstance(y, LiveTensor) == (align != 16)
    for a, b in zip(grads(x, y, norm), want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("how", ["joint", "alone", "norms"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_agree(name, how):
    net = mask(network(name), how)
    live = pk.flow(copy.deepcopy(net))
    with recording(live) as fallbacks:
        got, want = live(X), net(X)
    torch.testing.assert_close(got, want)
    if name not in ("channels last", "masked linears"):
        assert not fallbacks
    got.square().sum().backward(), want.square().sum().backward()
    for (key, p), q in zip(net.named_parameters(), live.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=key)


def test_hooks_see_full_width():
    norm = pk.MaskedGroupNorm(4, 12)
    norm.set_mask(LIVE)
    seen = []
    norm.register_forward_hook(lambda module, args, y: seen.append(type(y)))
    y = pk.flow(nn.Sequential(norm))(torch.randn(2, 12, 3, 3))
    assert seen == [torch.Tensor] and type(y) is torch.Tensor


def test_filled_input_comes_at_full_width():
    """Behind a sigmoid dead channels hold a constant, which counts in the statistics of those that are live here."""
    conv, norm = pk.MaskedConv2d(12, 12, 1), pk.MaskedGroupNorm(4, 12)
    conv.set_masks(filter=LIVE)
    norm.set_mask(EVEN)
    net = nn.Sequential(conv, nn.Sigmoid(), norm)
    x = torch.randn(2, 12, 5, 5)
    want = net(x)
    pk.flow(net)
    with recording(net) as fallbacks:
        torch.testing.assert_close(net(x), want)
    assert [row["op"] for row in fallbacks] == ["group_norm (channels that hold 0.5)"]
