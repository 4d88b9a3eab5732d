"""Group and layer norms in the graph: small networks have the statistics that the masked ones have."""

import copy

import pytest
import torch
from torch import nn

import prunekernels as pk
from cases.norms import NETWORKS, Residual, X, mask, network
from prunekernels.nn.fixed_norm import FixedChannels

HOW = ["joint", "alone", "norms", "none"]


@pytest.mark.parametrize("fold", [False, True], ids=["", "fold"])
@pytest.mark.parametrize("form", ["module", "graph"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", NETWORKS)
def test_shrink(name, how, form, fold):
    if fold and form == "module":
        return
    net = mask(network(name), how)
    with torch.no_grad():
        for p in net.parameters():  # zeros that are not those of masks
            p.view(-1)[0] = 0
    want = net(X)
    small = pk.shrink(net, X, form=form, fold_constants=fold)
    torch.testing.assert_close(small(X), want)
    assert not any(isinstance(m, (pk.MaskedGroupNorm, pk.MaskedLayerNorm)) for m in small.modules())
    if how == "joint":
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
    if how == "none" and not fold:
        assert not any(isinstance(m, FixedChannels) for m in small.modules())
    torch.testing.assert_close(copy.deepcopy(small)(X), want)


def test_equal_groups_and_layer_norms_become_plain_ones():
    net = network("groups")
    keep = torch.tensor([1, 0, 1, 0, 1, 1, 0, 0, 0, 1, 1, 0]).bool()  # 2, 2, 0, 2 of 3
    for conv, norm in ((net.stem, net.norm0), (net.conv1, net.norm1), (net.conv2, net.norm2)):
        conv.set_masks(filter=keep), norm.set_mask(keep)
    small = pk.shrink(net, X)
    assert all(type(m) is nn.GroupNorm for m in (small.norm0, small.norm1, small.norm2))
    assert (small.norm1.num_groups, small.norm1.num_channels) == (3, 6)
    net = mask(network("channels last"), "joint")
    assert type(pk.shrink(net, X).norm) is nn.LayerNorm


def test_the_line_names_the_norms_that_are_not_plain(capsys):
    net = mask(network("one group"), "alone")
    small = pk.shrink(net, X)
    fixed = [name for name, m in small.named_modules() if isinstance(m, FixedChannels)]
    assert fixed and f"; no plain norm serves in {', '.join(fixed)}" in capsys.readouterr().out


def test_a_group_that_nothing_reads_goes():
    net = network("groups")
    net.conv2.set_masks(input=torch.arange(12) >= 3)  # of norm1, group 0
    assert pk.shrink(net, X).norm1.num_groups == 3
    assert pk.shrink(net, X, form="graph").norm1.num_groups == 3


def test_a_channel_that_nothing_reads_counts_in_the_statistics():
    net = network("groups")
    net.conv2.set_masks(input=torch.arange(12) != 4)
    want = net(X)
    small = pk.shrink(net, X)
    assert small.norm1.num_channels == 12
    torch.testing.assert_close(small(X), want)
    tidied = pk.tidy_masks(net, X)
    assert not tidied.channels and not tidied.filters
    net.conv2.set_masks(input=torch.arange(12) >= 3)
    want = net(X)
    tidied = pk.tidy_masks(net, X)
    assert tidied.channels == {"norm1": [0, 1, 2]} and tidied.filters == {"conv1": [0, 1, 2]}
    torch.testing.assert_close(net(X), want)


def test_a_dead_filter_before_a_live_channel_counts_as_zeros():
    for how in ("module", "graph"):
        net = network("groups")
        net.conv1.set_masks(filter=torch.arange(12) != 4)
        torch.testing.assert_close(pk.shrink(net, X, form=how)(X), net(X))


def test_coupled_groups_have_the_norms():
    net = network("groups")
    by_layer = {group.layers: group for group in pk.coupled_groups(net, X)}
    assert set(by_layer[("stem", "conv2")].norms) == {"norm0", "norm2"}
    assert set(by_layer[("conv1",)].norms) == {"norm1"} and set(by_layer[("conv1",)].readers) == {"conv2"}
    last = pk.coupled_groups(network("channels last"), X)[0]
    assert last.layers == ("stem", "depthwise") and set(last.norms) == {"norm"} and "up" in last.readers


def test_plain_norms_read_all_channels():
    """A norm that is not converted has statistics of all channels, so none may go."""
    net = Residual(lambda C: nn.GroupNorm(4, C)).double()
    pk.convert(net, norms=False)
    net.conv1.set_masks(filter=torch.arange(12) > 5)
    small = pk.shrink(net, X)
    torch.testing.assert_close(small(X), net(X))
    assert small.norm1.num_channels == 12


def test_groups_of_plain_norms_that_nothing_reads_go():
    net = Residual(lambda C: nn.GroupNorm(4, C)).double()
    pk.convert(net, norms=False)
    for inputs, groups in ((torch.arange(12) >= 3, 3), (torch.arange(12) < 6, 2), (torch.arange(12) >= 0, 4)):
        net.conv2.set_masks(input=inputs)
        with pk.compacted(net, X) as (small, _):
            assert small.norm1.num_groups == groups
            torch.testing.assert_close(small(X), net(X))
        assert pk.shrink(net, X).norm1.num_groups == groups


class Twice(nn.Module):
    """One norm behind two convolutions."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 12, 1), nn.Conv2d(3, 12, 1), nn.GroupNorm(4, 12)
        self.last = nn.Conv2d(12, 4, 1)

    def forward(self, x):
        return self.last(self.norm(self.a(x)).relu() * self.norm(self.b(x))).mean((2, 3))


def test_a_norm_that_is_used_twice():
    net, keep = Twice().double(), torch.tensor([1, 0, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1]).bool()
    pk.convert(net)
    net.a.set_masks(filter=keep), net.b.set_masks(filter=keep), net.norm.set_mask(keep)
    for form in ("module", "graph"):
        small = pk.shrink(net, X, form=form)
        assert small.norm.num_channels == 8
        torch.testing.assert_close(small(X), net(X))
    with pk.compacted(net, X) as (small, _):
        torch.testing.assert_close(small(X), net(X))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_norm_that_computes_its_weight():
    net = nn.Sequential(nn.Conv2d(3, 12, 1), nn.GroupNorm(4, 12), nn.Conv2d(12, 2, 1)).double()
    nn.utils.parametrize.register_parametrization(net[1], "weight", Doubled())
    pk.convert(net)
    keep = torch.arange(12) % 5 > 0
    net[0].set_masks(filter=keep), net[1].set_mask(keep)
    want = net(X)
    torch.testing.assert_close(pk.shrink(net, X)(X), want)
    with pk.compacted(net, X) as (small, _):
        torch.testing.assert_close(small(X), want)
    pk.restore(net, bake=True)
    torch.testing.assert_close(net(X), want)


@pytest.mark.parametrize("how", ["joint", "alone"])
@pytest.mark.parametrize("name", ["groups", "channels first", "channels last"])
def test_the_small_network_trains_on(name, how):
    """With the momentum of the masked one, which then makes the same steps."""
    net = mask(network(name), how)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    pk.optim.bind(optimizer, net)

    def step(net, optimizer):
        optimizer.zero_grad()
        net(X).square().sum().backward()
        optimizer.step()

    step(net, optimizer)
    small, small_optimizer = pk.shrink(net, X, optimizer=optimizer)
    for _ in range(3):
        step(net, optimizer), step(small, small_optimizer)
    torch.testing.assert_close(small(X), net(X))


@pytest.mark.parametrize("how", ["joint", "alone"])
@pytest.mark.parametrize("name", ["groups", "channels first", "channels last"])
def test_saved_and_loaded(name, how, tmp_path):
    net = mask(network(name), how).float().eval()
    small = pk.shrink(net, X.float())
    pk.save_small(small, tmp_path / "small")
    loaded = pk.load_small(tmp_path / "small").eval()
    torch.testing.assert_close(loaded(X.float()), net(X.float()))
    assert not any(type(m).__module__.startswith("prunekernels") for m in loaded.modules() if m is not loaded)


@pytest.mark.parametrize("how", ["joint", "alone"])
@pytest.mark.parametrize("name", ["groups", "channels first", "channels last"])
def test_onnx(name, how, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    net = mask(network(name), how).float().eval()
    small = pk.shrink(net, X.float(), form="graph")
    path = str(tmp_path / "small.onnx")
    torch.onnx.export(small, (X.float(),), path, dynamo=True)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: X.float().numpy()})
    torch.testing.assert_close(torch.from_numpy(got), net(X.float()), rtol=1e-3, atol=1e-4)
