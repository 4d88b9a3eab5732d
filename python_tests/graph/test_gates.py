"""Products with gates that mix channels, constants of each channel, and splits that are not followed."""

import pytest
import torch
from torch import nn

from cases.compacted import assert_same_training, batches, both_modes
from cases.networks import assert_same_function, mask_at_random
from graph.test_axes import X, gamma, halve, moved, net_of, split
from graph.test_narrower import assert_same
from prunekernels.graph import coupled_groups, tidy_masks
from prunekernels.graph.narrow import LITERALS
from prunekernels.graph.narrower import Narrower
from prunekernels.graph.shrink import shrink
from prunekernels.graph.trace import trace


def eca(net, x):
    """Efficient channel attention: each channel is read by its neighbours."""
    gate = net.mix(x.mean((2, 3)).view(x.shape[0], 1, -1)).sigmoid()
    return x * gate.view(x.shape[0], -1, 1, 1).expand_as(x)


def qkv(net, x):
    """Attention needs all channels of all of its parts."""
    q, k = net.qk(x).flatten(2).reshape(x.shape[0], 2, 2, 4, -1).unbind(1)
    weights = (q.transpose(2, 3) @ k).softmax(-1)
    return (split(x).flatten(3) @ weights).reshape(x.shape)


def split_for_two(net, x):
    """One use of the parts is a shuffle, another is not."""
    parts = split(x)
    return parts.transpose(1, 2).flatten(1, 2) * parts.cumsum(1).flatten(1, 2)


MIX = {"mix": nn.Conv1d(1, 1, 3, padding=1, bias=False)}
VIEWED = {
    "view": lambda g: g.view(1, -1, 1, 1),
    "reshape": lambda g: g.reshape(1, 8, 1, 1),
    "index": lambda g: g[:, None, None],
    "expand": lambda g: g.view(1, 8, 1, 1).expand(1, 8, 8, 8),
    "function": lambda g: (g.exp() + 1).unsqueeze(-1).unsqueeze(-1),
}
# Name: the middle, its layers, the number of filters that the first layer keeps of 8 in module and in graph form.
CASES = {
    "eca": (eca, MIX, 8, 4),
    "gate_of_all": (lambda net, x: x * x.mean(1, keepdim=True).sigmoid(), {}, 8, 4),
    "cumulated": (lambda net, x: x * x.mean((2, 3)).cumsum(1)[..., None, None] - x, {}, 8, 4),
    "added": (lambda net, x: x + x.mean((2, 3), keepdim=True).cumsum(1), {}, 8, 8),
    "alone": (lambda net, x: x * 0 + x.mean((2, 3), keepdim=True).cumsum(1) * x, {}, 8, 4),
    "cat_gate": (lambda net, x: torch.cat([x, x * x.cumsum(1)], 1)[:, :8] * x, {}, 8, 4),
    "literal": (lambda net, x: x * torch.arange(8.0, dtype=x.dtype).view(1, 8, 1, 1) + x, {}, 8, 4),
    "buffer": (lambda net, x: x * net.scale.shift + x * net.scale.gamma, {"scale": gamma(1, 8, 1, 1)}, 4, 4),
    "shared": (lambda net, x: x * net.scale.gamma.view(1, -1, 1, 1) + (x.permute(0, 2, 3, 1) * net.scale.gamma)
               .permute(0, 3, 1, 2), {"scale": gamma(8)}, 4, 4),
    "needed": (lambda net, x: x * net.scale.gamma.view(1, -1, 1, 1) * net.scale.gamma.cumsum(0).sum(),
               {"scale": gamma(8)}, 8, 8),
    "across": (lambda net, x: x * net.scale.gamma.view(1, 1, 1, 8), {"scale": gamma(8)}, 4, 4),
    **{name: (lambda net, x, see=see: x * see(net.scale.gamma), {"scale": gamma(8)},
              8 if name in ("reshape", "expand") else 4, 4)
       for name, see in VIEWED.items()},
    "attention": (qkv, {"qk": nn.Conv2d(8, 16, 1)}, 8, 4),
    "split_for_two": (split_for_two, {}, 8, 4),
    "batch": (lambda net, x: x.view(-1, 4, *x.shape[2:]).tanh().view(x.shape), {}, 8, 4),
    "uneven": (lambda net, x: x.flatten(1).view(x.shape[0], 16, -1).tanh().view(x.shape), {}, 4, 4),
    "cut": (lambda net, x: x.flatten(1).view(x.shape[0], 2, 16, -1).flip(1).view(x.shape), {}, 8, 4),
}  # fmt: skip


def gated(name):
    middle, layers, *kept = CASES[name]
    return net_of(middle, **layers), kept


@pytest.mark.parametrize("form", ["module", "graph"])
@pytest.mark.parametrize("name", CASES)
def test_products_keep_what_they_need(name, form):
    net, (in_module, in_graph) = gated(name)
    halve(net)
    small = shrink(net, X, form=form)
    assert_same_function(net, small, torch.randn(3, 3, 8, 8, dtype=torch.float64))
    assert small.get_submodule("first.0").out_channels == (in_module if form == "module" else in_graph)
    mask_at_random(net, 1)
    assert_same_function(net, shrink(net, X, form=form), torch.randn(3, 3, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize("name", CASES)
def test_products_are_tidied(name):
    net, _ = gated(name)
    mask_at_random(net, 3)
    want = net(X)
    tidy_masks(net, X)
    torch.testing.assert_close(net(X), want)


@pytest.mark.parametrize("literal", LITERALS)
@pytest.mark.parametrize("name", CASES)
def test_compacted_narrower_products(name, literal):
    net, _ = gated(name)
    traced = trace("test", net, X)
    narrower = Narrower.of(traced, net, literal=literal)
    for seed in range(2):
        assert_same(narrower, mask_at_random(net, seed), traced, literal)


@pytest.mark.parametrize("name", ["eca", "literal", "buffer", "shared", "view", "function", "across"])
def test_compacted_products(name):
    net, _ = gated(name)
    rounds = [(lambda net, seed=seed: mask_at_random(net, seed), batches((2, 3, 8, 8))) for seed in (1, 2)]
    assert_same_training(*both_modes(net, lambda net: torch.optim.SGD(net.parameters(), 0.02, momentum=0.9), X, rounds))


# Groups

GROUPS = {
    "convnext": [("first.0", "deep", "second"), ("hidden",)],
    "sum_of_parts": [("first.0",)],
    "shuffle": [("first.0",)],
    "split_attention": [("first.0",), ("wide", "expand"), ("reduce",)],
    "selective_kernels": [("first.0",), ("one", "two", "expand"), ("reduce",)],
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_of_moved_channels(name):
    net, _ = moved(name)
    assert [group.layers for group in coupled_groups(net, X)] == [*GROUPS[name], ("last",)]


def test_parts_that_are_added_are_one_channel():
    net, _ = moved("split_attention")
    wide = next(group for group in coupled_groups(net, X) if "wide" in group.layers)
    assert wide.width == 8
    assert wide.filters["wide"].tolist() == wide.filters["expand"].tolist() == [*range(8), *range(8)]


@pytest.mark.parametrize("name", ["shuffle", "channel_shuffle"])
def test_shuffled_channels_are_single(name):
    """The layer behind reads them in another order; only the module form ties the parts."""
    net, _ = moved(name)
    group, _ = coupled_groups(net, X)
    assert group.width == 8 and group.readers["last"].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    group.set_masks(net, torch.tensor([1, 0, 0, 0, 0, 1, 1, 0], dtype=torch.bool))
    kept = [shrink(net, X, form=form).get_submodule("first.0").out_channels for form in ("module", "graph")]
    assert kept == [6, 3]


def test_parts_for_attention_are_not_tied():
    net, _ = gated("attention")
    widths = {group.layers[0]: group.width for group in coupled_groups(net, X)}
    assert widths["qk"] == 16 and widths["first.0"] == 8


def test_a_viewed_parameter_is_trained_on():
    """Its optimizer state goes along, in the shape that it has in the model."""
    net, _ = gated("view")
    halve(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(X).square().sum().backward()
    optimizer.step()
    small, small_optimizer = shrink(net, X, optimizer=optimizer)
    momentum = optimizer.state[net.scale.gamma]["momentum_buffer"]
    assert small.scale.gamma.shape == (4,)
    assert torch.equal(small_optimizer.state[small.scale.gamma]["momentum_buffer"], momentum[net.first[0].filter_mask])
