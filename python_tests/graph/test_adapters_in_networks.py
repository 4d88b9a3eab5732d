"""What graph tools, explain, methods and optimizers make of layers with adapters."""

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.subclasses import KEEP, LAST, Conv2dSame, ScaledStdConv2d, StdConv2d, X, all_convs, make, masked


@all_convs
def test_shrink_is_exact_and_small(cls):
    net = masked(cls).eval()
    small = pk.shrink(net, X)
    torch.testing.assert_close(small(X), net(X))
    convs = [m for m in small.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.weight.shape[0]) for c in convs][0] == (3, 5) and convs[1].in_channels == 5


@all_convs
def test_coupled_groups_and_tidy(cls):
    net = make(cls)
    pk.convert(net)
    groups = pk.coupled_groups(net, X)
    assert [g.layers for g in groups] == [("0",), ("2",)]
    groups[0].set_masks(net, KEEP)
    assert torch.equal(net[0].filter_mask, KEEP) and torch.equal(net[1].channel_mask, KEEP)
    assert torch.equal(net[2].input_mask, KEEP)
    net[1].set_mask("all"), net[2].set_masks(input="all")
    net[2].set_masks(input=KEEP)
    net.eval()
    want = net(X)
    tidied = pk.tidy_masks(net, X)
    assert tidied.channels["1"] == torch.nonzero(~KEEP).flatten().tolist()
    torch.testing.assert_close(net(X), want)


@all_convs
def test_count_flops_and_explain(cls):
    net = masked(cls).eval()
    rows = pk.count_flops(pk.flow(net), X).rows
    assert [row["live"] * 8 for row in rows][:1] == [rows[0]["dense"] * int(KEEP.sum())]
    assert rows[1]["live"] * 48 == rows[1]["dense"] * int(KEEP.sum()) * 4
    table = pk.explain(net, X)
    assert [row["mode"] for row in table.rows] == ["live", "live"]


def test_explain_below_the_padding():
    """The input of a layer that pads is smaller than its kernel."""
    layer = Conv2dSame(2, 4, 5)
    pk.convert(layer)
    layer.set_masks(filter=torch.arange(4) > 1)
    x = torch.randn(1, 2, 3, 3)
    for mode in (False, True):
        assert len(pk.explain(pk.flow(nn.Sequential(layer), mode), x).rows) == 1
    assert layer.plan is not None


def test_unregistered_classes_do_not_break_shrink():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            rows = self.weight.reshape(1, self.out_channels, -1)
            weight = nn.functional.batch_norm(rows, None, None, training=True, eps=1e-6).reshape_as(self.weight)
            return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding)

    net = nn.Sequential(Standardized(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    pk.convert(net)
    net[2].set_masks(filter=KEEP)
    small = pk.shrink(net, X)
    torch.testing.assert_close(small(X), net(X))


def test_registered_classes_that_were_not_converted_shrink():
    """Both the class and a masked neighbour: its weight is stored as it was computed."""
    net = make(StdConv2d).eval()
    pk.convert(net, filter_fn=lambda name, module: name != "0")
    net[2].set_masks(filter=LAST)
    small = pk.shrink(net, X)
    torch.testing.assert_close(small(X), net(X))
    assert len(pk.coupled_groups(net, X)) == 2


def test_methods_prune_adapted_layers():
    net = make(ScaledStdConv2d)
    pk.convert(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    method = pk.methods.SFP(net, optimizer, 0.5, epochs=2)
    pk.optim.bind(optimizer, net, freeze="dead")
    for _ in range(2):
        for _ in range(2):
            optimizer.zero_grad()
            net(X).square().mean().backward()
            optimizer.step()
            method.step()
        method.end_epoch()
    assert [int(net[i].filter_mask.sum()) for i in (0, 2)] == [4, 3]


def test_weight_decay_spares_dead_filters_and_not_dead_inputs():
    net = masked(StdConv2d)
    before = net[2].weight.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    pk.optim.bind(optimizer, net, freeze="dead")
    net(X).square().sum().backward()
    assert not net[2].weight.grad[~LAST].any()
    assert net[2].weight.grad[LAST][:, ~KEEP].any()  # of the mean and deviation of the filter
    optimizer.step()
    assert torch.equal(net[2].weight[~LAST], before[~LAST])
    assert (net[2].weight[LAST] != before[LAST]).all()


def test_coarse_kernels_of_a_standardized_weight_leave_the_live_ones_as_they_are():
    net = nn.Sequential(StdConv2d(3, 8, 3), nn.ReLU(), StdConv2d(8, 4, 7), nn.Flatten())
    pk.convert(net)
    before = [net[i]._computed_weight().detach().clone() for i in (0, 2)]
    data = [(X, torch.randint(4, (2,)))]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pk.methods.CoarsePruning(
        net, optimizer, 0.5, epochs=3, data=data, masks=2, start=-1, kernel_start=0, example_input=X
    ).end_epoch()
    assert net[0].density < 0.5
    for layer, weight in zip((net[0], net[2]), before, strict=True):
        live = layer.filter_mask
        assert torch.equal(layer._computed_weight()[live], weight[live])


@pytest.mark.parametrize("cls", [StdConv2d, nn.Conv2d], ids=lambda cls: cls.__name__)
def test_csgd_merges_no_filters_of_a_computed_weight(cls):
    """Equal rows and added columns of what is stored are no equal filters and added columns of what is computed."""
    torch.manual_seed(0)
    net = nn.Sequential(
        cls(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), cls(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    pk.convert(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    if cls is nn.Conv2d:
        method = pk.methods.CSGD(net, optimizer, 0.5, epochs=2, example_input=X)
        assert set(method.left_out) == {"6"}
        return
    with pytest.raises(ValueError, match="CSGD"):  # nothing is left that can be merged
        pk.methods.CSGD(net, optimizer, 0.5, epochs=2, example_input=X)
