"""Methods on networks with group and layer norms: their channels die with the filters, alike in the three modes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.methods import EVERY, batches, sgd
from cases.norms import LayerNorm2d, Residual

IMAGES = torch.randn(2, 3, 6, 6, dtype=torch.float64)
NORMS = {"group": lambda C: nn.GroupNorm(4, C), "layer": LayerNorm2d}


def trained(name, method, mode, coupling, epochs=4):
    torch.manual_seed(0)
    net = Residual(NORMS[name]).double()
    pk.convert(net)
    if mode == "live":
        pk.flow(net)
    optimizer = sgd(net)
    options = {"rate": 0.5, "epochs": epochs, "duty": 0.5, "steps_per_epoch": 4, "example_input": IMAGES}
    run = EVERY[method](
        net, optimizer, **options, coupling=coupling, mode="compacted" if mode == "compacted" else "masked"
    )
    seen = []
    for epoch in range(epochs):
        for x, y in batches(epoch, torch.float64):
            run.opt.zero_grad()
            F.cross_entropy(run.net(x), y).backward()
            run.opt.step()
            run.step()
        run.end_epoch()
        seen.append({key: value.clone() for key, value in net.state_dict().items()})
    return net, seen


@pytest.mark.parametrize("coupling", ["independent", "joint"])
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("method", ["sfp", "ghfp", "pgp"])
def test_methods_prune_alike_in_the_three_modes(method, name, coupling):
    net, want = trained(name, method, "masked", coupling)
    assert not net.norm1.channel_mask.all() and torch.equal(net.norm1.channel_mask, net.conv1.filter_mask)
    pairs = list(zip(want[:-1], want[1:], strict=True))
    assert any(not torch.equal(a["norm1.channel_mask"], b["norm1.channel_mask"]) for a, b in pairs)
    for mode in ("live", "compacted"):
        _, got = trained(name, method, mode, coupling)
        for epoch, (a, b) in enumerate(zip(got, want, strict=True)):
            for key, tensor in a.items():
                text = lambda m, key=key, epoch=epoch, mode=mode: f"{mode}, epoch {epoch}, {key}: {m}"  # noqa: E731
                torch.testing.assert_close(tensor, b[key], rtol=1e-7, atol=1e-9, msg=text)
    small = pk.shrink(net.eval(), IMAGES)
    torch.testing.assert_close(small(IMAGES), net(IMAGES))


@pytest.mark.parametrize("method", sorted(EVERY))
def test_norms_are_found_without_an_example(method):
    """By what their inputs are, in the first step."""
    torch.manual_seed(0)
    net = Residual(NORMS["group"])
    pk.convert(net)
    optimizer = sgd(net)
    run = EVERY[method](net, optimizer, rate=0.5, epochs=2)
    for epoch in range(2):
        for x, y in batches(epoch):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            run.step()
        run.end_epoch()
    for conv, norm in ((net.stem, net.norm0), (net.conv1, net.norm1), (net.conv2, net.norm2)):
        live = conv.filter_mask & conv.hard_mask
        assert not live.all() and torch.equal(norm.channel_mask, live)


def test_csgd_leaves_out_what_statistics_tie_together():
    """Merged channels count once in the statistics of a group norm, so the network would compute something else."""
    net = Residual(NORMS["group"])
    pk.convert(net)
    with pytest.raises(ValueError, match="merge"):
        pk.methods.CSGD(net, sgd(net), rate=0.5, epochs=2, example_input=IMAGES.float())


def test_recalibration_leaves_them_alone():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    pk.convert(net)
    net[1].set_mask(torch.arange(8) > 2)
    before = copy.deepcopy(net[1].state_dict())
    assert pk.methods.recalibrate_norms(net.eval(), [torch.randn(4, 3, 6, 6) for _ in range(2)]) == 2
    assert all(torch.equal(value, before[key]) for key, value in net[1].state_dict().items())
