"""The module form: the user's own class and forward, with small layers inside."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import prunekernels as pk
from cases.layers import bools
from cases.networks import NETWORKS, Basic, Head, assert_same_function, conv_norm, images, mask_at_random, trained
from prunekernels.graph import coupled_groups
from prunekernels.graph.shrink import shrink

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
KEEP = bools(1, 0, 1, 1)


class Net(nn.Module):
    """conv_norm(3, 8), the given middle, and a convolution that reads its outputs."""

    def __init__(self, middle, width=8, **layers):
        super().__init__()
        self.first, self.middle, self.last = conv_norm(3, 8), middle, nn.Conv2d(width, 2, 3, padding=1)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.last(self.middle(self, self.first(x)))


def masked(net, first=(1, 0, 1, 1, 0, 1, 0, 0)):
    """All convolutions masked; the first one with the given mask, its norm as well."""
    pk.convert(net.double().eval())
    net.first[0].set_masks(filter=bools(*first))
    net.first[1].set_mask(bools(*first))
    return net


def line_of(capsys):
    return capsys.readouterr().out.strip()


@pytest.mark.parametrize("name", NETWORKS)
def test_class_names_and_modes_stay(name):
    net = mask_at_random(trained(name), 1).train()
    frozen = next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)) if name != "biases" else net[1]
    frozen.eval()
    small = shrink(net, images(), form="module")
    assert type(small) is type(net)
    pairs = list(zip(net.named_modules(), small.named_modules(), strict=True))
    assert all(a == b for (a, _), (b, _) in pairs)
    assert all(a.training == b.training for (_, a), (_, b) in pairs) and not frozen.training
    assert not any(isinstance(m, (pk.MaskedConv2d, pk.MaskedBatchNorm2d)) for m in small.modules())
    assert small.state_dict().keys() == {k for k in net.state_dict() if "mask" not in k}


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_know_their_sizes(name):
    small = shrink(mask_at_random(trained(name), 1, norms=1), images(), form="module")
    for module in small.modules():
        if isinstance(module, nn.Conv2d):
            per_group = module.in_channels // module.groups
            assert module.weight.shape[:2] == (module.out_channels, per_group)
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.num_features == module.weight.numel() == module.running_mean.numel()


def test_prelu_and_parameters_of_the_user():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.rand(1, 8, 1, 1) + 1)
            self.register_buffer("shift", torch.rand(8, 1, 1))

        def forward(self, x):
            return x * self.gamma + self.shift * x

    net = masked(Net(lambda net, x: net.prelu(net.scale(x)), prelu=nn.PReLU(8), scale=Scale()))
    small = shrink(net, X, form="module")
    assert small.scale.gamma.shape == (1, 4, 1, 1) and small.scale.shift.shape == (4, 1, 1)
    assert small.prelu.weight.shape == (4,) and small.prelu.num_parameters == 4
    assert isinstance(small.scale.gamma, nn.Parameter) and "shift" in dict(small.scale.named_buffers())
    assert_same_function(net, small, X)


def test_depthwise_and_grouped_layers():
    middle = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, groups=8), nn.Conv2d(16, 8, 1, groups=4))
    net = masked(Net(lambda net, x: net.body(x), body=middle), first=(1, 0, 1, 1, 0, 0, 0, 0))
    net.body[1].set_masks(filter=bools(1, 1, 1, 1, 0, 0, 0, 0))
    small = shrink(net, X, form="module")
    assert_same_function(net, small, X)
    assert (small.body[0].groups, small.body[1].groups) == (4, 2)  # two filters of the first feed each group
    assert small.body[1].weight.shape == (4, 4, 1, 1)


def test_tied_weights_stay_tied():
    net = Net(lambda net, x: net.b(F.relu(net.a(x))), a=nn.Conv2d(8, 8, 1), b=nn.Conv2d(8, 8, 1))
    net.b.weight = net.a.weight
    masked(net)
    for layer in (net.a, net.b):
        layer.set_masks(filter=net.first[0].filter_mask)
    small = shrink(net, X, form="module")
    assert small.a.weight is small.b.weight and small.a.weight.shape == (4, 4, 1, 1)
    assert_same_function(net, small, X)


# Sizes that a forward computes


SHARES = {
    "chunk": lambda net, x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "halves": lambda net, x: torch.cat([x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2]], 1),
    "split": lambda net, x: torch.cat(x.split(x.shape[1] // 2, 1)[::-1], 1),
    "sizes": lambda net, x: torch.cat(x.split([x.shape[1] // 2] * 2, 1)[::-1], 1),
    "added": lambda net, x: torch.cat([x.chunk(2, 1)[0] + x.chunk(2, 1)[1], x.chunk(2, 1)[0]], 1),
}


@pytest.mark.parametrize("name", SHARES)
def test_shares_stay_equal(name):
    """Three of the first half live and one of the second: the second keeps two more, which are zeros."""
    net = masked(Net(SHARES[name]), first=(1, 1, 1, 0, 0, 1, 0, 0))
    small = shrink(net, X, form="module")
    assert small.first[0].out_channels == 6
    assert_same_function(net, small, X)


CONSTANTS = {
    "split": lambda net, x: torch.cat(x.split((4, 4), 1)[::-1], 1),
    "uneven": lambda net, x: torch.cat(x.split((2, 6), 1)[::-1], 1),
    "slice": lambda net, x: torch.cat([x[:, 4:], x[:, :4]], 1),
    "stride": lambda net, x: torch.cat([x[:, ::2], x[:, 1::2]], 1),
    "view": lambda net, x: x.flatten(2).view(-1, 8, *x.shape[2:]),
    "expand": lambda net, x: x * x.mean((2, 3), keepdim=True).expand(-1, 8, -1, -1),
    "shuffle": lambda net, x: x.view(x.shape[0], 2, 4, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
    "literal": lambda net, x: x * torch.arange(8.0, dtype=x.dtype).view(1, 8, 1, 1),
    "made": lambda net, x: x + torch.zeros(x.shape[0], 8, *x.shape[2:], dtype=x.dtype),
    "flip": lambda net, x: x.flip(1),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_numbers_in_the_forward_keep_the_width(name):
    net = masked(Net(CONSTANTS[name]))
    small = shrink(net, X, form="module")
    assert small.first[0].out_channels == 8
    assert_same_function(net, small, X)


class Counting(nn.Module):
    """Numbers of channels that are attributes of the module follow the masks."""

    def __init__(self, how):
        super().__init__()
        self.first, self.last, self.steps, self.how = conv_norm(3, 8), nn.Conv2d(12, 2, 1), 2, how
        setattr(self, "half" if how == "split" else "extra", 4)

    def forward(self, x):
        x = self.first(x)
        if self.how == "split":
            a, b = x.split((self.half, self.half), 1)
            return self.last(torch.cat([b, a, a], 1))
        return self.last(F.pad(x, (0, 0, 0, 0, 0, self.extra)))


@pytest.mark.parametrize(("how", "attribute", "kept"), [("split", "half", 3), ("pad", "extra", 0)])
def test_numbers_of_the_module(how, attribute, kept):
    net = masked(Counting(how), first=(1, 1, 1, 0, 0, 1, 0, 0))
    small = shrink(net, X, form="module")
    assert getattr(small, attribute) == kept and small.steps == 2 and getattr(net, attribute) == 4
    assert small.first[0].out_channels == (6 if how == "split" else 4)
    assert_same_function(net, small, X)


def test_squeeze_of_a_single_channel():
    net = masked(Net(lambda net, x: x * x.mean((2, 3), keepdim=True).squeeze()[..., None, None]), first=(1,) + (0,) * 7)
    small = shrink(net, X, form="module")
    assert_same_function(net, small, X)


def test_number_of_channels_as_a_number(capsys):
    """Here no set of kept channels gives the right number: the graph form serves."""
    net = masked(Net(lambda net, x: x / x.shape[1]))
    small = shrink(net, X)
    assert isinstance(small, torch.fx.GraphModule)
    assert line_of(capsys).startswith(
        "shrink: graph form (module form: its forward gives other outputs on small layers"
    )
    assert_same_function(net, small, X)
    with pytest.raises(
        RuntimeError, match="form: expected a network that the module form serves, but its forward gives"
    ):
        shrink(net, X, form="module")


def test_mistakes_that_zeros_hide_are_found(capsys):
    """The branch is multiplied by zero today, but it may train: the sizes must be right there too."""
    net = Net(lambda net, x: x + net.norm(x / x.shape[1]), norm=nn.BatchNorm2d(8))
    nn.init.zeros_(net.norm.weight)
    masked(net)
    net.norm.set_mask(net.first[0].filter_mask)
    assert isinstance(shrink(net, X), torch.fx.GraphModule)
    assert "other outputs" in line_of(capsys)


def test_heads_that_only_train(capsys):
    """A layer that the eval forward does not run keeps its width: if it then does not fit, the graph form serves."""

    class Aux(Net):
        def forward(self, x):
            x = self.first(x)
            return (self.last(x), self.aux(x)) if self.training else self.last(x)

    net = masked(Aux(None, aux=nn.Conv2d(8, 2, 1)))
    assert isinstance(shrink(net, X), torch.fx.GraphModule)
    assert "fails on small layers when it trains" in line_of(capsys)
    net.first[0].set_masks(filter="all")
    net.first[1].set_mask("all")
    assert type(shrink(net, X)) is Aux


# What users do with their network


def test_keyword_arguments_outputs_and_hooks():
    class Forward(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.block, self.head = conv_norm(3, 8), Basic(8, 8), Head(8)

        def forward(self, x, features=False):
            y = self.block(self.first(x))
            return {"out": self.head(y), "features": y} if features else self.head(y)

    net, seen = masked(Forward()), []
    net.block.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    for group in coupled_groups(net, X):
        group.set_masks(net, torch.arange(group.width) % 2 == 0)
    small = shrink(net, X)
    seen.clear()
    out = small(X, features=True)
    assert seen == [4] and out.keys() == {"out", "features"}
    torch.testing.assert_close(out["out"], net(X))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    def middle(net, x):
        return checkpoint(net.block, x, use_reentrant=reentrant) if net.training else net.block(x)

    net = masked(Net(middle, block=conv_norm(8, 8)))
    small = shrink(net, X).train()
    assert type(small) is Net
    small(X).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_training_draws_as_before():
    """Dropout and batch statistics: a step of the small network in training mode equals the masked network's."""
    net = masked(Net(lambda net, x: net.drop(x), drop=nn.Dropout(0.5))).train()
    small = shrink(net, X)
    assert small.drop.training
    net.drop.p = small.drop.p = 0.0
    torch.testing.assert_close(small(X), net(X))
    live = net.first[0].filter_mask
    torch.testing.assert_close(small.first[1].running_mean, net.first[1].running_mean[live])


def test_saved_and_copied():
    net = mask_at_random(trained("basic"), 1)
    small = shrink(net, images())
    buffer = io.BytesIO()
    torch.save(small, buffer)
    assert b"prunekernels" not in buffer.getvalue()
    buffer.seek(0)
    for other in (torch.load(buffer, weights_only=False), copy.deepcopy(small)):
        assert torch.equal(other(X), small(X))
    other = copy.deepcopy(small)
    nn.init.zeros_(other[0][0].weight)
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(X), small(X))


def test_optimizer_state_of_the_users_parameters():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.rand(8, 1, 1))

        def forward(self, x):
            return x * self.gamma

    net = masked(Net(lambda net, x: net.scale(x), scale=Scale()))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(X).square().sum().backward()
    optimizer.step()
    small, small_optimizer = shrink(net, X, optimizer=optimizer)
    live = net.first[0].filter_mask
    momentum = optimizer.state[net.scale.gamma]["momentum_buffer"]
    assert torch.equal(small_optimizer.state[small.scale.gamma]["momentum_buffer"], momentum[live])


# Masks decide


def untrained():
    net = nn.Sequential(conv_norm(3, 4), Basic(4, 4), Head(4)).double().eval()
    nn.init.zeros_(net[1].second[1].weight)  # as timm and torchvision initialise residual branches
    return net


@pytest.mark.parametrize("form", ["module", "graph"])
@pytest.mark.parametrize("convert", [False, True])
def test_without_masks_nothing_goes(form, convert):
    net = untrained()
    if convert:
        pk.convert(net)
    small = shrink(net, X, form=form)
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in net.parameters())
    for want, got in zip(net.parameters(), small.parameters(), strict=True):
        assert torch.equal(want, got)


def test_values_decide_on_request():
    net = untrained()
    small = shrink(net, X, fold_constants=True)
    assert [name for name, m in small.named_modules() if isinstance(m, nn.Conv2d)] == ["0.0"]
    assert_same_function(net, small, X)


@pytest.mark.parametrize("form", ["module", "graph"])
def test_constants_behind_plain_norms_are_kept(form):
    net = nn.Sequential(conv_norm(3, 4), nn.Conv2d(4, 2, 1)).double().eval()
    pk.convert(net, norms=False)
    net[0][0].set_masks(filter=KEEP)
    nn.init.ones_(net[0][1].bias)
    small = shrink(net, X, form=form)
    assert small.get_submodule("0.0").out_channels == 4
    assert_same_function(net, small, X)


def test_forms_are_checked():
    net = trained("basic")
    with pytest.raises(ValueError, match="shrink: form: expected 'auto', 'module' or 'graph', got 'small'"):
        shrink(net, images(), form="small")
    with pytest.raises(ValueError, match="shrink: form: expected 'graph' or 'auto' with fold_constants=True, got 'mod"):
        shrink(net, images(), form="module", fold_constants=True)
