"""recalibrate_norms: statistics of what is live, as means over batches; all else stays."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.methods import chain, norms, residual, sgd
from cases.ranks import run_ranks
from prunekernels.methods import GHFP, PruneWhileTraining, recalibrate_norms

BATCHES = [torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(i)) * (1 + i) for i in range(4)]


def statistics(net):
    return {n: (m.running_mean.clone(), m.running_var.clone()) for n, m in norms(net).items()}


def pruned(net, mode="masked"):
    """The chain with dead filters, their norms masked along."""
    masks = {"0": 8, "3": 12, "6": 10}
    for name, width in masks.items():
        keep = torch.arange(width) % 3 > 0
        net.get_submodule(name).set_masks(filter=keep)
        net.get_submodule(str(int(name) + 1)).set_mask(keep)
    return pk.flow(net, mode == "live")


def inputs_of(net, name, x):
    """What a module gets, at full width, if norms before it go by the batch, as in training mode."""
    seen = []
    handle = net.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net.train()
    net(x)
    handle.remove()
    return seen[0].to_dense() if isinstance(seen[0], pk.LiveTensor) else seen[0]


@pytest.mark.parametrize("mode", ["masked", "live"])
def test_statistics_are_means_over_the_batches(mode):
    net = pruned(chain(), mode)
    before = statistics(net)
    with torch.no_grad():
        seen = {name: [inputs_of(net, name, x) for x in BATCHES] for name in norms(net)}
    for name, norm in norms(net).items():
        norm.running_mean.copy_(before[name][0])
        norm.running_var.copy_(before[name][1])
    assert recalibrate_norms(net, BATCHES) == 4
    for name, norm in norms(net).items():
        keep = norm.channel_mask
        mean = torch.stack([x.mean((0, 2, 3)) for x in seen[name]]).mean(0)
        var = torch.stack([x.var((0, 2, 3)) for x in seen[name]]).mean(0)
        torch.testing.assert_close(norm.running_mean[keep], mean[keep], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var[keep], var[keep], rtol=1e-4, atol=1e-5)
        assert not keep.all()
        for new, old in zip((norm.running_mean, norm.running_var), before[name], strict=True):
            assert torch.equal(new[~keep], old[~keep])


@pytest.mark.parametrize("training", [True, False])
def test_nothing_else_moves(training):
    net = pruned(chain())
    norms(net)["1"].momentum = 0.3
    net.train(training)
    if training:
        net[3].eval()
    for m in norms(net).values():
        m.num_batches_tracked.fill_(7)
    modes = {n: m.training for n, m in net.named_modules()}
    before = {n: t.clone() for n, t in net.state_dict(keep_vars=True).items() if "running" not in n}
    recalibrate_norms(net, BATCHES)
    assert modes == {n: m.training for n, m in net.named_modules()}
    after = net.state_dict(keep_vars=True)
    assert all(torch.equal(t, after[n]) for n, t in before.items())
    assert (norms(net)["1"].momentum, norms(net)["4"].momentum) == (0.3, 0.1)
    assert all(p.grad is None for p in net.parameters())


def test_nothing_is_dropped_out():
    net = nn.Sequential(nn.Dropout(0.9), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    other = nn.Sequential(nn.Identity(), net[1], nn.BatchNorm2d(4))
    recalibrate_norms(net, BATCHES)
    recalibrate_norms(other, BATCHES)
    assert torch.equal(net[2].running_mean, other[2].running_mean) and net[2].running_mean.any()


def test_frozen_norms_stay():
    net = chain().train()
    net[1].eval()
    before = statistics(net)
    recalibrate_norms(net, BATCHES)
    after = statistics(net)
    assert torch.equal(after["1"][0], before["1"][0]) and not torch.equal(after["4"][0], before["4"][0])


def test_eval_mode_then_computes_what_one_batch_has():
    """With a single batch, eval mode is training mode, up to the bias of the variance."""
    net = pruned(chain(dtype=torch.float64))
    x = torch.randn(50, 3, 6, 6, dtype=torch.float64)
    recalibrate_norms(net, [x])
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(x), net.train()(x), rtol=1e-2, atol=1e-3)


def test_what_batches_may_be():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, image, scale=1.0):
            return self.norm(image * scale)

    found = []
    x = BATCHES[1]
    for batch in (x, (x, torch.zeros(6)), [x, 0], {"image": x}, pk.Example(x), pk.Example(x, scale=1.0)):
        net = Net()
        recalibrate_norms(net, [batch])
        found.append(net.norm.running_mean)
    assert all(torch.equal(found[0], other) for other in found) and found[0].any()
    assert recalibrate_norms(Net(), (x for _ in range(3))) == 3


def test_a_norm_without_a_count():
    net = nn.Sequential(nn.BatchNorm2d(3))
    net[0].num_batches_tracked = None
    recalibrate_norms(net, BATCHES)
    mean = torch.stack([x.mean((0, 2, 3)) for x in BATCHES]).mean(0)
    torch.testing.assert_close(net[0].running_mean, mean)
    assert net[0].num_batches_tracked is None


@pytest.mark.parametrize("form", ["module", "graph"])
def test_the_small_network(form, capsys):
    net = pruned(chain())
    small = pk.shrink(net, BATCHES[0], form=form)
    recalibrate_norms(net, BATCHES)
    assert recalibrate_norms(small, BATCHES) == 4
    with torch.no_grad():
        torch.testing.assert_close(small.eval()(BATCHES[2]), net.eval()(BATCHES[2]))


def test_compacted_mode():
    """The model's statistics come from the small network where that trains."""
    found = []
    for mode in ("masked", "compacted"):
        net = chain(dtype=torch.float64)
        method = GHFP(net, sgd(net), epochs=2, duty=0, example_input=BATCHES[0].double(), mode=mode)
        assert recalibrate_norms(method.net, [x.double() for x in BATCHES]) == 4
        assert method.is_compacted == (mode == "compacted")
        method.leave()
        found.append(statistics(net))
    for name in found[0]:
        for a, b in zip(found[0][name], found[1][name], strict=True):
            torch.testing.assert_close(a, b)


def test_bfloat16():
    net = pruned(chain()).bfloat16()
    wide = pruned(chain())
    recalibrate_norms(net, [x.bfloat16() for x in BATCHES])
    recalibrate_norms(wide, BATCHES)
    for name, norm in norms(net).items():
        assert norm.running_var.dtype == torch.bfloat16
        torch.testing.assert_close(norm.running_var.float(), norms(wide)[name].running_var, rtol=0.1, atol=0.05)


def test_a_criterion_that_watches_activations_sees_nothing():
    """Its batches are those of the training."""
    net = chain()
    method = PruneWhileTraining(net, sgd(net), epochs=4, criterion="mean_activation")
    recalibrate_norms(net.train(), BATCHES)
    assert not method.criterion.sums


@pytest.mark.parametrize(
    ("net", "batches", "error"),
    [
        (nn.Conv2d(3, 4, 3), BATCHES, "model: expected batch norms with running statistics, got none"),
        (chain(), [], "recalibrate_norms: batches: expected at least one, got none"),
        (chain(), [BATCHES[0], BATCHES[0][:, :1]], "channels"),
        (chain(), [BATCHES[0], "x"], "recalibrate_norms: batches: example_input: expected a tensor"),
    ],
)  # fmt: skip
def test_an_error_changes_nothing(net, batches, error):
    before = {n: t.clone() for n, t in net.state_dict().items()}
    with pytest.raises((ValueError, RuntimeError, TypeError), match=error):
        recalibrate_norms(net.train(), batches)
    assert net.training and all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def work(rank, world):
    net = nn.parallel.DistributedDataParallel(pruned(chain()))
    recalibrate_norms(net, BATCHES[rank::world])
    return statistics(net.module)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed")
def test_ranks_estimate_together():
    alone = pruned(chain())
    recalibrate_norms(alone, BATCHES)
    expected = statistics(alone)
    for found in run_ranks(work, 2, 2):
        for name in expected:
            for a, b in zip(found[name], expected[name], strict=True):
                torch.testing.assert_close(a, b)


def test_it_helps_where_inputs_are_gone():
    """Losses in eval mode after a pruning come nearer to those in training mode."""
    net = residual()
    for seed in range(20):
        x = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
        net.train()(x)
    net.stem.set_masks(filter=torch.arange(8) > 4)
    net.stem_norm.set_mask(torch.arange(8) > 4)
    x = torch.randn(64, 3, 6, 6)
    with torch.no_grad():
        by_batch = net.train()(x)
        old = F.mse_loss(net.eval()(x), by_batch)
        recalibrate_norms(net, [torch.randn(64, 3, 6, 6) for _ in range(4)])
        assert F.mse_loss(net.eval()(x), by_batch) < old / 2
