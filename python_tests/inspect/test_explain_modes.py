"""What explain says of the three modes of a whole network, and of what compacted mode keeps."""

import sys

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.layers import bools
from prunekernels.inspect.explain import Explanation, explain

X = torch.randn(2, 3, 8, 8)


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    for name, value in (("SECONDS", 0), ("WARMUPS", 0), ("MIN_ROUNDS", 1)):
        monkeypatch.setattr(sys.modules["prunekernels.inspect.explain"], name, value)
    with pk.plan.measure(False):
        yield


def chain(norm=pk.MaskedBatchNorm2d):
    net = nn.Sequential(pk.MaskedConv2d(3, 6, 3), norm(6), nn.ReLU(), pk.MaskedConv2d(6, 4, 1), nn.Conv2d(4, 2, 1))
    net[0].set_masks(filter=torch.arange(6) < 4)
    if norm is pk.MaskedBatchNorm2d:
        net[1].set_mask(torch.arange(6) < 4)
        net[3].set_masks(input=torch.arange(6) < 4)
    return net


def widths(explanation):
    return {row["layer"]: row["compacted_filters"] for row in explanation.rows}


def compacted_lines(explanation):
    return [line for line in str(explanation).splitlines() if line.startswith("compacted mode: ")]


def test_explain_shows_all_modes_with_compacted_mode_among_them():
    found = explain(chain(), X)
    assert list(found.modes.ms) == ["masked", "live", "compacted"] and found.modes.reasons == {}
    assert widths(found) == {"0": 4, "3": 4, "4": 2}
    assert (found.wide, found.kept, found.excess) == ({}, {}, 1.0)
    head, first = str(found).splitlines()[:2]
    assert "kernels  compacted  forward" in head and "12/18        4/6" in first
    assert str(found).splitlines()[-1] == f"whole network, {found.modes}"
    assert found.modes.best in str(found.modes)


def test_in_train_mode_with_backward_and_in_eval_mode_without():
    net = chain()
    assert explain(net, X, modes=["masked"]).modes.backward
    assert not explain(net, X, modes=["masked"], backward=False).modes.backward
    assert not explain(net.eval(), X, modes=["masked"]).modes.backward


def test_no_modes():
    found = explain(chain(), X, modes=())
    assert found.modes is None and found.excess is None and "compacted" not in str(found)
    assert set(widths(found).values()) == {None}


def test_without_compacted_mode_nothing_is_said_of_it():
    found = explain(chain(), X, modes=("masked", "live"))
    assert list(found.modes.ms) == ["masked", "live"] and "compacted" not in str(found)


def test_a_plain_network_has_no_modes():
    assert explain(nn.Sequential(nn.Conv2d(3, 4, 1)), X).modes is None


def test_a_mode_of_no_name():
    with pytest.raises(ValueError, match="modes: expected some of masked, live, compacted, got 'small'"):
        explain(chain(), X, modes=["small"])


def test_a_network_that_cannot_be_compacted_is_explained_with_the_reason():
    class Choosing(nn.Sequential):
        def forward(self, x):
            return super().forward(x if x.detach().numpy().sum() > 0 else -x)

    found = explain(Choosing(*chain()), X)
    assert found.modes.ms["compacted"] is None and found.modes.best in ("masked", "live")
    assert "compacted cannot run (compacted: model: expected a network that torch.export can trace" in str(found)
    assert found.excess is None and set(widths(found).values()) == {None}


def test_a_network_that_runs_in_no_mode_is_explained():
    """In train mode a norm wants more than one value for each channel; explain's own run is in eval mode."""
    net = nn.Sequential(pk.MaskedConv2d(3, 4, 8), nn.BatchNorm2d(4))
    found = explain(net, torch.randn(1, 3, 8, 8))
    assert len(found.rows) == 1 and found.modes.best is None
    assert str(found).count("Expected more than 1 value per channel") == 3


def test_what_explain_of_compacted_mode_leaves_alone():
    net = pk.flow(chain())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    explain(net, X)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters()) and net[0]._flow


# ---- what compacted mode keeps, and why


class Block(nn.Module):
    """Two convolutions that meet in an add."""

    def __init__(self, norm=pk.MaskedBatchNorm2d):
        super().__init__()
        self.a, self.b, self.last = pk.MaskedConv2d(3, 4, 1), pk.MaskedConv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.a.set_masks(filter=bools(1, 1, 0, 0))
        self.b.set_masks(filter=bools(0, 1, 1, 0))

    def forward(self, x):
        return self.last(self.a(x) + self.b(x))


class Several(nn.Module):
    """Six convolutions that meet in adds."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(pk.MaskedConv2d(3, 6, 1) for _ in range(6))
        for i, layer in enumerate(self.layers):
            layer.set_masks(filter=torch.arange(6) == i)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.last(sum(layer(x) for layer in self.layers))


class Functional(nn.Module):
    """An operator without a rule, and a part of the channels that a split takes."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.kind = pk.MaskedConv2d(3, 4, 1), kind
        self.last, self.other = (nn.Conv2d(2 if kind == "chunk" else 4, 2, 1) for _ in range(2))
        self.first.set_masks(filter=bools(1, 1, 1, 0))

    def forward(self, x):
        y = self.first(x)
        if self.kind == "sigmoid":
            return self.last(torch.sigmoid(y))
        if self.kind == "sums":
            return torch.cumsum(y, 1)
        if self.kind == "chunk":
            a, b = y.chunk(2, 1)
            return self.last(a) + self.other(b)
        return y


def grouped(groups=2):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), pk.MaskedConv2d(4, 8, 1, groups=groups), nn.Conv2d(8, 2, 1))
    net[1].set_masks(filter=torch.arange(8) != 2)
    return net


@pytest.mark.parametrize(
    ("make", "layer", "width", "count", "reason"),
    [
        (lambda: chain(nn.BatchNorm2d), "0", 6, 2, "not masked in 1"),
        (Block, "a", 3, 1, "coupled with live ones of b"),
        (Block, "b", 3, 1, "coupled with live ones of a"),
        (Several, "layers.0", 6, 5, "coupled with live ones of layers.1, layers.2, layers.3 and 2 more"),
        (grouped, "1", 8, 1, "each group has as many as the largest"),
        (lambda: grouped(4), "1", 8, 1, "in groups with live ones"),
        (lambda: Functional("sigmoid"), "first", 4, 1, "not zero behind forward (aten.sigmoid.default)"),
        (lambda: Functional("sums"), "first", 4, 1, "all channels go into forward (aten.cumsum.default)"),
        (lambda: Functional("output"), "first", 4, 1, "all channels go into the network's output"),
        (lambda: Functional("chunk"), "first", 4, 1, "the forward wants as many channels here as in another place"),
    ],
)
def test_dead_filters_that_compacted_mode_keeps_are_explained(make, layer, width, count, reason):
    found = explain(make(), X, modes=["compacted"])
    assert widths(found)[layer] == width
    assert found.kept[layer] == f"{count} dead filters as zeros: {reason}"
    assert f"compacted mode: {layer} has {found.kept[layer]}" in str(found).splitlines()


def test_a_layer_that_compacted_mode_leaves_wide_is_named():
    net = chain()
    net[0].weight_grad = "dense"
    found = explain(net, X)
    assert found.wide == {"0": 'dead filters train, by weight_grad="dense"'}
    assert widths(found)["0"] is None
    assert compacted_lines(found) == ['compacted mode: 0 keeps its width: dead filters train, by weight_grad="dense"']


def test_the_cost_of_dead_filters_in_compacted_mode():
    found = explain(Several(), X, modes=["compacted"])
    union, separate, last = 6 * 3 * 6, 6 * 3 * 1, 6 * 2  # kernels; all layers have as many pixels
    assert found.excess == pytest.approx((union + last) / (separate + last))
    line = "compacted mode: those zeros take it to 4.00 times the multiply-adds of live mode"
    assert compacted_lines(found)[-1] == line
    assert "those zeros" not in str(Explanation(excess=1.1)) and "those zeros" in str(Explanation(excess=1.2))


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
@pytest.mark.parametrize("wrap", [nn.Identity(), torch.compile])
def test_explain_of_a_wrapped_network_in_compacted_mode(wrap):
    net = Block()
    wrapped = torch.compile(net, backend="eager") if wrap is torch.compile else wrap(net)
    found = explain(wrapped, X)
    assert widths(found) == {"a": 3, "b": 3, "last": 2} and set(found.kept) == {"a", "b"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_100"])
def test_explain_of_timms_networks_in_compacted_mode(name):
    timm = pytest.importorskip("timm")
    net = timm.create_model(name, pretrained=False)
    x = torch.randn(2, 3, 64, 64)
    pk.convert(net)
    for group in pk.coupled_groups(net, x):
        if not group.is_output:
            group.set_masks(net, torch.arange(group.width) % 2 == 0)
    found = explain(net, x, backward=False)
    assert found.modes.reasons == {}
    assert 1 <= found.excess < 1.1
    masked = [row for row in found.rows if row["live_filters"] < row["filters"]]
    assert masked and all(row["compacted_filters"] < row["filters"] for row in masked)
    zeros = {row["layer"] for row in masked if row["compacted_filters"] > row["live_filters"]}
    assert set(found.kept) == zeros
