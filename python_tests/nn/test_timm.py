"""timm's own models: their norms, convolutions and paddings convert, and half of the channels leave a quarter."""

import copy

import pytest
import torch
from torch import nn

import prunekernels as pk
from prunekernels.live.fallbacks import recording
from prunekernels.nn.fixed_norm import FixedChannels

timm = pytest.importorskip("timm", reason="timm is not installed")

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
# model, share of multiply-adds that may be left, operations that run at full width in live mode
MODELS = [
    ("regnety_002", 0.29, set()),
    ("tf_efficientnet_b0", 0.29, set()),
    ("tf_mobilenetv3_small_minimal_100", 0.35, set()),
    ("repvgg_a0", 0.26, set()),
    ("cspresnet50", 0.26, set()),
    ("nf_resnet26", 0.27, set()),
    ("resnetv2_50x1_bit", 0.29, set()),
]


def network(name):
    """Untrained, with norms and gains as after training: none is zero."""
    torch.manual_seed(0)
    net = timm.create_model(name, pretrained=False, num_classes=10).eval()
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.uniform_(module.bias, -0.3, 0.3)
        for parameter in (getattr(module, "gain", None), getattr(module, "skipinit_gain", None)):
            if isinstance(parameter, nn.Parameter):
                nn.init.uniform_(parameter, 0.5, 1.0)
    return net


def half(net):
    """Masks over half of the channels of every group of coupled filters."""
    for group in pk.coupled_groups(net, X):
        keep = torch.zeros(group.width, dtype=torch.bool)
        keep[torch.randperm(group.width)[: max(1, group.width // 2)]] = True
        group.set_masks(net, keep)


def total(flops, key):
    return sum(row[key] for row in flops.rows)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "share", "full_width"), MODELS, ids=[name for name, *_ in MODELS])
def test_adapters_of_timm_models(name, share, full_width):
    net = network(name)
    plain = copy.deepcopy(net)
    with torch.no_grad():
        want = net(X)
        report = pk.convert(net)
        assert not report.skipped and torch.equal(net(X), want)
        dense = total(pk.count_flops(net, X), "dense")
        half(net)
        y = net(X)
        with recording(net) as fallbacks:
            live = pk.flow(net)(X)
        pk.flow(net, False)
        torch.testing.assert_close(live, y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))
        assert {row["op"] for row in fallbacks} == full_width
        small = pk.shrink(net, X)
        assert total(pk.count_flops(small, X), "dense") / dense < share
        pk.restore(net, bake=True)
        torch.testing.assert_close(net(X), y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))
    lists = {f"{n}.{k}" for n, m in net.named_modules() if isinstance(m, FixedChannels) for k in ("order", "place")}
    assert set(net.state_dict()) - lists <= set(plain.state_dict())


@pytest.mark.slow
def test_adapters_explain_timm_models_with_padding_by_size():
    net = network("tf_mobilenetv3_small_minimal_100")
    pk.convert(net)
    half(net)
    rows = pk.explain(net, X, backward=False).rows
    assert len(rows) == sum(isinstance(m, nn.Conv2d) for m in net.modules())


@pytest.mark.parametrize("live", ["half", "all"])
def test_adapters_of_timm_norms(live):
    """Group and layer norms of every class that is shipped, as timm has them, in all forms."""
    from timm.layers import GroupNorm, GroupNorm1, GroupNormAct, LayerNorm, LayerNorm2d, LayerNormAct, LayerNormAct2d
    from timm.layers.norm_act import GroupNorm1Act

    torch.manual_seed(0)
    X = torch.randn(2, 16, 5, 5)
    for norm in (
        GroupNorm(16, 4), GroupNorm1(16), GroupNormAct(16, 4, act_layer=nn.SiLU), GroupNorm1Act(16), LayerNorm2d(16),
        LayerNormAct2d(16), LayerNorm(16), LayerNormAct(16),
    ):  # fmt: skip
        x = X if type(norm) not in (LayerNorm, LayerNormAct) else X.permute(0, 2, 3, 1)
        plain = copy.deepcopy(norm)
        assert pk.convert(norm).norms == [""] and torch.equal(norm(x), plain(x))
        keep = torch.arange(16) % 2 == 0 if live == "half" else torch.ones(16, dtype=torch.bool)
        norm.set_mask(keep)
        y = norm(x)
        torch.testing.assert_close(pk.flow(nn.Sequential(copy.deepcopy(norm)))(x), y)
        torch.testing.assert_close(torch.export.export(norm, (x,)).module()(x), y)
        torch.testing.assert_close(pk.shrink(nn.Sequential(norm), x)(x), y)
        pk.restore(norm, bake=True)
        torch.testing.assert_close(norm(x), y)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_adapters_of_timm_layers(training):
    """Every class that is shipped, as timm has it."""
    from timm.layers import BatchNormAct2d, Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame

    torch.manual_seed(0)
    net = nn.Sequential(
        Conv2dSame(3, 8, 3, stride=2), BatchNormAct2d(8, act_layer=nn.SiLU, drop_layer=nn.Identity),
        StdConv2d(8, 8, 3), BatchNormAct2d(8), StdConv2dSame(8, 8, 3, stride=2), ScaledStdConv2d(8, 8, 3), nn.ReLU(),
        ScaledStdConv2dSame(8, 8, 5, stride=2), BatchNormAct2d(8, apply_act=False),
    ).train(training)  # fmt: skip
    plain = copy.deepcopy(net)
    report = pk.convert(net)
    assert len(report.converted) == 5 and len(report.norms) == 3 and not report.skipped
    a, b = net(X), plain(X)
    assert torch.equal(a, b)
    a.sum().backward(), b.sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(net.parameters(), plain.parameters(), strict=True))
    keep = torch.arange(8) % 3 > 0
    for layer in net:
        if isinstance(layer, pk.MaskedConv2d):
            layer.set_masks(filter=keep)
        elif isinstance(layer, pk.MaskedBatchNorm2d):
            layer.set_mask(keep)
    again = copy.deepcopy(net)
    torch.testing.assert_close(pk.flow(net)(X), again(X))


# Channels that move, and the operations that run at full width in live mode
MOVED = [
    ("resnest14d", set()),
    ("skresnet18", set()),
    ("mobileone_s0", set()),
    ("ecaresnet26t", {"conv1d"}),  # it mixes channels, pooled ones
    ("convnext_atto", set()),
    ("edgenext_xx_small", {"normalize", "matmul"}),  # attention between channels
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "full_width"), MOVED, ids=[name for name, _ in MOVED])
def test_channels_that_move_stay_live(name, full_width):
    net, x = network(name), X.double()
    pk.convert(net, linears=True)
    half(net)
    net.double()
    with torch.no_grad():
        want = net(x)
        with recording(net) as fallbacks:
            got = pk.flow(net)(x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))
    assert {row["op"] for row in fallbacks} == full_width
