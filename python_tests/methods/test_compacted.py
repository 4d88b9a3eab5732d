"""Methods in compacted mode do what they do in masked mode: the same masks, the same weights."""

import pytest
import torch
import torch.nn.functional as F

import prunekernels as pk
from cases.methods import EVERY, batches, chain, residual, sgd, train_modes
from prunekernels import methods
from prunekernels.methods import GHFP, PGP, SFP
from prunekernels.methods.criteria import CRITERIA

IMAGES = torch.randn(2, 3, 6, 6, dtype=torch.float64)
SPARSE = {"duty": 0.5, "steps_per_epoch": 4, "example_input": IMAGES}


def close_states(a, b):
    """Two pairs of network and optimizer have the same numbers but for rounding, dead entries included."""
    for name, tensor in a[0].state_dict(keep_vars=True).items():
        other = b[0].state_dict(keep_vars=True)[name]
        torch.testing.assert_close(tensor, other, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    for p, q in zip(a[0].parameters(), b[0].parameters(), strict=True):
        mine, theirs = a[1].state.get(p, {}), b[1].state.get(q, {})
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-8, atol=1e-10)


def both_modes(cls, net_of, optimizer=sgd, epochs=4, **options):
    """Trains in both modes and compares after each epoch; how many steps the small network made."""
    runs, small_steps = {}, 0
    for mode in ("masked", "compacted"):
        net = net_of()
        opt = optimizer(net)
        given = {"rate": 0.5, "epochs": epochs} | SPARSE | options
        runs[mode] = (net, opt, cls(net, opt, **given, mode=mode))
    for epoch in range(epochs):
        small_steps += train_modes([run[2] for run in runs.values()], epoch)
        a, b = (run[2].end_epoch() for run in runs.values())
        assert a == b
        masked, compacted = runs.values()
        for name, state in masked[2].states.items():
            assert torch.equal(state, compacted[2].states[name]), (epoch, name)
        close_states(masked, compacted)
    return small_steps


def double_chain():
    return chain(bias=True, dtype=torch.float64)


def unbiased_chain():
    """The gradient of a bias in front of a norm is rounding alone, which Adam would make as long as any other."""
    return chain(dtype=torch.float64)


def double_residual():
    return residual().double()


WIRED = {"chain": (double_chain, "independent"), "residual": (double_residual, "independent")}
WIRED["joint residual"] = (double_residual, "joint")


@pytest.mark.parametrize("wired", WIRED)
@pytest.mark.parametrize("name", EVERY)
def test_every_method_prunes_alike(name, wired):
    net_of, coupling = WIRED[wired]
    assert both_modes(EVERY[name], net_of, coupling=coupling) >= 4


def masked_sgd(net):
    return pk.optim.MaskedSGD(net.parameters(), 0.05, 0.9, weight_decay=1e-2, nesterov=True)


def adamw(net):
    return torch.optim.AdamW(net.parameters(), 1e-2)


GATHERED = [name for name in sorted(CRITERIA) if CRITERIA[name]().needs_steps]
SCORED = [(name, sgd) for name in sorted(CRITERIA)] + [(name, o) for name in GATHERED for o in (masked_sgd, adamw)]


@pytest.mark.parametrize(("criterion", "optimizer"), SCORED)
def test_every_criterion_scores_alike(criterion, optimizer):
    scores = []

    class Seen(GHFP):
        def _rankings(self):
            scores.append(self.criterion.scores() if criterion != "random" else {})
            return super()._rankings()

    assert both_modes(Seen, unbiased_chain, optimizer, criterion=criterion) >= 8
    for masked, compacted in zip(scores[::2], scores[1::2], strict=True):
        for name in masked:
            mine, theirs = masked[name].double(), compacted[name].double()
            torch.testing.assert_close(mine, theirs, rtol=1e-5 if criterion == "update_norm" else 1e-8, atol=1e-10)


def test_duty_0_runs_small_at_every_step():
    assert both_modes(SFP, double_residual, duty=0.0, criterion="gradient_sum", rate=0.4) == 12
    assert both_modes(methods.PruneWhileTraining, double_chain, duty=1.0) >= 4


def fused_sgd(net):
    return torch.optim.SGD(net.parameters(), 0.05, 0.9, fused=True)


@pytest.mark.parametrize("optimizer", [sgd, fused_sgd, masked_sgd, adamw])
def test_the_same_masks_again_after_a_dense_phase(optimizer):
    """The small network of the last sparse phase is used again, with what the dense phase made of its numbers."""
    fixed = {"criterion": lambda weights: [torch.arange(len(w)).double() for w in weights]}
    assert both_modes(SFP, unbiased_chain, optimizer, **fixed) >= 8


def measured(net, optimizer, method, epochs, of_net):
    for epoch in range(epochs):
        train_modes([method], epoch)
        forward = method.net if of_net else net
        method.measure(F.cross_entropy(forward(x), y) for x, y in batches(epoch + 50, torch.float64))
        method.end_epoch()


@pytest.mark.parametrize("of_net", [True, False])
@pytest.mark.parametrize("duty", [0.0, 0.5])
def test_pgp_measures_alike(duty, of_net):
    seen = []
    for mode in ("masked", "compacted"):
        net = double_residual()
        optimizer = sgd(net)
        method = PGP(net, optimizer, 0.6, 3, **SPARSE | {"duty": duty}, mode=mode, fine_tune=0)
        measured(net, optimizer, method, 3, of_net)
        seen.append((net, optimizer, method))
    assert seen[0][2].history == seen[1][2].history
    close_states(*seen)


@pytest.mark.parametrize("cls", [methods.CSGD, methods.FPAGL])
def test_merging_runs_whole_until_filters_are_merged(cls):
    runs, small = [], []
    for mode in ("masked", "compacted"):
        net = double_residual()
        optimizer = sgd(net)
        runs.append((net, optimizer, cls(net, optimizer, 0.5, 2, example_input=IMAGES, strength=1.0, mode=mode)))
    for epoch in range(3):
        small.append(train_modes([method for *_, method in runs], epoch))
        for *_, method in runs:
            method.end_epoch()
    assert small == [0, 0, 4] and runs[1][2].merged
    close_states(*runs)


def test_coarse_pruning_tries_masks_on_what_was_trained():
    data = [(x, y) for x, y in batches(90, torch.float64)]
    assert both_modes(methods.CoarsePruning, double_chain, data=data, masks=5, epochs=6, duty=1.0) >= 16
