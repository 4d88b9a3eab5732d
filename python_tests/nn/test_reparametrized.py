"""Layers whose weight torch.nn.utils computes: right numbers, or an error that says what to do."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, remove_weight_norm, spectral_norm, weight_norm

import prunekernels as pk
from cases.conv import assert_zero
from prunekernels.nn.reparametrized import deep_copy


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return weight_norm(layer)


WAYS = {
    "weight_norm": old_weight_norm,
    "spectral_norm": spectral_norm,
    "parametrized_weight_norm": parametrizations.weight_norm,
    "parametrized_spectral_norm": parametrizations.spectral_norm,
}
ways = pytest.mark.parametrize("way", WAYS)
KEEP, LAST = torch.arange(8) % 3 != 1, torch.arange(6) > 1
X = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(0))


def make(way=None):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1)
    ).eval()
    for i in (0, 3) if way else ():
        WAYS[way](net[i])
    net(X)
    return net


def mask(net):
    net[0].set_masks(filter=KEEP)
    net[1].set_mask(KEEP)
    net[3].set_masks(filter=LAST, input=KEEP)
    return net


def masked(way):
    net = make(way)
    pk.convert(net)
    return mask(net)


def expected(net, x):
    """The network with its computed weights stored, then masked."""
    plain = make()
    with torch.no_grad():
        for i in (0, 3):
            plain[i].weight.copy_(net[i].weight), plain[i].bias.copy_(net[i].bias)
    pk.convert(plain)
    return mask(plain)(x)


@ways
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_numbers_with_the_norm_before_and_after_convert(way, before):
    if before:
        net = masked(way)
    else:
        net = make()
        pk.convert(net)
        mask(net)
        for i in (0, 3):
            WAYS[way](net[i])
    assert all(isinstance(net[i], pk.MaskedConv2d) for i in (0, 3))
    net(X)  # the older forms compute the weight in a hook
    want = expected(net, X)
    torch.testing.assert_close(net(X), want)
    torch.testing.assert_close(pk.flow(net)(X), want)
    pk.flow(net, False)
    assert_zero(net[0](X)[:, ~KEEP])


@ways
def test_convert_changes_no_state_and_training_goes_on_as_it_did(way):
    """spectral_norm takes a step of its own each time that the weight is read in training."""
    net = make(way).train()
    plain = deep_copy(net)
    pk.convert(net)
    for name, value in plain.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name
    a, b = net(X), plain(X)
    assert torch.equal(a, b)
    for mode in (False, True):
        mask(net)
        pk.flow(net, mode)(X), plain(X)
    for name, value in plain.state_dict().items():
        if name.endswith(("_u", "_v")):
            assert torch.equal(net.state_dict()[name], value), name
    a, b = net(X).square().sum(), plain(X).square().sum()
    a.backward(), b.backward()
    assert all(p.grad is not None for p in net.parameters())


@ways
def test_graph_tools_and_shrink(way):
    net = masked(way)
    want = net(X).detach()
    small = pk.shrink(net, X)
    torch.testing.assert_close(small(X), want)
    assert [(m.in_channels, m.out_channels) for m in small.modules() if isinstance(m, nn.Conv2d)] == [
        (3, 5),
        (5, 4),
        (4, 2),
    ]
    groups = pk.coupled_groups(net, X)
    assert [group.layers for group in groups] == [("0",), ("3",), ("5",)]
    assert groups[1].readers.keys() == {"5"}
    tidied = pk.tidy_masks(net, X)
    assert tidied.inputs == {"5": [0, 1]}
    torch.testing.assert_close(net(X), want)
    rows = pk.count_flops(net, X).rows
    assert rows[0]["live"] * 8 == rows[0]["dense"] * 5
    assert len(pk.explain(net, X).rows) == 3
    assert len(pk.coupled_groups(make(way), X)) == 3


@ways
def test_shrink_refuses_an_optimizer_over_what_the_weight_is_made_of(way):
    net = masked(way)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match="shrink: optimizer: expected weights that are parameters, got computed ones in 0, 3"
    ):
        pk.shrink(net, X, optimizer=optimizer)


@ways
def test_restore_raises_before_anything_changes_or_bakes(way):
    net = masked(way)
    want, types = net(X).detach(), [type(m) for m in net.modules()]
    with pytest.raises(ValueError, match=r"restore: 0: expected masks .* got dead parts .*restore\(model, bake=True\)"):
        pk.restore(net)
    assert [type(m) for m in net.modules()] == types and torch.equal(net(X), want)
    report = pk.restore(net, bake=True)
    assert report.converted == ["0", "3", "5"]
    assert all(type(net[i]) is nn.Conv2d and isinstance(net[i].weight, nn.Parameter) for i in (0, 3))
    assert set(net.state_dict()) == set(make().state_dict())
    torch.testing.assert_close(net(X), want)
    assert_zero(net[0].weight[~KEEP])


@ways
def test_restore_of_what_is_all_live_keeps_the_norm(way):
    net = make(way)
    state, want = net.state_dict(), net(X).detach()
    pk.convert(net)
    assert pk.restore(net).converted == ["0", "3", "5"]
    assert set(net.state_dict()) == set(state) and isinstance(net[0], nn.Conv2d)
    assert not isinstance(net[0], pk.MaskedConv2d)
    torch.testing.assert_close(net(X), want)
    if way.startswith("parametrized"):
        parametrize.remove_parametrizations(net[0], "weight")
        assert type(net[0]) is nn.Conv2d
    elif way == "weight_norm":
        remove_weight_norm(net[0])
    torch.testing.assert_close(net(X), want)


@ways
def test_taking_the_norm_off_a_masked_layer_leaves_a_masked_layer(way):
    net = masked(way)
    want = net(X).detach()
    if way.startswith("parametrized"):
        parametrize.remove_parametrizations(net[0], "weight")
    elif way == "weight_norm":
        remove_weight_norm(net[0])
    else:
        torch.nn.utils.remove_spectral_norm(net[0])
    assert type(net[0]) is pk.MaskedConv2d
    torch.testing.assert_close(net(X), want)


@ways
def test_to_conv_bakes_and_zero_dead_refuses(way):
    net = masked(way)
    want = net[0](X)
    conv = net[0].to_conv()
    assert type(conv) is nn.Conv2d
    torch.testing.assert_close(conv(X), want)
    with pytest.raises(ValueError, match=r"zero_dead: weight: expected a parameter, got one that is computed"):
        net[0].zero_dead()


@ways
def test_bind_and_weight_decay_do_not_break(way):
    net = masked(way).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    pk.optim.bind(optimizer, net, freeze="dead")
    net(X).square().mean().backward()
    optimizer.step()
    assert_zero(net.eval()[0](X)[:, ~KEEP])


@ways
def test_methods_refuse_weights_that_are_computed(way):
    net = masked(way)
    with pytest.raises(
        ValueError,
        match="SFP: model: expected weights that are parameters, others in skip, got one that is computed, .* in 0",
    ):
        pk.methods.SFP(net, torch.optim.SGD(net.parameters(), lr=0.1), 0.5)


def test_other_modules_with_norms_shrink_too():
    net = make()
    net.append(nn.Flatten()), net.append(parametrizations.weight_norm(nn.Linear(50, 3)))
    net.eval()
    pk.convert(net)
    mask(net)
    small = pk.shrink(net, X)
    torch.testing.assert_close(small(X), net(X))


def test_a_weight_that_an_unknown_hook_computes_is_named():
    conv = nn.Conv2d(3, 4, 1)
    raw = conv.weight
    del conv._parameters["weight"]
    conv.register_parameter("raw", raw)
    conv.register_forward_pre_hook(lambda m, x: setattr(m, "weight", m.raw * 2))
    net = nn.Sequential(conv)
    want = net(X)
    pk.convert(net)
    conv.set_masks(filter=torch.arange(4) > 0)
    torch.testing.assert_close(net(X)[:, 1:], want[:, 1:])
    with pytest.raises(
        ValueError, match="shrink: 0: expected a weight and a bias that are parameters, or that torch.nn"
    ):
        pk.shrink(net, X)


class OwnForward(pk.MaskedConv2d):
    def forward(self, x):
        return super().forward(x) * 2


class OwnNorm(pk.MaskedBatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class OnlyInit(pk.MaskedConv2d):
    def __init__(self, C, K):
        super().__init__(C, K, 1)


class PlainTwice(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class KnowsItsPlainClass(pk.MaskedConv2d):
    plain_class = PlainTwice

    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize("layer", [OwnForward(3, 4, 1), OwnNorm(3)], ids=lambda m: type(m).__name__)
def test_subclasses_of_masked_layers_with_a_forward_of_their_own_are_named(layer):
    net = nn.Sequential(layer).eval()
    want = net(X)
    for op, run in (("restore", lambda: pk.restore(net)), ("shrink", lambda: pk.shrink(net, X))):
        message = (
            rf"{op}: 0: expected a layer whose plain class is known, got {type(layer).__name__}, a subclass of Masked"
        )
        with pytest.raises(ValueError, match=message):
            run()
    assert type(net[0]) is type(layer) and torch.equal(net(X), want)


def test_subclasses_of_masked_layers_that_can_go_back():
    net = nn.Sequential(OnlyInit(3, 8), KnowsItsPlainClass(8, 6, 1)).eval()
    net[0].set_masks(filter=KEEP)
    net[1].set_masks(filter=LAST)
    want = net(X)
    torch.testing.assert_close(pk.shrink(net, X)(X), want)
    torch.testing.assert_close(nn.Sequential(net[0].to_conv(), copy.deepcopy(net[1]))(X), want)
    pk.restore(net)
    assert type(net[0]) is nn.Conv2d and type(net[1]) is PlainTwice
    torch.testing.assert_close(net(X), want)


def norm_without_bias(C):
    norm = nn.BatchNorm2d(C)
    norm.register_parameter("bias", None)
    nn.init.uniform_(norm.weight, 0.5, 1), nn.init.uniform_(norm.running_mean, 0.5, 1)
    return norm


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_norms_without_bias(training):
    net = nn.Sequential(nn.Conv2d(3, 8, 1), norm_without_bias(8), nn.ReLU(), nn.Conv2d(8, 2, 1)).train(training)
    plain = copy.deepcopy(net)
    pk.convert(net)
    assert torch.equal(net(X), plain(X))
    net[0].set_masks(filter=KEEP)
    net[1].set_mask(KEEP)
    with torch.no_grad():
        plain[1].weight.mul_(KEEP)
    a, b = net(X), plain(X)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(pk.flow(copy.deepcopy(net))(X), a)
    ours, theirs = (torch.autograd.grad(y.square().sum(), net[1].weight) for y, net in ((a, net), (b, plain)))
    torch.testing.assert_close(ours[0][KEEP], theirs[0][KEEP])
    net.eval()
    want = net(X)
    assert [g.norms.keys() for g in pk.coupled_groups(net, X)][0] == {"1"}
    small = pk.shrink(net, X)
    torch.testing.assert_close(small(X), want)
    assert getattr(small, "1").bias is None and getattr(small, "1").num_features == 5
    assert net[1].to_norm().bias is None
    pk.restore(net)
    torch.testing.assert_close(net(X), want)


def test_norms_without_bias_and_nothing_live():
    norm = norm_without_bias(3)
    pk.convert(norm)
    norm.set_mask(torch.zeros(3, dtype=torch.bool))
    y = norm(X)
    assert_zero(y)
    y.sum().backward()
    assert_zero(norm.weight.grad)


@pytest.mark.parametrize("way", ["spectral_norm", "parametrized_weight_norm"])
def test_compile_of_computed_weights(way):
    torch._dynamo.reset()  # its limit on recompilations counts what other tests compiled
    net = masked(way)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), net(X))
    net[3].set_masks(filter=~LAST)
    torch.testing.assert_close(compiled(X), net(X))
