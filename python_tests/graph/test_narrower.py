"""Narrower against the slow way: an analysis of the traced network anew, with the weights that its masks leave."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.networks import NETWORKS, images, mask_at_random, trained
from graph.test_shrink_fuzz import build
from prunekernels.graph.analysis import ChannelAnalysis
from prunekernels.graph.compile_channels import FORMS
from prunekernels.graph.layer_uses import any_weights
from prunekernels.graph.narrow import LITERALS, Narrowing, kept_in_forward
from prunekernels.graph.narrower import Narrower, read_masks
from prunekernels.graph.rules.base import UNKNOWN, SizeRule
from prunekernels.graph.rules.layers import LayerRule
from prunekernels.graph.rules.table import RULES
from prunekernels.graph.trace import trace
from prunekernels.train import models


def slowly(net, traced, literal=False, stays=()):
    """The narrowing by a new analysis."""
    analysis = ChannelAnalysis(traced, any_weights(net, traced), constants=False, statistics=True)
    for node, rule in analysis.rules.items():
        if isinstance(rule, LayerRule) and analysis.states[node] is not None and rule.name(traced, node) in stays:
            for end in rule.ends(analysis, node):
                analysis.classes.pin(end.ids)
    return Narrowing.of(analysis, kept_in_forward(analysis, literal=literal))


def assert_equal(got, want):
    assert got.numbers == want.numbers
    assert {n: set(by) for n, by in got.indices.items()} == {n: set(by) for n, by in want.indices.items()}
    for name, by_dim in want.indices.items():
        for dim, rows in by_dim.items():
            assert torch.equal(got.indices[name][dim], rows), (name, dim)


def assert_same(narrower, net, traced, literal=False, stays=()):
    """Also returns how many entries are kept, so that a test can tell that something was."""
    want = slowly(net, traced, literal, stays)
    assert_equal(narrower.narrow(read_masks(net), stays), want)
    return sum(rows.numel() for by_dim in want.indices.values() for rows in by_dim.values())


@pytest.mark.parametrize("literal", LITERALS)
@pytest.mark.parametrize("name", NETWORKS)
def test_compacted_narrower_equals_a_new_analysis(name, literal):
    net = trained(name)
    traced = trace("test", net, images())
    narrower = Narrower.of(traced, net, literal=literal)
    everything = assert_same(narrower, net, traced, literal)
    kept = [assert_same(narrower, mask_at_random(net, seed), traced, literal) for seed in range(6)]
    assert min(kept) < everything or name == "halves"  # where norms, masked apart from filters, keep all statistics


def test_compacted_narrower_equals_a_new_trace():
    net = trained("type_a")
    narrower = Narrower.of(trace("test", net, images()), net)
    mask_at_random(net, 3)
    assert_same(narrower, net, trace("test", net, images()))


@pytest.mark.parametrize("literal", LITERALS)
def test_compacted_narrower_random_networks(fuzz_seed, literal):
    net, x = build(fuzz_seed)
    traced = trace("test", net, x)
    narrower = Narrower.of(traced, net, literal=literal)
    for seed in range(4):
        assert_same(narrower, mask_at_random(net, fuzz_seed + 100 * seed), traced, literal)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "biases"])  # a linear layer fixes its size
def test_compacted_narrower_is_the_same_at_all_sizes(name):
    net = trained(name)
    shapes = ((2, 3, 8, 8), (1, 3, 9, 13), (5, 3, 32, 20))
    narrowers = [Narrower.of(trace("test", net, torch.randn(shape).double()), net) for shape in shapes]
    for seed in range(3):
        masks = read_masks(mask_at_random(net, seed))
        want = narrowers[0].narrow(masks)
        assert any(len(rows) < 4 for by_dim in want.indices.values() for rows in by_dim.values())
        for other in narrowers[1:]:
            assert_equal(other.narrow(masks), want)


# Blocks that other libraries have


class Gated(nn.Module):
    """Squeeze-and-excite, depthwise, layer scale, a shuffle of groups, GroupNorm, parts side by side and a PReLU."""

    def __init__(self, kind):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.wide, self.deep = nn.Conv2d(8, 16, 1, groups=2), nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.norm = {"group": nn.GroupNorm(4, 16), "instance": nn.InstanceNorm2d(16, affine=True)}.get(kind)
        self.norm = self.norm or nn.BatchNorm2d(16, affine=kind != "bare", track_running_stats=kind != "batch")
        self.reduce, self.expand, self.slope = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1), nn.PReLU(16)
        self.gamma, self.register = nn.Parameter(torch.ones(16, 1, 1)), torch.linspace(-1, 1, 16).view(16, 1, 1)
        self.last, self.head, self.kind = nn.Conv2d(16, 8, 1), nn.Linear(8, 5), kind

    def gate(self, x):
        y = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return {"hard": F.hardsigmoid, "relu6": lambda x: F.relu6(x + 3) / 6}.get(self.kind, torch.sigmoid)(y)

    def forward(self, x):
        x = self.stem(x)
        y = self.wide(x)
        if self.kind == "shuffle":
            y = y.view(y.shape[0], 2, 8, *y.shape[2:]).transpose(1, 2).reshape(y.shape)
        y = self.slope(self.norm(self.deep(y)))
        y = y * self.gate(y)
        y = y * (self.register if self.kind == "literal" else self.gamma)
        if self.kind == "constant":
            y = (y + 1).relu() - 1 + torch.ones_like(y) * 2 + (y - 3).relu()
        y = self.last(y)
        a, b = y.chunk(2, 1)
        y = torch.cat([b, a], 1) + x if self.kind == "shuffle" else torch.maximum(y, x)
        return self.head(y.mean((2, 3)))


KINDS = ("plain", "group", "instance", "batch", "bare", "hard", "relu6", "shuffle", "literal", "constant")


@pytest.mark.parametrize("kind", KINDS)
def test_compacted_narrower_blocks(kind):
    net = Gated(kind).eval()
    pk.convert(net)
    traced = trace("test", net, torch.randn(2, 3, 8, 8))
    narrower = Narrower.of(traced, net)
    for seed in range(2 if kind == "bare" else 8):
        mask_at_random(net, seed)
        if kind == "bare":  # the mask of a norm without weight is in the weights of a trace of its own
            traced = trace("test", net, torch.randn(2, 3, 8, 8))
            want = slowly(net, traced)
            for name in ("norm.weight", "norm.bias"):
                want.indices.pop(name, None)
            assert_equal(narrower.narrow(read_masks(net)), want)
        else:
            assert_same(narrower, net, traced)


@pytest.mark.parametrize("kept", [0.0, 0.02])
def test_compacted_narrower_almost_all_dead(kept):
    net = trained("halves")
    traced = trace("test", net, images())
    narrower = Narrower.of(traced, net)
    for seed in range(3):
        mask_at_random(net, seed, kept=kept, kernels=0)
        assert assert_same(narrower, net, traced) > 0


def test_compacted_narrower_a_constant_output_is_computed():
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, bias=False), nn.Sigmoid()).eval()
    pk.convert(net)
    net[1].set_masks(filter=torch.arange(8) < 3)
    traced = trace("test", net, torch.randn(2, 3, 4, 4))
    assert_same(Narrower.of(traced, net), net, traced)


@pytest.mark.parametrize("form", ["module", "graph"])
def test_compacted_zeros_before_alpha_dropout_stay(form):
    """It gives them another value in training."""
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.SELU(), nn.AlphaDropout(0.5), nn.Conv2d(8, 4, 1)).double().eval()
    pk.convert(net)
    net[0].set_masks(filter=torch.arange(8) < 3)
    x = torch.randn(2, 3, 4, 4).double()
    traced = trace("test", net, x)
    narrower = Narrower.of(traced, net)
    assert_same(narrower, net, traced)
    assert len(narrower.narrow(read_masks(net)).indices["3.weight"][1]) == 8
    outputs = []
    for network in (net, pk.shrink(net, x, form=form)):
        torch.manual_seed(0)
        outputs.append(network.train()(x))
    torch.testing.assert_close(outputs[1], outputs[0])


def test_compacted_narrower_stays():
    net = mask_at_random(trained("basic"), 0, norms=1)
    traced = trace("test", net, images())
    name = "1.first.0"
    fixed, free = Narrower.of(traced, net, stays=[name]), Narrower.of(traced, net)
    assert len(free.narrow(read_masks(net)).indices[f"{name}.weight"][0]) < 8
    assert len(fixed.narrow(read_masks(net)).indices[f"{name}.weight"][0]) == 8
    assert_equal(fixed.narrow(read_masks(net)), slowly(net, traced, stays=[name]))
    assert_same(free, net, traced, stays=[name])


class Shared(nn.Module):
    def __init__(self, sharing):
        super().__init__()
        self.first, self.one, self.two = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1, bias=False)
        if sharing == "module":
            self.two = self.one
        else:
            self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(self.one(self.first(x)).relu())


@pytest.mark.parametrize("sharing", ["module", "weight"])
def test_compacted_narrower_shared_layers(sharing):
    net = Shared(sharing).eval()
    pk.convert(net)
    traced = trace("test", net, torch.randn(2, 3, 4, 4))
    narrower = Narrower.of(traced, net)
    for seed in range(4):
        keep = torch.rand(6, generator=torch.Generator().manual_seed(seed)) < 0.6
        for layer in (net.first, net.one, net.two):
            layer.set_masks(filter=keep)
        assert_same(narrower, net, traced)
    assert_same(narrower, net, traced, stays=["one"])
    if sharing == "weight":
        net.two.set_masks(filter=~keep)
        with pytest.raises(ValueError, match="one and two: expected the same masks on layers that share parameters"):
            narrower.narrow(read_masks(net))


# What makes it fast


REFERENCE = ("resnet20", "resnet18", "resnet50", "vgg16_bn", "mobilenet_v2", "densenet40")


@pytest.mark.parametrize("name", REFERENCE)
def test_compacted_narrower_reference_networks(name):
    """A step for each layer, and one for each add: operators that pass channels on have none."""
    net = models.build(name, width=0.25).eval()
    pk.convert(net)
    traced = trace("test", net, torch.randn(2, 3, 32, 32))
    narrower = Narrower.of(traced, net)
    layers = sum(isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Linear)) for m in net.modules())
    adds = sum(str(node.target).startswith("aten.add") for node in traced.graph.nodes)
    assert len(narrower.program.steps) == layers + adds
    for seed in range(2):
        assert_same(narrower, mask_at_random(net, seed), traced)


def test_compacted_narrower_has_a_form_of_every_rule():
    rules = [rule for rule in RULES.values() if not isinstance(rule, SizeRule) or rule.needs_state]
    assert rules and UNKNOWN not in rules
    for rule in rules:
        assert any(isinstance(rule, kind) for kind in FORMS), rule


def test_compacted_narrower_holds_no_traced_network():
    net = trained("basic")
    traced = trace("test", net, images())
    narrower = Narrower.of(traced, net)
    ends = [weakref.ref(traced), *(weakref.ref(p) for p in traced.model.parameters())]
    del traced
    gc.collect()
    assert all(end() is None for end in ends)
    assert narrower.narrow(read_masks(net)).indices


def test_compacted_masks_are_read_without_kernels_where_rows_and_columns_say_all():
    layer = pk.MaskedConv2d(4, 6, 3, groups=2)
    layer.set_masks(hard=torch.arange(6) > 0, input=torch.arange(4) > 0)
    layer.filter_mask[1::2] = False
    masks = read_masks(nn.Sequential(layer))["0"]
    assert masks.rows.tolist() == [False, False, True, False, True, False]
    assert masks.columns.tolist() == [False, True, True, True] and masks.kernels is None
    layer.set_masks(kernel=torch.arange(6)[:, None] + torch.arange(2) != 3)
    assert read_masks(nn.Sequential(layer))["0"].kernels.tolist() == layer.kernel_mask.tolist()
    layer.kernel_mask.fill_(True)  # in place
    layer.kernel_mask[0, 0] = False  # of a dead filter
    assert read_masks(nn.Sequential(layer))["0"].kernels is None
