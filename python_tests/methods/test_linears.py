"""Methods on linear layers that are masked: groups, budgets, what is never pruned, and training of a ConvNeXt block."""

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.conv import assert_zero


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.hidden, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x):
        return self.last(self.hidden(self.conv(x).relu().mean((2, 3))).relu())


class Block(nn.Module):
    """A ConvNeXt block: depthwise, then two linear layers on [N, H, W, C]."""

    def __init__(self, width):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x):
        y = self.depthwise(x).permute(0, 2, 3, 1)
        return x + self.down(nn.functional.gelu(self.up(y))).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, stride=2)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def converted(net, **args):
    torch.manual_seed(0)
    net = net()
    pk.convert(net, linears=True)
    return net, torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)


X = torch.randn(2, 3, 8, 8)


def test_groups_have_masked_linear_layers():
    net, _ = converted(Classifier)
    groups = {group.layers: group for group in pk.coupled_groups(net, X)}
    assert set(groups) == {("conv",), ("hidden",), ("last",)}
    assert set(groups["conv",].readers) == {"hidden"} and set(groups["hidden",].readers) == {"last"}
    assert groups["last",].is_output and not groups["hidden",].is_output
    groups["hidden",].set_masks(net, torch.arange(12) > 3)
    assert int(net.hidden.filter_mask.sum()) == int(net.last.input_mask.sum()) == 8


def test_groups_of_plain_linear_layers_are_as_they_were():
    net = Classifier()
    assert [group.layers for group in pk.coupled_groups(net, X)] == [("conv",)]
    pk.convert(net)
    assert [group.layers for group in pk.coupled_groups(net, X)] == [("conv",)]


@pytest.mark.parametrize("coupling", ["independent", "joint"])
def test_the_classifier_is_not_pruned(coupling):
    net, optimizer = converted(Classifier)
    method = pk.methods.SFP(net, optimizer, rate=0.5, epochs=1, coupling=coupling, example_input=X)
    assert set(method.layers) == {"conv", "hidden"} and "outputs" in method.left_out["last"]
    method.end_epoch()
    assert net.last.filter_mask.all() and int(net.hidden.filter_mask.sum()) == 6
    assert int(net.hidden.input_mask.sum()) == 4 and int(net.last.input_mask.sum()) == 6


def test_without_a_graph_linear_layers_are_not_pruned_unasked():
    net, optimizer = converted(Classifier)
    method = pk.methods.SFP(net, optimizer, rate=0.5, epochs=1)
    assert set(method.layers) == {"conv"} and set(method.left_out) == {"hidden", "last"}
    assert "example_input" in method.left_out["hidden"]
    net, optimizer = converted(Classifier)
    method = pk.methods.SFP(net, optimizer, rate=0.5, epochs=1, prune_outputs=["hidden"])
    assert set(method.layers) == {"conv", "hidden"}


@pytest.mark.parametrize(
    ("name", "coupling", "mode"),
    [
        ("SFP", "joint", "live"),
        ("GHFP", "joint", "compacted"),
        ("GHFP", "independent", "masked"),
        ("PGP", "independent", "compacted"),
        ("FPAGL", "joint", "masked"),
        ("CSGD", "independent", "masked"),
        ("CSGD", "joint", "compacted"),
    ],
)
def test_methods_train_a_convnext_block(name, coupling, mode):
    net, optimizer = converted(ConvNeXt)
    options = {"example_input": X, "coupling": coupling, "mode": "compacted" if mode == "compacted" else "masked"}
    method = getattr(pk.methods, name)(net, optimizer, rate=0.5, epochs=3, **options)
    pk.flow(net, mode == "live")
    for _ in range(3):
        for _ in range(2):
            method.opt.zero_grad()
            method.net(X).square().sum().backward()
            method.opt.step()
            method.step()
        method.end_epoch()
    method.leave(), pk.flow(net, False)
    assert int(net.blocks[0].up.filter_mask.sum()) == 12 and net.head.filter_mask.all()
    assert_zero(net.blocks[0].up.weight[~net.blocks[0].up.filter_mask])
    small = pk.shrink(net.eval(), X)
    torch.testing.assert_close(small(X), net(X))


@pytest.mark.parametrize("criterion", ["l1", "l2", "geometric_median", "mean_activation", "taylor"])
def test_criteria(criterion):
    net, optimizer = converted(ConvNeXt)
    method = pk.methods.SFP(net, optimizer, rate=0.5, epochs=1, example_input=X, criterion=criterion)
    net(X).square().sum().backward()
    optimizer.step(), method.step()
    counts = method.end_epoch()
    assert counts["blocks.0.up"].live == 12 and "head" not in counts


def test_mean_activation_of_a_linear_layer_is_over_its_last_dimension():
    net, optimizer = converted(ConvNeXt)
    method = pk.methods.SFP(net, optimizer, rate=0.5, epochs=1, example_input=X, criterion="mean_activation")
    seen = []
    net.blocks[0].up.register_forward_hook(lambda module, args, y: seen.append(y.detach()))
    net(X).sum().backward()
    optimizer.step(), method.step()
    torch.testing.assert_close(method.criterion.scores()["blocks.0.up"], seen[0].relu().mean((0, 1, 2)))


def test_budgets_count_linear_layers():
    net, optimizer = converted(ConvNeXt)
    method = pk.methods.SFP(net, optimizer, budget={"flops": 0.5}, epochs=1, coupling="joint", example_input=X)
    method.end_epoch()
    small, dense = pk.shrink(net.eval(), X), ConvNeXt()
    left = pk.count_flops(small, X).dense / pk.count_flops(dense, X).dense
    assert 0.3 < left <= 0.5


def test_flops():
    layer = pk.MaskedLinear(4, 6)
    layer.set_masks(filter=torch.arange(6) < 3, input=torch.arange(4) < 2)
    flops = pk.count_flops(nn.Sequential(layer), torch.zeros(2, 5, 4))
    assert (flops.dense, flops.live) == (2 * 5 * 24, 2 * 5 * 6) and flops.rows[0]["kind"] == "MaskedLinear"
    flops = pk.count_flops(pk.flow(nn.Sequential(layer)), torch.zeros(2, 4))
    assert (flops.dense, flops.live) == (2 * 24, 2 * 6)
