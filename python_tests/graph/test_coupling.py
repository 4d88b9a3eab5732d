import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.layers import bools
from cases.networks import NETWORKS, Basic, conv_norm, images, trained
from prunekernels.graph import coupled_groups
from prunekernels.graph.shrink import shrink


def layers(groups):
    return [group.layers for group in groups]


EXPECTED = {
    "plain": [("0.0",), ("1.0",), ("3.0",)],
    "basic": [("0.0", "1.second.0"), ("1.first.0",), ("2.first.0",),
              ("2.second.0", "2.shortcut.0", "3.second.0"), ("3.first.0",)],
    "bottleneck": [("0.0",), ("1.body.0.0",), ("1.body.1.0",),
                   ("1.body.2.0", "1.shortcut.0", "2.body.2.0"), ("2.body.0.0",), ("2.body.1.0",)],
    "type_a": [("0.0", "1.second.0", "2.second.0", "3.second.0", "4.second.0"),
               ("1.first.0",), ("2.first.0",), ("3.first.0",), ("4.first.0",)],
    "inverted": [("0.0", "1.project.0"), ("1.expand.0", "1.depthwise.0"),
                 ("2.expand.0", "2.depthwise.0"), ("2.project.0",), ("3.0",)],
    "dense": [("0.0",), ("1.conv",), ("2.conv",), ("3.0",)],
    "excite": [("0.0",), ("1.conv.0", "1.expand", "2.second.0"), ("1.reduce",), ("2.first.0",)],
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_groups(name):
    assert layers(coupled_groups(trained(name), images())) == EXPECTED[name]


@pytest.mark.parametrize("name", ["plain", "type_a"])
def test_unmasked_network_has_the_same_groups(name):
    torch.manual_seed(0)
    net = NETWORKS[name]()
    groups = coupled_groups(net, images().float())
    assert layers(groups) == EXPECTED[name]
    assert type(next(m for m in net.modules() if isinstance(m, nn.Conv2d))) is nn.Conv2d
    want = coupled_groups(trained(name), images())
    assert all(g.readers.keys() == w.readers.keys() for g, w in zip(groups, want, strict=True))


def test_padded_shortcut_puts_narrow_layers_inside():
    group = coupled_groups(trained("type_a"), images())[0]
    assert group.width == 16
    assert group.filters["4.second.0"].tolist() == list(range(16))
    assert group.filters["2.second.0"].tolist() == list(range(4, 12))
    assert group.filters["0.0"].tolist() == group.norms["0.1"].tolist() == list(range(6, 10))
    assert group.readers["4.first.0"].tolist() == list(range(4, 12))
    assert group.readers["5.fc"].tolist() == list(range(16))


def test_readers_of_a_concatenation():
    groups = {group.layers[0]: group for group in coupled_groups(trained("dense"), images())}
    assert groups["1.conv"].readers["2.conv"].tolist() == [-1] * 6 + [0, 1, 2, 3]
    assert groups["1.conv"].norms["2.norm"].tolist() == [-1] * 6 + [0, 1, 2, 3]


def test_flattened_reader_has_blocks_of_columns():
    group = coupled_groups(trained("plain"), images())[2]
    assert group.readers["4.fc"].tolist() == torch.arange(8).repeat_interleave(4).tolist()


@pytest.mark.parametrize("name", EXPECTED)
def test_set_masks_narrows_the_network(name):
    net = trained(name)
    for group in coupled_groups(net, images()):
        keep = torch.arange(group.width) % 2 == 0
        group.set_masks(net, keep)
        assert torch.equal(net.get_submodule(group.layers[0]).filter_mask, keep[group.filters[group.layers[0]]])
    small = shrink(net, images(), form="graph")
    for module_name, module in small.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.out_channels == int(net.get_submodule(module_name).filter_mask.sum())


def test_set_masks_revives_but_not_the_hard_dead():
    net = nn.Sequential(conv_norm(3, 4), nn.Conv2d(4, 2, 1))
    pk.convert(net)
    group = coupled_groups(net, torch.randn(2, 3, 6, 6))[0]
    net[0][0].set_masks(hard=bools(1, 1, 1, 0))
    group.set_masks(net, bools(0, 1, 1, 1))
    assert torch.equal(net[0][0].filter_mask, bools(0, 1, 1, 0))
    group.set_masks(net, bools(1, 1, 1, 1))
    assert torch.equal(net[0][0].filter_mask, bools(1, 1, 1, 0)) and net[1].input_mask.all()


@pytest.mark.parametrize("keep", [torch.ones(5, dtype=torch.bool), torch.ones(4)], ids=["width", "dtype"])
def test_set_masks_checks(keep):
    net = conv_norm(3, 4)
    group = coupled_groups(net, torch.randn(2, 3, 6, 6))[0]
    with pytest.raises(ValueError, match=r"Group.set_masks: keep: expected torch.bool \[4\], got"):
        group.set_masks(net, keep)


def test_combine_sums_over_layers():
    group = coupled_groups(trained("type_a"), images())[0]
    scores = {name: torch.ones(channels.numel()) for name, channels in group.filters.items()}
    assert group.combine(scores).tolist() == [1] * 4 + [3] * 2 + [5] * 4 + [3] * 2 + [1] * 4


class Odd(nn.Module):
    """A plain norm, a sigmoid and a layer used twice between the filters and their readers."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.c, self.d = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.b(F.relu(self.norm(self.a(x))))
        return self.d(torch.sigmoid(self.c(F.relu(self.c(x)))))


def test_inputs_that_are_not_zero_are_not_masked():
    net = Odd()
    pk.convert(net, norms=False)
    groups = coupled_groups(net, torch.randn(2, 3, 4, 4))
    assert layers(groups) == [("a",), ("b", "c"), ("d",)]  # c reads b's channels and its own
    assert not groups[0].readers and list(groups[1].readers) == ["c"]


def test_model_stays_as_it_is():
    net = trained("basic").train()
    before = copy.deepcopy(net.state_dict())
    coupled_groups(net, images())
    assert net.training and all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_single_block_with_an_image_as_its_stream():
    """The network's input is added to the filters' outputs; the joint channels are numbered by the filters."""
    net = Basic(3, 3)
    groups = coupled_groups(net, torch.randn(2, 3, 8, 8))
    assert layers(groups) == [("first.0",), ("second.0",)]
    pk.convert(net)
    groups[1].set_masks(net, bools(1, 0, 1))
    assert not net.second[0].filter_mask[1]
    assert shrink(net, torch.randn(2, 3, 8, 8)).second.get_submodule("0").out_channels == 3
