"""What all methods share: bad input, budgets, masks, norms, history."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.methods import (
    EVERY,
    assert_same,
    batches,
    chain,
    convs,
    norms,
    residual,
    run,
    sgd,
    snapshot,
    train,
    train_epoch,
)
from prunekernels.methods import CSGD, GHFP, PGP, SFP, Counts, Method
from prunekernels.methods.channel_masks import NormFinder, find_norms
from prunekernels.methods.ranking import of_unit

IMAGES = torch.randn(1, 3, 6, 6)


@pytest.mark.parametrize("name", EVERY)
def test_every_method_reaches_its_rate(name):
    net, _, method = run(EVERY[name], epochs=10)
    assert method.finished and len(method.history) == 10
    assert [counts[:3] for counts in method.history[-1].values()] == [(4, 0, 4), (6, 0, 6), (5, 0, 5)]
    for name, conv in convs(net).items():
        assert torch.equal(conv.filter_mask, method.states[name] == 0)
        assert torch.equal(conv.hard_mask, conv.filter_mask)
        assert not conv.weight[~conv.filter_mask].any()


@pytest.mark.parametrize("name", EVERY)
def test_fine_tuning_afterwards_leaves_what_is_dead(name):
    net, optimizer, method = run(EVERY[name], epochs=3, total=2)
    before, states = snapshot(net, optimizer), method.states
    train(net, optimizer, method, 1, 5)
    for name, conv in convs(net).items():
        dead = states[name] > 0
        assert torch.equal(method.states[name], states[name]) and not conv.weight[dead].any()
        assert not torch.equal(conv.weight[~dead], before[f"{name}.weight"][~dead])
    assert len(method.history) == 4 and method.history[3]["3"] == Counts(6, 0, 6, 0)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("flow", [False, True])
def test_ends_in_a_small_network(name, flow, capsys):
    net = pk.flow(chain(dtype=torch.float64), flow)
    optimizer = sgd(net)
    method = EVERY[name](net, optimizer, 0.5, 2, duty=0.5, steps_per_epoch=4)
    train(net, optimizer, method, 2, dtype=torch.float64)
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    small = pk.shrink(net.eval(), x)
    assert [m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d)] == [4, 6, 5]
    with torch.no_grad():
        torch.testing.assert_close(small(x), net(x))


def test_fine_tuning_is_part_of_the_epochs():
    _, _, method = run(SFP, 2, total=3, fine_tune=1)
    assert method.finished and method.history[-1]["3"] == Counts(6, 0, 6, method.history[-1]["3"].returned)
    assert "epoch 2/3" in str(method)


# ---- bad input

BAD = {
    "rate 1": ({"rate": 1.0}, r"SFP: rate: expected a number in \[0, 1\), got 1.0"),
    "rate -1": ({"rate": -0.1}, r"SFP: rate: expected a number in \[0, 1\), got -0.1"),
    "rate NaN": ({"rate": float("nan")}, r"SFP: rate: expected a number in \[0, 1\), got nan"),
    "epochs": ({"epochs": 0}, "SFP: epochs: expected an integer from 1, got 0"),
    "duty": ({"duty": 1.1}, r"SFP: duty: expected a number in \[0, 1\], got 1.1"),
    "round_to": ({"round_to": 0}, "SFP: round_to: expected an integer from 1, got 0"),
    "steps": ({"steps_per_epoch": 2.5}, "SFP: steps_per_epoch: expected an integer from 1, got 2.5"),
    "coupling": ({"coupling": "both"}, "SFP: coupling: expected one of independent, joint, got 'both'"),
    "budget": ({"budget": "all"}, "SFP: budget: expected one of layer, global, flops, or a dict, got 'all'"),
    "joint": ({"coupling": "joint"}, "SFP: example_input: expected an input, which joint coupling needs, got None"),
    "skip": ({"skip": ["1"]}, "SFP: skip: expected names of MaskedConv2d layers, got '1'"),
    "skip a string": ({"skip": "0"}, "SFP: skip: expected a list of names, got '0'"),
    "skip all": ({"skip": ["0", "3", "6"]}, "SFP: skip: expected some layers left to prune, got none"),
    "prune_outputs": ({"prune_outputs": "0"}, "SFP: prune_outputs: expected True, False or a list of names, got '0'"),
    "prune_outputs of none": ({"prune_outputs": ["9"]}, "SFP: prune_outputs: expected names of .*, got '9'"),
    "criterion": ({"criterion": "l3"}, "SFP: criterion: expected one of l1, .*, a function or a Criterion, got 'l3'"),
    "fine_tune": ({"epochs": 3, "fine_tune": 3}, "SFP: fine_tune: expected fewer than the 3 epochs, got 3"),
    "rate a word": ({"rate": "half"}, r"SFP: rate: expected a number in \[0, 1\), got half"),
    "duty a word": ({"duty": "half"}, r"SFP: duty: expected a number in \[0, 1\], got half"),
    "alpha a word": ({"alpha": "x"}, r"SFP: alpha: expected a number in \[0, 1\], got x"),
    "part of an epoch": ({"epochs": 3, "fine_tune": 0.5}, "SFP: fine_tune: expected fewer than the 3 epochs, got 0.5"),
    "norms": ({"norms": "none"}, "SFP: norms: expected True or False, got 'none'"),
    "clip": ({"clip": "no"}, "SFP: clip: expected True, False or None, got 'no'"),
    "seed": ({"seed": "x"}, "SFP: seed: expected an integer, got 'x'"),
    "schedule": ({"schedule": "linear"}, r"SFP: schedule: expected a function \(final, epoch, .*, got 'linear'"),
    "alpha_schedule": ({"alpha_schedule": 3}, r"SFP: alpha_schedule: expected a function .*, got 3"),
    "alpha": ({"alpha": 2.0}, r"SFP: alpha: expected a number in \[0, 1\], got 2.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    options, error = BAD[case]
    net = chain()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=error):
        SFP(net, sgd(net), **options)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert not net[0]._forward_hooks


@pytest.mark.parametrize("name", ["PGP", "PruneWhileTraining", "CoarsePruning", "CSGD"])
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"fine_tune": "x"}, "fine_tune: expected fewer than the 9 epochs, got x"),
        ({"epochs": 2.5}, "epochs: expected an integer from 1, got 2.5"),
    ],
)
def test_epochs_are_checked_before_they_are_counted(name, options, error):
    net = chain()
    with pytest.raises(ValueError, match=f"{name}: {error}"):
        getattr(pk.methods, name)(net, sgd(net), **{"rate": 0.5, "epochs": 9} | options)


def test_an_error_at_the_start_leaves_nothing_behind():
    net = chain()
    optimizer = sgd(net)
    net[3].weight.data[2, 0] = torch.nan
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"SFP: 3: expected finite scores, got others for filters \[2\]"):
        SFP(net, optimizer)
    assert not optimizer._optimizer_step_pre_hooks and not net[0]._forward_hooks
    for name, t in net.state_dict().items():
        torch.testing.assert_close(t, before[name], rtol=0, atol=0, equal_nan=True)


def test_network_without_masks():
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match=r"PGP: model: expected MaskedConv2d layers \(see pk.convert\), got none"):
        PGP(net, sgd(net))


def test_optimizer_of_another_network():
    net = chain()
    with pytest.raises(
        ValueError, match="PGP: optimizer: expected one over the model's parameters, got one without 0.weight"
    ):
        PGP(net, sgd(chain()))
    some = torch.optim.SGD([*net[0].parameters(), *net[6].parameters()], 0.1)
    with pytest.raises(ValueError, match="PGP: optimizer: .* without 3.weight"):
        PGP(net, some)
    assert PGP(net, some, skip=["3"]).left_out == {"3": "skip"}


def test_weights_that_are_not_finite():
    net = chain()
    optimizer = sgd(net)
    method = SFP(net, optimizer, 0.5, 5)
    states = method.states
    net[3].weight.data[2, 0] = torch.nan
    net[3].weight.data[5, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"SFP: 3: expected finite scores, got others for filters \[2, 5\]"):
        method.end_epoch()
    assert all(torch.equal(states[name], now) for name, now in method.states.items()) and method.epoch == 0


# ---- what is pruned


def test_skip_leaves_a_layer_alone():
    net, _, method = run(SFP, skip=["3"])
    assert set(method.history[0]) == set(method.states) == {"0", "6"}
    assert method.left_out == {"3": "skip"} and bool(net[3].weight.flatten(1).any(1).all())


@pytest.mark.parametrize("name", EVERY)
def test_round_to(name):
    _, _, method = run(EVERY[name], 10, round_to=4, rate=0.3)
    assert [counts.live for counts in method.history[-1].values()] == [8, 12, 8]


def test_global_budget():
    net = chain()
    net[3].weight.data[:10] *= 1e-3
    optimizer = sgd(net)
    method = SFP(net, optimizer, 0.5, 10, budget="global")
    soft = {name: int((states == 1).sum()) for name, states in method.states.items()}
    assert sum(soft.values()) == 15 and soft["3"] == 10 and min(soft.values()) >= 1


def test_rate_0_changes_nothing():
    net = chain()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    method = GHFP(net, sgd(net), 0.0, 3)
    method.end_epoch()
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


@pytest.mark.parametrize("duty", [0.0, 1.0])
def test_joint_coupling(duty):
    net, _, method = run(GHFP, 3, net=residual(), total=5, coupling="joint", example_input=IMAGES, duty=duty)
    states = method.states
    assert [unit.layers for unit in method.units] == [("stem", "second"), ("first",), ("last",)]
    assert torch.equal(states["stem"], states["second"])
    hidden = states["stem"] > (0 if duty == 0 else 1)
    assert bool(hidden.any())
    for norm in (net.stem_norm, net.second_norm):
        assert torch.equal(norm.channel_mask, ~hidden)
    for reader in (net.first, net.last):
        assert torch.equal(reader.input_mask, ~hidden)


def test_joint_scores_do_not_add_up_over_layers():
    """A channel of two layers is worth no more than one of a single layer, and a layer of large weights no more than
    one of small weights."""
    group = pk.graph.Group(6, {"a": torch.arange(6), "b": torch.arange(3)}, {}, {})
    scores = {"a": torch.tensor([5.0, 1, 1, 9, 1, 1]), "b": torch.tensor([0.1, 0.3, 0.2])}
    expected = torch.tensor([13, 11, 8, 36, 4, 4], dtype=torch.float64) / 12
    torch.testing.assert_close(of_unit(group, scores), expected, rtol=1e-6, atol=0)
    assert of_unit(pk.graph.Group(3, {"b": torch.arange(3)}, {}, {}), scores).tolist() == scores["b"].tolist()


def test_independent_coupling_in_a_residual_network():
    """A norm dies with its convolution, a reader of the sum only where both are dead."""
    net, _, method = run(SFP, 3, net=residual(), example_input=IMAGES, duty=0.0)
    stem, second = (method.states[name] == 1 for name in ("stem", "second"))
    assert not torch.equal(stem, second)
    assert torch.equal(net.stem_norm.channel_mask, ~stem) and torch.equal(net.second_norm.channel_mask, ~second)
    assert torch.equal(net.last.input_mask, ~(stem & second))
    assert torch.equal(net.second.input_mask, method.states["first"] == 0)


def test_a_reader_of_a_skipped_layer_sees_all_of_it():
    net, _, method = run(SFP, 1, net=residual(), example_input=IMAGES, duty=0.0, warm_up=0, skip=["second"])
    assert bool((method.states["stem"] == 1).any()) and bool(net.last.input_mask.all())
    assert bool(net.second_norm.channel_mask.all())
    assert torch.equal(net.stem_norm.channel_mask, method.states["stem"] == 0)


def test_joint_group_of_a_skipped_layer_stays():
    net = residual()
    method = GHFP(net, sgd(net), 0.5, 3, skip=["second"], coupling="joint", example_input=IMAGES)
    assert set(method.layers) == {"first", "last"}
    assert method.left_out == {"stem": "it meets second", "second": "skip"}


# ---- norms


class PreActivation(nn.Module):
    """The norm sees a sum, written in place into a convolution's output; the second one sees it behind a relu."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(n, 4, 3, padding=1) for n in (3, 4, 4))
        self.norm, self.late, self.own = (nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x):
        x = self.a(x)
        y = self.b(x)
        y += x
        z = self.c(F.relu(self.norm(y)))
        return self.late(F.relu(z)) + self.own(z)


@pytest.mark.parametrize("flow", [False, True])
def test_only_the_norm_of_an_untouched_output_is_found(flow):
    net = PreActivation()
    pk.convert(net)
    pk.flow(net, flow)
    net.train()
    before = copy.deepcopy(net.state_dict())
    assert find_norms(net, pk.Example(IMAGES)) == {"c": ["own"]}
    assert net.norm.training and not any(m._forward_hooks or m._forward_pre_hooks for m in convs(net).values())
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_a_norm_of_two_convolutions_is_of_none():
    net = chain()
    finder = NormFinder(net)
    net(IMAGES.expand(2, 3, 6, 6))
    net[1](net[0](IMAGES))
    net[4](net[0](IMAGES)[:, :1].expand(1, 12, 6, 6))
    assert finder.stop() == {"0": ["1"], "6": ["7"]}


@pytest.mark.parametrize("flow", [False, True])
def test_norms_are_found_in_the_first_step(flow):
    net = pk.flow(chain(), flow)
    optimizer = sgd(net)
    method = SFP(net, optimizer, 0.5, 10, duty=0.0, warm_up=0)
    assert bool(net[1].channel_mask.all()) and not bool(net[0].filter_mask.all())
    masks = []
    train_epoch(net, optimizer, 0, method, lambda: masks.append(torch.equal(net[1].channel_mask, net[0].filter_mask)))
    assert all(masks) and method.channel_masks.norms == {"0": ["1"], "3": ["4"], "6": ["7"]}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules() if m is not net)


def test_norms_false_leaves_norms_alone():
    net, _, method = run(GHFP, 3, norms=False, example_input=IMAGES, duty=0.0)
    assert all(bool(norm.channel_mask.all()) for norm in norms(net).values())
    assert all(bool(conv.input_mask.all()) for conv in convs(net).values())
    assert not bool(net[3].filter_mask.all())


# ---- masks for a while


def test_masked_is_what_the_end_will_be():
    net, _, method = run(SFP, 3, net=chain(bias=True), example_input=IMAGES)
    x = torch.randn(2, 3, 6, 6)
    net.eval()
    free = net(x)
    with method.masked():
        assert torch.equal(net[3].filter_mask, method.states["3"] == 0)
        assert torch.equal(net[4].channel_mask, net[3].filter_mask)
        inside = net(x)
    assert all(bool(conv.filter_mask.all()) for conv in convs(net).values()) and torch.equal(net(x), free)
    assert not torch.equal(inside, free)
    with method.masked():
        with method.masked():
            pass
        assert torch.equal(net(x), inside)
    assert torch.equal(net(x), free)
    method.epoch = method.epochs
    method._set_masks()
    assert torch.equal(net(x), inside)


# ---- odds and ends


def test_text():
    net, _, method = run(GHFP, 1)
    assert str(method) == "GHFP(epoch 1/10; filters: 15 live, 12 soft, 3 hard)"


def test_detach_lets_the_optimizer_go():
    net, optimizer, method = run(PGP, 3)
    method.detach()
    dead = method.states["3"] == 2
    train_epoch(net, optimizer, 0)
    assert not method.criterion.sums and bool(dead.any())
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("freeze", ["hard", "dead"])
def test_masked_optimizers_freeze_what_is_dead(freeze):
    net = chain()
    optimizer = pk.optim.MaskedSGD(net.parameters(), 0.05, 0.9, weight_decay=0.01, freeze=freeze)
    method = SFP(net, optimizer, 0.5, 10, duty=0.0, warm_up=0, alpha=1.0, criterion="l2")
    before = net[3].weight.detach().clone()
    train(net, optimizer, method, 1)
    assert isinstance(method, Method) and optimizer.param_groups[0]["freeze"] == "dead"
    dead = method.states["3"] == 1
    assert bool(dead.any())
    assert torch.equal(
        (net[3].weight != before).flatten(1).any(1), ~dead | (before[:, 0, 0, 0] != net[3].weight[:, 0, 0, 0])
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize(
    ("cls", "options"),
    [(SFP, {"clip": True}), (SFP, {"criterion": "taylor"}), (CSGD, {"example_input": IMAGES})],
)
def test_what_needs_gradients_before_a_step_works_in_a_closure(cls, options, by_name, masked):
    """Its gradients are not there before the closure has run: Lightning makes every step so."""

    def trained(in_closure):
        net = chain()
        optimizer = pk.optim.MaskedSGD(net.parameters(), 0.05) if masked else sgd(net)
        method = cls(net, optimizer, 0.5, 4, **options)
        for epoch in range(2):
            for x, y in batches(epoch):

                def closure(x=x, y=y):
                    optimizer.zero_grad()
                    loss = F.cross_entropy(net(x), y)
                    loss.backward()
                    return loss

                if not in_closure:
                    closure()
                    assert optimizer.step() is None
                else:
                    loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
                    assert loss.requires_grad
                method.step()
            method.end_epoch()
        method.detach()
        optimizer.step(float)
        return net.state_dict()

    assert_same(trained(True), trained(False))


def test_groups_that_come_later_freeze_too():
    """Those of a state dict of torch's own optimizer, which says nothing of it, and those that are added."""
    net = chain()
    optimizer = pk.optim.MaskedSGD(net[:6].parameters(), 0.05, 0.9, weight_decay=0.01)
    others = torch.optim.SGD(net[:6].parameters(), 0.05, 0.9, weight_decay=0.01).state_dict()
    SFP(net, optimizer, 0.5, 10, duty=0.0, skip=["6"])
    optimizer.load_state_dict(others)
    optimizer.add_param_group({"params": net[6:].parameters()})
    assert [group["freeze"] for group in optimizer.param_groups] == ["dead", "dead"]


def test_adamw():
    net = chain()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    method = PGP(net, optimizer, 0.5, 4)
    train(net, optimizer, method, 3)
    dead = method.states["3"] > 0
    for state in ("exp_avg", "exp_avg_sq"):
        values = optimizer.state[net[3].weight][state].flatten(1).any(1)
        assert torch.equal(values, ~dead)


@pytest.mark.parametrize("name", EVERY)
def test_a_report_is_of_plain_numbers(name):
    options = {"duty": 0.5, "steps_per_epoch": 4, "coupling": "joint", "example_input": torch.randn(2, 3, 6, 6)}
    _, _, method = run(EVERY[name], 4, net=residual(), total=4, **options)
    report = method.report()
    assert all(type(value) in (int, float) for value in report.values())
    counts = method.history[-1].values()
    assert report["live"] == sum(c.live for c in counts) and report["hard"] == sum(c.hard for c in counts)
    assert report["filters"] == report["live"] + report["soft"] + report["hard"] and report["epoch"] == 4
    assert report["target_share"] == pytest.approx(0.5)
    for layer, c in method.history[-1].items():
        assert report[f"live_share_of/{layer}"] == c.live / (c.live + c.soft + c.hard)


def test_a_report_before_the_first_epoch():
    net = chain()
    report = PGP(net, sgd(net), 0.5, 4).report()
    assert (report["live_share"], report["target_share"], report["epoch"]) == (1.0, 0.0, 0)
    net = chain()
    report = GHFP(net, sgd(net), 0.5, 4).report()  # prunes before the first epoch
    assert report["target_share"] == report["live_share"] == 0.5
