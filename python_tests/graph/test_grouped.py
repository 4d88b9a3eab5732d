"""Small networks keep channels inside the groups of grouped convolutions, as many in every group."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.grouped import GROUPED, MASKS, grouped_network, mask_groups
from cases.networks import assert_same_function, images
from graph.test_narrower import assert_same
from prunekernels.graph.narrower import Narrower, read_masks
from prunekernels.graph.shrink import shrink
from prunekernels.graph.trace import trace
from prunekernels.inspect.flops import count_flops
from prunekernels.methods.costs import Costs

X = images()


def joint(net, group_keeps):
    """Masks conv 0, the grouped conv behind it and the norms: filters of each group that stay, a list each."""
    for layer, keep in zip(net, group_keeps, strict=True):
        keep = torch.tensor(keep).bool()
        layer[0].set_masks(filter=keep)
        layer[1].set_mask(keep)
    return net


def chain():
    """3 -> 12, in 3 groups to 6, to 4."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 6, 3, padding=1, groups=3), nn.Conv2d(6, 4, 1)]
    net = nn.Sequential(*(nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU()) for layer in layers))
    pk.convert(net.double().eval())
    return net


CASES = {  # filters of the first layer and of the grouped one: sizes of the small grouped layer (in, out, groups)
    "halves": ([1, 1, 0, 0, 0, 1, 1, 0, 1, 0, 0, 1], [1, 0, 0, 1, 1, 0], (6, 3, 3)),
    "unequal inputs": ([1, 1, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0], [1, 0, 0, 1, 1, 0], (9, 3, 3)),
    "unequal filters": ([1, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0], (3, 6, 3)),
    "one group dead": ([0, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0], (4, 2, 2)),
    "filters of one group dead": ([1, 1, 1, 1, 0, 1, 1, 0, 1, 0, 0, 1], [0, 0, 0, 1, 1, 0], (4, 2, 2)),
    "one group live": ([0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0], (2, 1, 1)),
    "all live": ([1] * 12, [1] * 6, (12, 6, 3)),
}


@pytest.mark.parametrize("form", ["module", "graph"])
@pytest.mark.parametrize("name", CASES)
def test_sizes_of_the_small_layer(name, form):
    first, second, sizes = CASES[name]
    net = joint(chain(), (first, second, [1, 1, 1, 0]))
    small = shrink(net, X, form=form)
    layer = small.get_submodule("1.0")
    assert (layer.in_channels, layer.out_channels, layer.groups) == sizes
    assert layer.weight.shape == (sizes[1], sizes[0] // sizes[2], 3, 3)
    assert small.get_submodule("0.0").out_channels == sizes[0]
    assert_same_function(net, small, X)
    assert count_flops(small, X).dense <= count_flops(net, X).dense * (1 if name == "all live" else 0.8)


@pytest.mark.parametrize("args", [{"form": "module"}, {"form": "graph"}, {"fold_constants": True}], ids=str)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", GROUPED)
def test_networks_shrink(name, kind, args):
    for seed in range(2):
        net = mask_groups(grouped_network(name), kind, seed)
        assert_same_function(net, shrink(net, X, **args), X)


@pytest.mark.parametrize("literal", [0, 2])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", GROUPED)
def test_compacted_narrower_equals_a_new_analysis(name, kind, literal):
    net = grouped_network(name)
    traced = trace("test", net, X)
    narrower = Narrower.of(traced, net, literal=literal)
    everything = assert_same(narrower, net, traced, literal)
    kept = [assert_same(narrower, mask_groups(net, kind, seed), traced, literal) for seed in range(3)]
    assert min(kept) < everything or kind not in ("equal", "one group dead")


@pytest.mark.parametrize("form", ["module", "graph"])
def test_optimizer_state_goes_along(form):
    first, second, _ = CASES["unequal inputs"]
    net = joint(chain(), (first, second, [1, 1, 1, 0])).train()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    pk.optim.bind(optimizer, net)
    net(X).square().mean().backward()
    optimizer.step()
    net.eval()
    small, its = shrink(net, X, form=form, optimizer=optimizer)
    layer, whole = small.get_submodule("1.0"), net[1][0]
    moment, want = its.state[layer.weight]["exp_avg"], optimizer.state[whole.weight]["exp_avg"]
    for g, (row, columns) in enumerate([(0, [0, 1, 2]), (3, [0, 1, 2]), (4, [0, 1, 2])]):
        assert torch.equal(moment[g], want[row, columns]) and torch.equal(layer.weight[g], whole.weight[row, columns])


@pytest.mark.parametrize("align", [2, 4, 8])
def test_aligned_widths_stay_equal_in_all_groups(align):
    for name in GROUPED:
        net = mask_groups(grouped_network(name), "unequal", 1)
        narrower = Narrower.of(trace("test", net, X), net)
        narrow, wide = (narrower.narrow(read_masks(net), align=a) for a in (1, align))
        for layer, module in net.named_modules():
            if isinstance(module, pk.MaskedConv2d) and 1 < module.groups < module.in_channels:
                rows, columns = (wide.indices[f"{layer}.weight"][dim] for dim in (0, 1))
                groups, most = wide.numbers[layer, "groups"], module.out_channels // module.groups
                assert len(rows) % groups == 0 and len(columns) == groups
                assert len(rows) >= len(narrow.indices[f"{layer}.weight"][0])
                possible = [n * groups for n in range(len(rows) // groups, most + 1) if n * groups % align == 0]
                assert len(rows) in possible or not possible


def test_aligned_widths_leave_dead_groups_out():
    net = joint(chain(), ([0] * 4 + [1, 0, 0, 0] * 2, [0, 0, 1, 0, 0, 1], [1] * 4))
    narrowing = Narrower.of(trace("test", net, X), net).narrow(read_masks(net), align=4)
    assert narrowing.numbers["1.0", "groups"] == 2 and len(narrowing.indices["1.0.weight"][0]) == 4
    assert narrowing.indices["1.0.weight"][1].tolist() == [[4, 5], [8, 9]]


class Functional(nn.Module):
    """A grouped convolution without a layer that could have another number of groups."""

    def __init__(self):
        super().__init__()
        self.first, self.weight = pk.MaskedConv2d(3, 8, 1), nn.Parameter(torch.randn(8, 4, 1, 1))
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.last(F.conv2d(self.first(x), self.weight, groups=2))


def test_functional_convolution_keeps_its_groups():
    torch.manual_seed(0)
    net = Functional().double()
    net.first.set_masks(filter=torch.tensor([1, 0, 1, 0, 0, 0, 1, 1]).bool())
    small = shrink(net, X, form="module")
    assert small.weight.shape == (8, 4, 1, 1)
    assert_same_function(net, small, X)
    small = shrink(net, X, form="graph")
    assert small.first.out_channels == 4
    assert_same_function(net, small, X)


def test_one_weight_with_and_without_groups():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.weight = pk.MaskedConv2d(3, 8, 1), nn.Parameter(torch.randn(8, 4, 1, 1))

        def forward(self, x):
            y = self.first(x)
            return F.conv2d(y, self.weight, groups=2) + F.conv2d(y[:, :4], self.weight)

    net = Net().double()
    net.first.set_masks(filter=torch.tensor([1, 0, 1, 0, 0, 0, 1, 1]).bool())
    for form in ("module", "graph"):
        assert_same_function(net, shrink(net, X, form=form), X)


def few_groups():
    """3 -> 12, in 2 groups to 8, to 4."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    net = nn.Sequential(*layers).double().eval()
    pk.convert(net)
    return net


def test_joint_channels_of_few_groups_are_inside_them():
    net = few_groups()
    groups = pk.coupled_groups(net, X)
    assert [(group.layers, group.width) for group in groups] == [(("0",), 6), (("2",), 4), (("4",), 4)]
    groups[0].set_masks(net, torch.tensor([1, 0, 1, 1, 0, 0]).bool())
    groups[1].set_masks(net, torch.tensor([0, 0, 1, 0]).bool())
    assert net[0].filter_mask.tolist() == net[2].input_mask.tolist() == [True, False, True, True, False, False] * 2
    small = shrink(net, X)
    assert (small[2].in_channels, small[2].out_channels, small[2].groups) == (6, 2, 2)
    assert_same_function(net, small, X)


@pytest.mark.parametrize("make", [few_groups, chain])
def test_costs_are_those_of_the_small_network(make):
    net = make()
    groups = [group for group in pk.coupled_groups(net, X) if not group.is_output]
    keeps = [torch.arange(group.width) % 3 != 1 for group in groups]
    saved = Costs(net, groups, groups, X).saved(~torch.cat(keeps).numpy())
    for group, keep in zip(groups, keeps, strict=True):
        group.set_masks(net, keep)
    assert count_flops(net, X).dense - saved == count_flops(shrink(net, X), X).dense


def test_joint_channels_are_whole_groups():
    group, last = pk.coupled_groups(chain(), X)
    assert group.layers == ("0.0", "1.0") and group.width == 3 and last.layers == ("2.0",)
    net = chain()
    group.set_masks(net, torch.tensor([True, False, True]))
    small = shrink(copy.deepcopy(net), X)
    assert (small[1][0].in_channels, small[1][0].out_channels, small[1][0].groups) == (8, 4, 2)
