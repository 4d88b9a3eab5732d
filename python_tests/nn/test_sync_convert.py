"""nn.SyncBatchNorm and its masked form on one process: convert, restore, and what torch's own conversion does."""

import copy
import gc

import pytest
import torch
from torch import nn

import prunekernels as pk
from prunekernels.nn.lost_masks import lost_mask

KEEP = torch.arange(8) > 3
X = torch.randn(4, 3, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network(norm=nn.SyncBatchNorm, **options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm(8, **options), nn.ReLU(), nn.Conv2d(8, 4, 3)).double()


def masked(norm=nn.SyncBatchNorm, **options):
    net = network(norm, **options)
    nn.init.normal_(net[1].bias) if net[1].bias is not None else None
    pk.convert(net)
    net[0].set_masks(filter=KEEP), net[1].set_mask(KEEP)
    return net


def through(net, optimizer=None):
    y = net(X)
    y.square().sum().backward()
    return y.detach(), [p.grad for p in net.parameters()], [b.clone() for b in net.buffers()]


@pytest.mark.parametrize("live", [False, True], ids=["masked", "live"])
def test_one_process_has_what_batch_norm_has(live):
    nets = [pk.flow(masked(norm), live) for norm in (nn.SyncBatchNorm, nn.BatchNorm2d)]
    assert type(nets[0][1]) is pk.MaskedSyncBatchNorm
    for _ in range(2):
        for got, want in zip(*(through(net) for net in nets), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(nets[0].eval()(X), nets[1].eval()(X), rtol=0, atol=0)


def test_convert_and_restore_keep_the_module_and_its_group():
    net, group = network(), object()
    norm, weight = net[1], net[1].weight
    norm.process_group = group
    assert pk.convert(net).norms == ["1"] and net[1] is norm and norm.process_group is group
    assert isinstance(norm, pk.MaskedBatchNorm2d) and not isinstance(norm, nn.SyncBatchNorm)
    norm.set_mask(KEEP)
    assert pk.restore(net).norms == ["1"] and type(net[1]) is nn.SyncBatchNorm
    assert net[1] is norm and norm.weight is weight and norm.process_group is group
    assert weight.tolist() == [0.0] * 4 + [1.0] * 4


def test_from_and_to_norm():
    plain = nn.SyncBatchNorm(8)
    norm = pk.MaskedSyncBatchNorm.from_norm(plain)
    assert norm.weight is plain.weight and norm.process_group is None
    norm.set_mask(KEEP)
    small = norm.to_norm()
    assert type(small) is nn.SyncBatchNorm and small.weight.tolist() == KEEP.tolist() and not hasattr(small, "_masks")
    for cls, other in ((pk.MaskedSyncBatchNorm, nn.BatchNorm2d), (pk.MaskedBatchNorm2d, nn.SyncBatchNorm)):
        with pytest.raises(ValueError, match=rf"{cls.__name__}.from_norm: norm: expected .*, got {other.__name__}"):
            cls.from_norm(other(8))


def test_subclasses_stay_what_they_are():
    class Activated(nn.SyncBatchNorm):
        def forward(self, x):
            return super().forward(x).relu()

    net = network(Activated)
    assert "has a forward of its own" in pk.convert(net).skipped["1"]
    pk.register_adapter(Activated, output=lambda layer, y: y.relu())
    want = network(Activated)(X)
    assert pk.convert(net).norms == ["1"]
    assert isinstance(net[1], Activated) and isinstance(net[1], pk.MaskedSyncBatchNorm)
    torch.testing.assert_close(net(X), want)
    net[1].set_mask(KEEP)
    assert (net[1](net[0](X)).flatten(2).amax((0, 2)) > 0).tolist() == KEEP.tolist()
    assert type(pk.shrink(net, X, form="module")[1]) is Activated


class SyncBatchNormAct(nn.SyncBatchNorm):
    """As timm's convert_sync_batchnorm makes them of BatchNormAct2d, which gives them drop and act."""

    def forward(self, x):
        y = super().forward(x)
        return self.act(self.drop(y)) if hasattr(self, "act") else y


SyncBatchNormAct.__module__ = "timm.layers.norm_act"


@pytest.mark.parametrize("activates", [True, False])
def test_the_norms_of_timm_keep_their_activations(activates):
    nets = [network(SyncBatchNormAct) for _ in range(2)]
    for net in nets if activates else ():
        net[1].drop, net[1].act = nn.Identity(), nn.SiLU()
    assert pk.convert(nets[0]).norms == ["1"] and isinstance(nets[0][1], pk.MaskedSyncBatchNorm)
    torch.testing.assert_close(nets[0](X), nets[1](X))


@pytest.mark.parametrize("form", ["module", "graph"])
def test_shrink_gives_norms_of_all_processes(form):
    net, group = masked(momentum=None), object()
    net(X)
    net[1].process_group = group
    small = pk.shrink(net, X, form=form)
    norm = small[1] if form == "module" else small.get_submodule("1")
    assert type(norm) is nn.SyncBatchNorm and (norm.num_features, norm.momentum) == (4, None)
    assert form == "module" or norm.process_group is group
    assert int(norm.num_batches_tracked) == 1
    torch.testing.assert_close(small.eval()(X), net.eval()(X))


def test_compacted_mode():
    """The small network has the same process group, and what it learns goes back."""
    net, group = masked(), None
    twin = copy.deepcopy(net)
    optimizers = [torch.optim.SGD(n.parameters(), 0.1) for n in (net, twin)]
    with pk.compacted(net, X, optimizers[0]) as (small, optimizer):
        assert type(small[1]) is nn.SyncBatchNorm and small[1].process_group is group and small[1].num_features == 4
        through(small)
        optimizer.step()
    through(twin)
    optimizers[1].step()
    for got, want in zip((*net.parameters(), *net.buffers()), (*twin.parameters(), *twin.buffers()), strict=True):
        torch.testing.assert_close(got, want)


# ---- convert_sync_batchnorm


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network(nn.BatchNorm2d)
        self.again = self.inner[1]
        self.line, self.none = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), None
        self.group = nn.GroupNorm(2, 4)

    def forward(self, x):
        return self.line(self.group(self.inner(x)).mean((2, 3)))


def test_masks_stay():
    net = Nested().double()
    pk.convert(net)
    net.inner[0].set_masks(filter=KEEP), net.inner[1].set_mask(KEEP)
    norm, line, group = net.inner[1], net.line[1], object()
    want = net(X)
    assert pk.convert_sync_batchnorm(net, group) is net
    assert net.inner[1] is net.again is norm and type(norm) is pk.MaskedSyncBatchNorm and norm.process_group is group
    assert torch.equal(norm.channel_mask, KEEP) and type(net.group) is pk.MaskedGroupNorm
    assert type(net.line[1]) is nn.SyncBatchNorm and net.line[1].weight is line.weight
    assert net.line[1].process_group is group
    norm.process_group = net.line[1].process_group = None
    torch.testing.assert_close(net(X), want)
    pk.convert_sync_batchnorm(net, group)
    assert norm.process_group is group


def test_a_norm_by_itself():
    norm = nn.BatchNorm2d(4)
    assert type(pk.convert_sync_batchnorm(norm)) is nn.SyncBatchNorm
    masked_norm = pk.MaskedBatchNorm2d(4)
    assert pk.convert_sync_batchnorm(masked_norm) is masked_norm and type(masked_norm) is pk.MaskedSyncBatchNorm


class Named(nn.BatchNorm2d):
    pass


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_subclasses():
    net = masked(Named)
    pk.convert_sync_batchnorm(net)
    assert type(net[1]) is pk.MaskedSyncBatchNorm and torch.equal(net[1].channel_mask, KEEP)
    pk.register_adapter(Doubled, output=lambda layer, y: 2 * y)
    net = nn.Sequential(*masked(nn.BatchNorm2d), *masked(Doubled))
    with pytest.raises(ValueError, match=r"convert_sync_batchnorm: 5: expected a norm that .*, got MaskedDoubled"):
        pk.convert_sync_batchnorm(net)
    assert type(net[1]) is pk.MaskedBatchNorm2d, "an error changes nothing"


# ---- torch's own function, which knows no masks


def replaced(**options):
    """A network in which torch has replaced a masked norm."""
    net = nn.SyncBatchNorm.convert_sync_batchnorm(masked(nn.BatchNorm2d, **options))
    gc.collect()
    assert type(net[1]) is nn.SyncBatchNorm
    return net


def method(net):
    return pk.methods.SFP(net, torch.optim.SGD(net.parameters(), 0.1), rate=0.5, epochs=2)


ASK = {
    "flow": pk.flow,
    "check_same_masks": pk.check_same_masks,
    "coupled_groups": lambda net: pk.coupled_groups(net, X),
    "shrink": lambda net: pk.shrink(net, X),
    "tidy_masks": lambda net: pk.tidy_masks(net, X),
    "compacted": lambda net: pk.compacted(net, X).__enter__(),
    "convert_sync_batchnorm": pk.convert_sync_batchnorm,
    "Method": method,
}


@pytest.mark.parametrize("name", ASK)
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_a_lost_mask_is_noticed(name, options):
    with pytest.raises(ValueError, match=rf"{name}: 1: expected the masked norm that was there.*pk.convert\(model\)"):
        ASK[name](replaced(**options))


def test_a_method_and_its_groups_notice_it_later():
    net = masked(nn.BatchNorm2d)
    of_net, [group, *_] = method(net), pk.coupled_groups(net, X)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    with pytest.raises(ValueError, match="Method: 1: expected the masked norm"):
        of_net.end_epoch()
    with pytest.raises(ValueError, match=r"Group\.set_masks: 1: expected the masked norm"):
        group.set_masks(net, KEEP)


@pytest.mark.parametrize("change", [lambda net: net, copy.deepcopy, lambda net: net.float().double()])
def test_convert_gives_the_mask_back(change):
    net = change(masked(nn.BatchNorm2d))
    want = copy.deepcopy(net)(X)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert not torch.allclose(net(X), want)
    pk.convert(net)
    assert type(net[1]) is pk.MaskedSyncBatchNorm and torch.equal(net[1].channel_mask, KEEP)
    torch.testing.assert_close(net(X), want)
    assert type(pk.shrink(net, X, form="module")[1]) is nn.SyncBatchNorm


def test_nothing_is_lost_where_masks_were_taken_off():
    net = masked(nn.BatchNorm2d)
    pk.restore(net)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert lost_mask(net[1]) is None
    pk.convert(net)
    assert net[1].channel_mask.all()
    with pk.compacted(net, X) as (small, _):  # whose layers have the tensors of masked ones
        assert small[1].weight is net[1].weight and type(small[1]) is nn.SyncBatchNorm
    assert lost_mask(nn.SyncBatchNorm(4)) is None
