"""The networks of the benchmark, and their masks."""

from __future__ import annotations

import pytest
import torch

import prunekernels as pk
from cases.benchmark_networks import make_setting
from networks.models import MASKS, NETWORKS, apply, draw, wires
from prunekernels.train.models import scaled


@pytest.mark.parametrize("name", NETWORKS)
def test_multiply_adds_that_share_out_the_time(name):
    n = NETWORKS[name]
    found = pk.count_flops(n.build(), torch.randn(1, 3, n.image, n.image)).dense / 1e6
    assert n.mmacs == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_convolution_is_wired_once(name):
    with torch.device("meta"):
        model = NETWORKS[name].build()
    convs = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}
    found = wires(model)
    assert sorted(w.conv for w in found) == sorted(convs)
    assert [w.filters for w in found] == [convs[w.conv].out_channels for w in found]
    sizes = {w.group: w.filters for w in found}
    assert all(sizes[w.reads] == convs[w.conv].in_channels for w in found if w.reads)
    assert [w.conv for w in found if w.reads is None] == [found[0].conv]


def test_which_networks_have_joins():
    assert {name for name, n in NETWORKS.items() if not n.has_joins()} == {"vgg16", "tiny_vgg"}


def test_groups_of_a_residual_network():
    groups = {w.conv: w.group for w in make_setting().wires}
    stage2 = [groups[f"stage2.{b}.body.conv2"] for b in range(3)]
    assert len({*stage2}) == 1 and stage2[0] != groups["stem.conv"] == groups["stage1.2.body.conv2"]
    assert groups["stage2.0.body.conv1"] == "stage2.0.body.conv1"


@pytest.mark.parametrize("name", ["tiny_resnet", "tiny_vgg", "resnet18", "mobilenet_v2"])
def test_joint_masks_are_those_of_the_groups_that_the_package_finds(name):
    n = NETWORKS[name]
    mine, theirs = n.build(), n.build()
    found = wires(mine)
    live = draw(found, "joint", 0.5, 0)
    pk.convert(mine)
    pk.convert(theirs)
    apply(mine, found, live, "cpu")
    for group in pk.coupled_groups(theirs, torch.randn(1, 3, n.image, n.image)):
        widest = next(conv for conv in group.layers if len(live.filters[conv]) == group.width)
        group.set_masks(theirs, live.filters[widest])
    expected = dict(theirs.named_buffers())
    for buffer, mask in mine.named_buffers():
        assert not buffer.endswith("_mask") or mask.equal(expected[buffer]), buffer


@pytest.mark.parametrize("kept", [0.95, 0.7, 0.3, 0.01])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("name", ["tiny_resnet", "tiny_vgg", "resnet50", "mobilenet_v2"])
def test_counts_are_those_of_the_narrow_network(name, masks, kept):
    with torch.device("meta"):
        found = wires(NETWORKS[name].build())
        narrow = NETWORKS[name].build(kept)
    live = draw(found, masks, kept, 0)
    for w in found:
        assert live.filters[w.conv].sum() == scaled(w.filters, kept) == narrow.get_submodule(w.conv).out_channels
        if w.reads and masks == "joint" and not w.depthwise:
            assert live.inputs[w.conv].sum() == narrow.get_submodule(w.conv).in_channels
    assert masks != "joint" or live.features.sum() == narrow.classifier.in_features


def test_joint_masks_agree_where_filters_meet_and_independent_ones_do_not():
    found = make_setting().wires
    stage = [w.conv for w in found if w.group == "stem.conv"]
    joint, independent = (draw(found, masks, 0.5, 0) for masks in MASKS)
    assert all(torch.equal(joint.filters[c], joint.filters[stage[0]]) for c in stage)
    assert not all(torch.equal(independent.filters[c], independent.filters[stage[0]]) for c in stage)
    # A block's input is the union of all that was added up before it.
    assert independent.inputs["stage1.1.body.conv1"].equal(
        independent.filters["stem.conv"] | independent.filters["stage1.0.body.conv2"]
    )
    shortcut = joint.filters["stage2.0.body.conv2"][:16]
    assert shortcut.equal(joint.filters["stem.conv"])  # a shortcut without parameters brings these


@pytest.mark.parametrize("masks", MASKS)
def test_depthwise_filters_are_live_where_their_channels_are(masks):
    with torch.device("meta"):
        found = wires(NETWORKS["mobilenet_v2"].build())
    live = draw(found, masks, 0.5, 0)
    depthwise = [w for w in found if w.depthwise]
    assert len(depthwise) == 17
    assert all(live.filters[w.conv].equal(live.inputs[w.conv]) for w in depthwise)


def test_masks_follow_the_seed():
    found = make_setting().wires
    a, b, c = (draw(found, "joint", 0.5, seed).filters["stem.conv"] for seed in (1, 1, 2))
    assert a.equal(b) and not a.equal(c)
