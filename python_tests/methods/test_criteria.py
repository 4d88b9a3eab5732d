"""Scores against formulas written out."""

import pytest
import torch
import torch.nn.functional as F

import prunekernels as pk
from cases.methods import batches, chain, convs, norms, sgd, train_epoch
from prunekernels.methods import PGP, SFP, criteria
from prunekernels.methods.criteria import CRITERIA

# a method that never prunes gathers
NOTHING = {"rate": 0.0, "epochs": 10}


def integers(*shape):
    return torch.randint(-4, 5, shape).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_norms(dtype):
    weights = [integers(5, 3, 3, 3).to(dtype), integers(4, 2, 1, 1).to(dtype)]
    for got, w in zip(criteria.l1(weights), weights, strict=True):
        assert torch.equal(got.double(), w.double().abs().sum((1, 2, 3)))
    for got, w in zip(criteria.l2(weights), weights, strict=True):
        torch.testing.assert_close(got.double(), w.double().square().sum((1, 2, 3)).sqrt(), rtol=1e-6, atol=0)


def test_layers_of_several_dtypes():
    weights = [integers(5, 3, 3, 3), integers(4, 2, 1, 1).double()]
    assert [len(score) for score in criteria.l1(weights)] == [5, 4]


def test_geometric_median():
    w = torch.randn(6, 4, 3, 3)
    expected = [sum((a - b).norm() for b in w) for a in w]
    torch.testing.assert_close(criteria.geometric_median([w])[0], torch.stack(expected))
    middle = torch.tensor([0.0, 1.0, 10.0]).view(3, 1, 1, 1)
    assert int(criteria.geometric_median([middle])[0].argmin()) == 1


def gather(name, epochs=1, net=None, each_step=None, optimizer=sgd):
    """Scores after epochs of training; each_step(net) is called between backward and step."""
    net = chain() if net is None else net
    optimizer = optimizer(net)
    optimizer.register_step_pre_hook(lambda *_: each_step(net) if each_step else None)
    method = SFP(net, optimizer, **NOTHING, criterion=name)
    for epoch in range(epochs):
        train_epoch(net, optimizer, epoch, method)
        scores = method.criterion.scores()
        method.end_epoch()
    return scores


def grads_of(net, seen):
    seen.append({name: m.weight.grad.clone() for name, m in convs(net).items()})


def weights_of(net, seen):
    seen.append({name: m.weight.detach().clone() for name, m in convs(net).items()})


def both(net, grads, weights):
    grads_of(net, grads)
    weights_of(net, weights)


def test_gradient_sum_is_l1_of_the_sum():
    seen = []
    scores = gather("gradient_sum", each_step=lambda net: grads_of(net, seen))
    for name, score in scores.items():
        total = sum(grads[name] for grads in seen)
        torch.testing.assert_close(score, total.abs().sum((1, 2, 3)))


def test_gradient_norms_is_the_sum_of_l1():
    seen = []
    scores = gather("gradient_norms", each_step=lambda net: grads_of(net, seen))
    for name, score in scores.items():
        torch.testing.assert_close(score, sum(grads[name].abs().sum((1, 2, 3)) for grads in seen))


def test_taylor_is_the_absolute_value_of_the_sum():
    grads, weights = [], []
    scores = gather("taylor", each_step=lambda net: both(net, grads, weights))
    for name, score in scores.items():
        terms = [(w[name] * g[name]).sum((1, 2, 3)) for w, g in zip(weights, grads, strict=True)]
        torch.testing.assert_close(score, sum(terms).abs())


@pytest.mark.parametrize("optimizer", [sgd, lambda net: pk.optim.MaskedSGD(net.parameters(), 0.05, 0.9)])
def test_update_norm(optimizer):
    net, before, after = chain(), [], []
    scores = gather("update_norm", net=net, each_step=lambda net: weights_of(net, before), optimizer=optimizer)
    weights_of(net, after)
    for name, score in scores.items():
        steps = [w[name] for w in before] + [after[0][name]]
        changes = [(b - a).abs().sum((1, 2, 3)) for a, b in zip(steps, steps[1:], strict=False)]
        torch.testing.assert_close(score, sum(changes))


@pytest.mark.parametrize("name", ["gradient_sum", "gradient_norms", "taylor", "update_norm", "mean_activation"])
def test_each_epoch_begins_anew(name):
    net = chain()
    first = gather(name, net=net)
    optimizer = sgd(net)
    method = SFP(net, optimizer, **NOTHING, criterion=name)
    train_epoch(net, optimizer, 0, method)
    method.end_epoch()
    with pytest.raises(ValueError, match="SFP: 0: expected .* in this epoch"):
        method.criterion.scores()
    train_epoch(net, optimizer, 1, method)
    seen = method.criterion.scores()
    assert not torch.equal(seen["0"], first["0"])


@pytest.mark.parametrize("flow", [False, True])
def test_mean_activation_is_behind_the_norm(flow):
    net = pk.flow(chain(), flow)
    optimizer = sgd(net)
    method = SFP(
        net, optimizer, **NOTHING, criterion=criteria.MeanActivation(batches=2), example_input=torch.randn(1, 3, 6, 6)
    )
    behind, expected = {"0": "1", "3": "4", "6": "7"}, {}
    for name, norm in behind.items():
        norms(net)[norm].register_forward_hook(
            lambda m, args, y, name=name: expected.setdefault(name, []).append(F.relu(y.detach()).mean((0, 2, 3)))
        )
    train_epoch(net, optimizer, 0, method)
    net.eval()
    net(next(batches(5))[0])
    for name, score in method.criterion.scores().items():
        torch.testing.assert_close(score, sum(expected[name][:2]) / 2)


def test_random_is_the_same_for_the_same_seed():
    draws = []
    for seed in (0, 0, 1):
        net = chain()
        method = SFP(net, sgd(net), **NOTHING, criterion="random", seed=seed)
        draws.append(torch.cat(list(method.criterion.scores().values())))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_every_name_prunes(name):
    net = chain()
    optimizer = sgd(net)
    method = SFP(net, optimizer, 0.5, 10, criterion=name)
    train_epoch(net, optimizer, 0, method)
    assert [counts.soft for counts in method.end_epoch().values()] == [4, 6, 5]


def test_function_of_weights():
    net = chain()
    last_first = SFP(net, sgd(net), 0.5, 10, criterion=lambda weights: [-torch.arange(len(w)) for w in weights])
    assert last_first.states["0"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_measure_replaces_what_was_gathered():
    net = chain()
    optimizer = sgd(net)
    method = PGP(net, optimizer, **NOTHING)
    train_epoch(net, optimizer, 0, method)
    left_over = net[0].weight.grad.clone()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    method.measure(F.cross_entropy(net(x), y) for x, y in batches(3))
    assert net.training and torch.equal(net[0].weight.grad, left_over)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    scores = method.criterion.scores()
    net.eval().zero_grad()
    sum(F.cross_entropy(net(x), y) for x, y in batches(3)).backward()
    for name, conv in convs(net).items():
        torch.testing.assert_close(scores[name], conv.weight.grad.abs().sum((1, 2, 3)))


def test_a_layer_without_gradients_is_named():
    net = chain()
    optimizer = sgd(net)
    net[3].weight.requires_grad_(False)
    method = PGP(net, optimizer, 0.5, 3)
    train_epoch(net, optimizer, 0, method)
    with pytest.raises(ValueError, match=r"PGP: 3: expected gradients in this epoch's steps, got none \(see skip\)"):
        method.end_epoch()


def test_only_a_sum_of_gradients_is_measured():
    net = chain()
    with pytest.raises(ValueError, match="PGP: criterion: expected gradient_sum, .* got GradientNorms"):
        PGP(net, sgd(net), 0.5, 3, criterion="gradient_norms").measure([])


# ---- credit for what grew while others slept


class Layer:
    """What CreditedL2 asks of a method: one layer, filters of one weight each, and which of them are dead."""

    prunes_last = False

    def __init__(self, lengths, dead):
        self.layers = {"a": pk.MaskedConv2d(1, len(lengths), 1)}
        self.filters, self.dead = self, [torch.tensor(dead)]
        self.grow(lengths)

    def grow(self, lengths):
        self.layers["a"].weight.data[:, 0, 0, 0] = torch.tensor(lengths)

    def of_layer(self, by_unit, name):
        return by_unit[0]


def credited(lengths, dead):
    layer, criterion = Layer(lengths, dead), criteria.CreditedL2()
    criterion.start(layer)
    criterion.begin_epoch()
    return layer, criterion


@pytest.mark.parametrize(
    ("later", "expected"),
    [
        ([6.0, 10.0, 3.0, 0.0], [6, 10, 6, 0]),  # live ones are twice as long: 4 -> 8
        ([2.0, 2.0, 3.0, 1.0], [2, 2, 3, 1]),  # shorter: no debit
        ([2.0, 6.0, 5.0, 1.0], [2, 6, 5, 1]),  # as long as before
        ([6.0, -6.0, -3.0, 2.0], [6, 6, 4.5, 3]),
    ],
)
def test_credit_is_the_growth_of_live_filters(later, expected):
    layer, criterion = credited([2.0, 6.0, 3.0, 1.0], [False, False, True, True])
    layer.grow(later)
    torch.testing.assert_close(criterion.scores()["a"], torch.tensor(expected).float(), rtol=1e-6, atol=0)
    criterion.begin_epoch()  # growth counts from each pruning on
    torch.testing.assert_close(criterion.scores()["a"], torch.tensor(later).abs(), rtol=1e-6, atol=0)


def test_the_last_pruning_gives_no_credit():
    layer, criterion = credited([2.0, 6.0, 3.0, 1.0], [False, False, True, True])
    layer.grow([6.0, 10.0, 3.0, 1.0])
    layer.prunes_last = True
    assert criterion.scores()["a"].tolist() == [6, 10, 3, 1]


def test_layers_without_dead_filters_or_without_length_have_no_credit():
    layer, criterion = credited([2.0, 6.0, 3.0], [False] * 3)
    layer.grow([4.0, 12.0, 6.0])
    assert criterion.scores()["a"].tolist() == [4, 12, 6]
    layer, criterion = credited([0.0, 0.0, 0.0], [False, False, True])
    layer.grow([4.0, 2.0, 1.0])
    assert criterion.scores()["a"].tolist() == [4, 2, 1]


def test_credit_goes_on_from_a_state():
    dead = [False, False, True, True]
    _, first = credited([2.0, 6.0, 3.0, 1.0], dead)
    layer, second = credited([6.0, 10.0, 3.0, 1.0], dead)
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second.scores()["a"], torch.tensor([6.0, 10, 6, 2]), rtol=1e-6, atol=0)
    second.begin_epoch()
    second.load_state_dict({})  # of a run with another criterion: growth counts from here on
    layer.grow([12.0, 20.0, 3.0, 1.0])
    torch.testing.assert_close(second.scores()["a"], torch.tensor([12.0, 20, 6, 2]), rtol=1e-6, atol=0)


def test_growth_counts_from_the_first_pruning():
    """What was pruned before the first epoch is not part of the mean that live filters are held against."""
    net = chain()
    method = SFP(net, sgd(net), 0.5, 10, duty=0.25, steps_per_epoch=4, warm_up=0)
    live = {name: states == 0 for name, states in method.states.items()}
    for name, conv in convs(net).items():
        torch.testing.assert_close(method.criterion.means[name], criteria.l2([conv.weight[live[name]]])[0].mean())
    scores = method.criterion.scores()
    for name, conv in convs(net).items():
        torch.testing.assert_close(scores[name], criteria.l2([conv.weight])[0])
