"""convert of layers that torch.nn.utils.prune pruned: their masks become masks, and the numbers stay."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import prunekernels as pk
from cases.conv import assert_zero
from cases.subclasses import BatchNormAct2d, StdConv2d

X = torch.randn(2, 8, 7, 7, generator=torch.Generator().manual_seed(0))


def bools(*values):
    return torch.tensor(values, dtype=torch.bool)


def conv(bias=False, groups=1, cls=nn.Conv2d, **args):
    torch.manual_seed(0)
    return cls(8, 6 if groups == 1 else 8, 3, padding=1, bias=bias, groups=groups, **args)


def converted(layer):
    """The report of the layer, after checks of what holds for every one."""
    want = layer(X)
    originals = {name: p for name, p in layer.named_parameters()}
    report = pk.convert(nn.Sequential(layer))
    assert report.converted + report.norms == ["0"] and isinstance(layer, (pk.MaskedConv2d, pk.MaskedBatchNorm2d))
    torch.testing.assert_close(layer(X), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pk.flow(copy.deepcopy(layer))(X), want, rtol=1e-5, atol=1e-6)
    for name in ("weight", "bias"):
        original = originals.get(f"{name}_orig", originals.get(name))
        assert layer._parameters[name] is original
    assert not layer._forward_pre_hooks and not any(
        "_orig" in key or "weight_mask" in key for key in layer.state_dict()
    )
    return report


def test_prune_import_of_filters():
    layer = conv()
    prune.ln_structured(layer, "weight", 2, n=2, dim=0)
    dead = ~layer.weight_mask.flatten(1).any(1)
    report = converted(layer)
    assert int(dead.sum()) == 2 and torch.equal(layer.filter_mask, ~dead)
    assert layer.kernel_mask.all() and layer.input_mask.all() and layer.hard_mask.all()
    assert report.pruned == {"0": "dead: 2 filters"} and "pruned by torch: 0: dead: 2 filters" in str(report)


def test_prune_import_of_input_channels():
    layer = conv()
    prune.random_structured(layer, "weight", 3, dim=1)
    dead = ~layer.weight_mask.any(0).flatten(1).any(1)
    report = converted(layer)
    assert int(dead.sum()) == 3 and torch.equal(layer.input_mask, ~dead)
    assert layer.filter_mask.all() and layer.kernel_mask.all()
    assert report.pruned == {"0": "dead: 3 input channels"}


def test_prune_import_of_kernels():
    layer = conv()
    kernels = torch.arange(48).view(6, 8) % 5 > 1
    prune.custom_from_mask(layer, "weight", kernels.view(6, 8, 1, 1).expand(6, 8, 3, 3).float())
    report = converted(layer)
    assert torch.equal(layer.kernel_mask, kernels) and layer.filter_mask.all() and layer.input_mask.all()
    assert report.pruned == {"0": f"dead: {int((~kernels).sum())} kernels"}


def test_prune_import_of_all_three_after_iterative_pruning():
    layer = conv()
    prune.ln_structured(layer, "weight", 2, n=1, dim=0)
    prune.random_structured(layer, "weight", 2, dim=1)
    assert isinstance(next(iter(layer._forward_pre_hooks.values())), prune.PruningContainer)
    kernels = torch.ones(6, 8, dtype=torch.bool)
    live = layer.weight_mask.flatten(2).any(2)
    row, column = torch.nonzero(live)[0].tolist()
    kernels[row, column] = False
    prune.custom_from_mask(layer, "weight", kernels.view(6, 8, 1, 1).expand(6, 8, 3, 3).float())
    report = converted(layer)
    assert torch.equal(layer.filter_mask, live.any(1)) and torch.equal(layer.input_mask, live.any(0))
    assert torch.equal(layer.kernel_mask, kernels)  # those of dead filters and inputs come back with them
    assert report.pruned == {"0": "dead: 2 filters, 2 input channels, 1 kernels"}


def test_prune_import_computes_less():
    layer = conv()
    prune.ln_structured(layer, "weight", 3, n=2, dim=0)
    converted(layer)
    assert layer.density == 0.5


def test_prune_import_of_unstructured_parts_as_zeros():
    layer = conv()
    prune.l1_unstructured(layer, "weight", 0.5)
    mask = layer.weight_mask.bool()
    report = converted(layer)
    inside = int((~mask & mask.flatten(2).any(2)[:, :, None, None]).sum())
    assert report.pruned["0"].endswith(f"{inside} entries that no mask can drop stay as zeros, and train")
    assert_zero(layer.weight[~mask])


def test_prune_import_of_a_filter_that_keeps_its_bias():
    """torch's filter without weights gives its bias, a dead filter gives zero: its kernels die instead."""
    layer = conv(bias=True)
    nn.init.uniform_(layer.bias, 1, 2)
    prune.ln_structured(layer, "weight", 2, n=2, dim=0)
    dead = ~layer.weight_mask.flatten(1).any(1)
    report = converted(layer)
    assert layer.filter_mask.all() and torch.equal(layer.kernel_mask, (~dead)[:, None].expand(6, 8))
    assert report.pruned == {"0": "dead: 16 kernels"}


def test_prune_import_of_bias_masks_that_agree_and_that_do_not():
    layer = conv(bias=True)
    nn.init.uniform_(layer.bias, 1, 2)
    weight = bools(1, 0, 0, 1, 1, 1).view(6, 1, 1, 1).expand(6, 8, 3, 3)
    prune.custom_from_mask(layer, "weight", weight)
    prune.custom_from_mask(layer, "bias", bools(1, 0, 1, 0, 1, 1))
    report = converted(layer)
    assert torch.equal(layer.filter_mask, bools(1, 0, 1, 1, 1, 1))
    assert layer.bias[3] == 0 and torch.equal(layer.kernel_mask[2], torch.zeros(8, dtype=torch.bool))
    assert report.pruned == {
        "0": "dead: 1 filters, 8 kernels; 1 entries that no mask can drop stay as zeros, and train"
    }


@pytest.mark.parametrize("groups", [2, 8])
def test_prune_import_of_grouped_convolutions(groups):
    layer = conv(groups=groups)
    kernels = torch.ones(8, 8 // groups, dtype=torch.bool)
    kernels[0] = False  # a filter
    kernels[8 - 8 // groups :, 0] = False  # input channel of the last group
    prune.custom_from_mask(layer, "weight", kernels.view(8, -1, 1, 1).expand(8, 8 // groups, 3, 3))
    report = converted(layer)
    if groups == 8:  # a filter reads one channel alone: what reads nothing is a dead filter
        assert torch.equal(layer.filter_mask, kernels[:, 0]) and layer.input_mask.all()
        assert report.pruned == {"0": "dead: 2 filters"}
    else:
        assert torch.equal(layer.filter_mask, torch.arange(8) > 0)
        assert torch.equal(layer.input_mask, torch.arange(8) != 4) and layer.kernel_mask.all()


def test_prune_import_of_everything_dead():
    layer = conv()
    prune.custom_from_mask(layer, "weight", torch.zeros(6, 8, 3, 3))
    converted(layer)
    assert not layer.filter_mask.any() and layer.input_mask.all() and layer.kernel_mask.all()


def test_prune_import_of_a_global_method_over_a_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False)).eval()
    prune.global_unstructured([(net[0], "weight"), (net[3], "weight")], prune.L1Unstructured, amount=0.5)
    prune.random_structured(net[3], "weight", 1, dim=0)
    want = net(X)
    report = pk.convert(net)
    torch.testing.assert_close(net(X), want)
    assert set(report.pruned) == {"0", "3"} and int((~net[3].filter_mask).sum()) >= 1
    small = pk.shrink(net, X)
    torch.testing.assert_close(small(X), want)
    pk.restore(net)
    torch.testing.assert_close(net(X), want)
    assert set(net.state_dict()) == {"0.weight", "0.bias", "3.weight", *(f"1.{n}" for n in net[1].state_dict())}


def test_prune_import_keeps_optimizers_going():
    """The state of the optimizer belongs to weight_orig, which is weight afterwards; dead rows get no gradient."""
    layer, twin = conv(bias=True), conv(bias=True)  # twin goes on with torch's masks
    for model in (layer, twin):
        prune.custom_from_mask(model, "weight", bools(1, 0, 1, 1, 1, 1).view(6, 1, 1, 1).expand(6, 8, 3, 3))
        prune.custom_from_mask(model, "bias", bools(1, 0, 1, 1, 1, 1))
    optimizer, other = (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (layer, twin))
    for step in range(3):
        for model, its in ((layer, optimizer), (twin, other)):
            its.zero_grad()
            model(X).square().mean().backward()
            its.step()
        if step == 0:
            pk.convert(layer)
    assert [n for n, _ in layer.named_parameters()] == ["weight", "bias"]
    prune.remove(twin, "weight"), prune.remove(twin, "bias")
    torch.testing.assert_close(layer.weight[layer.filter_mask], twin.weight[layer.filter_mask])
    torch.testing.assert_close(layer.bias[layer.filter_mask], twin.bias[layer.filter_mask])
    torch.testing.assert_close(layer(X), twin(X))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_prune_import_of_norms(training):
    norm = nn.BatchNorm2d(8).train(training)
    nn.init.uniform_(norm.weight, 0.5, 1), nn.init.uniform_(norm.bias, 0.5, 1)
    prune.custom_from_mask(norm, "weight", bools(1, 0, 0, 1, 1, 1, 1, 1))
    prune.custom_from_mask(norm, "bias", bools(1, 0, 1, 0, 1, 1, 1, 1))
    report = converted(norm)
    assert torch.equal(norm.channel_mask, bools(1, 0, 1, 1, 1, 1, 1, 1))
    assert report.pruned == {"0": "dead: 1 channels; 2 entries that no mask can drop stay as zeros, and train"}


def test_prune_import_of_a_layer_that_is_masked_already():
    layer = conv()
    pk.convert(layer)
    layer.set_masks(filter=torch.arange(6) != 4)
    prune.custom_from_mask(layer, "weight", bools(1, 0, 1, 1, 1, 1).view(6, 1, 1, 1).expand(6, 8, 3, 3))
    want = layer(X)
    report = pk.convert(layer)
    assert torch.equal(layer.filter_mask, bools(1, 0, 1, 1, 0, 1)) and report.pruned == {"": "dead: 1 filters"}
    assert not report.converted
    torch.testing.assert_close(layer(X), want)


def test_prune_import_of_a_subclass_with_an_adapter():
    norm = BatchNormAct2d(8)
    prune.custom_from_mask(norm, "weight", torch.arange(8) > 2)
    report = converted(norm)
    assert torch.equal(norm.channel_mask, torch.arange(8) > 2) and report.pruned == {"0": "dead: 3 channels"}


def test_prune_import_of_a_standardized_weight():
    """Whole filters only: a zero that the layer stores is not a zero that it computes with."""
    layer = conv(cls=StdConv2d)
    mask = torch.ones(6, 8, 3, 3)
    mask[1], mask[:, 2] = 0, 0
    prune.custom_from_mask(layer, "weight", mask)
    report = converted(layer)
    assert torch.equal(layer.filter_mask, torch.arange(6) != 1) and layer.input_mask.all() and layer.kernel_mask.all()
    assert report.pruned == {"0": "dead: 1 filters; 45 entries that no mask can drop stay as zeros, and train"}


def test_prune_import_leaves_masks_with_other_values_to_torch():
    layer = conv()
    prune.custom_from_mask(layer, "weight", torch.full((6, 8, 3, 3), 0.5))
    want = layer(X)
    report = pk.convert(layer)
    assert not report.pruned and hasattr(layer, "weight_orig")
    layer.set_masks(filter=torch.arange(6) > 2)
    for mode in (False, True):
        y = pk.flow(layer, mode)(X)
        assert_zero(y[:, :3])
        torch.testing.assert_close(y[:, 3:], want[:, 3:])


def test_prune_import_leaves_alone_what_is_not_converted():
    net = nn.Sequential(conv(), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(294, 2))
    for layer in (net[0], net[1], net[3]):
        prune.random_unstructured(layer, "weight", 0.5)
    want = net.eval()(X)
    report = pk.convert(net, norms=False, filter_fn=lambda name, module: False)
    assert not report.pruned and all(hasattr(net[i], "weight_orig") for i in (0, 1, 3))
    assert torch.equal(net(X), want)


def test_prune_import_is_not_needed_for_graph_tools():
    """They look at a copy in which the weights are what torch computes them to be."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(100, 2)).eval()
    for layer in (net[0], net[4]):
        prune.ln_structured(layer, "weight", 0.5, n=2, dim=0)
    want = net(X)
    assert [group.layers for group in pk.coupled_groups(net, X)] == [("0",), ("2",)]
    assert hasattr(net[0], "weight_orig")
    pk.convert(net, filter_fn=lambda name, module: name != "0")
    net[2].set_masks(filter=torch.arange(4) != 1)
    want = net(X)
    torch.testing.assert_close(pk.shrink(net, X)(X), want)
    assert hasattr(net[0], "weight_orig") and hasattr(net[4], "weight_orig")
