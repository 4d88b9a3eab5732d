"""C-SGD that merges before the end: how close filters are by then, and what the merged network does afterwards."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.merging import NETS, csgd, outputs, randomized
from cases.methods import batches, chain, momentum, residual, sgd, train, train_epoch
from prunekernels.methods import CSGD, FPAGL
from prunekernels.methods.centripetal import LEFT, pull_rate

OPTIMIZERS = {
    "plain": lambda net: torch.optim.SGD(net.parameters(), 0.02, weight_decay=0.05),
    "momentum": lambda net: torch.optim.SGD(net.parameters(), 0.02, 0.9, dampening=0.2, weight_decay=0.05),
    "nesterov": lambda net: torch.optim.SGD(net.parameters(), 0.02, 0.9, nesterov=True, weight_decay=0.05),
    "masked": lambda net: pk.optim.MaskedSGD(net.parameters(), 0.02, 0.9, nesterov=True, weight_decay=0.05),
}


# ---- the merged network beside the clusters that go on


def merged_and_not(make, optimizer, cls=CSGD, **options):
    """Two methods over equal networks after an epoch and a collapse, the second one merged."""
    net = randomized(make().double())
    pair = [csgd(n, optimizer(n), cls, epochs=20, exact=True, **options) for n in (net, copy.deepcopy(net))]
    for method in pair:
        train_epoch(method.model, method.optimizer, 0, method, dtype=torch.float64)
        method.collapse()
    pair[1].merge()
    return pair


def step(method, x, y, lr):
    net, opt = method.net, method.opt
    for group in opt.param_groups:
        group["lr"] = lr
    net.train()
    opt.zero_grad()
    F.cross_entropy(net(x), y).backward()
    opt.step()
    method.step()


@pytest.mark.parametrize(
    ("net", "optimizer", "mode"),
    [
        *((net, "masked", mode) for net in NETS for mode in ("masked", "live", "compacted")),
        *(("padded", optimizer, "masked") for optimizer in OPTIMIZERS if optimizer != "masked"),
    ],
)
def test_a_merged_network_moves_as_its_clusters_would(net, optimizer, mode):
    whole, merged = merged_and_not(NETS[net], OPTIMIZERS[optimizer])
    merged.mode = "compacted" if mode == "compacted" else "masked"
    pk.flow(merged.model, mode == "live")
    for i, (x, y) in enumerate(batches(1, torch.float64)):
        for method in (whole, merged):
            step(method, x, y, 0.02 / (1 + i))
        assert merged.is_compacted == (mode == "compacted")
        merged.leave()
        torch.testing.assert_close(outputs(merged.model), outputs(whole.model), rtol=1e-10, atol=1e-10)
    whole.merge()  # now both have the same parameters, merged before and after
    for (name, p), q in zip(merged.model.named_parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
        if optimizer != "plain":
            buffers = [momentum(m.optimizer, own)[p != 0] for m, own in ((merged, p), (whole, q))]
            torch.testing.assert_close(*buffers, rtol=1e-10, atol=1e-10)


def test_fpagl_goes_on_as_its_clusters_too():
    whole, merged = merged_and_not(residual, OPTIMIZERS["nesterov"], FPAGL)
    for x, y in batches(1, torch.float64):
        for method in (whole, merged):
            step(method, x, y, 0.02)
        torch.testing.assert_close(outputs(merged.model), outputs(whole.model), rtol=1e-10, atol=1e-10)


def test_without_exact_gradients_are_left_alone():
    net = randomized(chain())
    method = csgd(net, exact=False)
    method.collapse()
    method.merge()
    plain = copy.deepcopy(net)
    for n in (net, plain):
        F.cross_entropy(n(torch.ones(2, 3, 6, 6)), torch.tensor([0, 1])).backward()
    grads = [p.grad.clone() for p in plain.parameters()]
    method.optimizer.step()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(net.parameters(), grads, strict=True))


# ---- the strength that makes filters equal in time


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("steps", [1, 20, 200, 1000])
def test_pull_rate_leaves_the_share_that_is_asked_for(beta, steps):
    rate = pull_rate(steps, beta)
    deviation, velocity = 1.0, 0.0
    for _ in range(steps):
        velocity = beta * velocity + rate * deviation
        deviation -= velocity
    fastest = beta ** (steps / 2)  # a step's largest root is sqrt(beta) at best
    assert LEFT / 3 <= deviation <= 3 * LEFT if fastest < LEFT / 10 else deviation <= 2 * steps * fastest


@pytest.mark.parametrize("options", [{}, {"clusters": "even", "start": -1}, {"cls": FPAGL}], ids=str)
def test_filters_are_close_by_an_early_merge(options):
    """The deviations of a network that trains, norms and biases included, and what the merge does to its outputs."""
    net = randomized(chain(bias=True))
    steps = 320 if "cls" in options else 180
    method = csgd(net, sgd(net, 0.05), epochs=8, duty=0.1, steps_per_epoch=steps, **{"merge_at": 0.25} | options)
    seen, collapse = {}, method.collapse

    def look():
        seen.update(method.deviations(), before=outputs(net), vectors=vector_deviation(method))
        collapse()

    method.collapse = look
    for _ in range(2):
        for x, y in list(batches(0)) * (steps // 4):
            step(method, x, y, 0.05)
        method.end_epoch()
    assert method.merged and not (~net[0].filter_mask).all()
    assert max(seen[name] for name in method.layers) < 1e-3 and seen["vectors"] < 5e-3
    torch.testing.assert_close(outputs(net), seen["before"], rtol=1e-2, atol=1e-2)


def vector_deviation(method):
    """The largest difference of a bias, or of a norm's factor or offset, from its cluster's mean, over the largest."""
    found = []
    for tensor, ids in method._clustered:
        if isinstance(tensor, nn.Parameter) and tensor.dim() == 1:
            p = tensor.detach()
            mean = p.clone()
            pk.filter_ops.cluster_mean_([mean], [ids])
            found.append(float((p - mean).abs().max() / p.abs().max()))
    return max(found)


def test_the_strength_follows_the_learning_rate():
    net = chain()
    method = csgd(net, epochs=8, duty=0.5, steps_per_epoch=1000, merge_at=0.5)
    strengths = [method._strength_in({"lr": lr, "momentum": 0.9}) for lr in (0.1, 0.01, 0)]
    assert strengths[1] == pytest.approx(10 * strengths[0]) and strengths[2] == 0 and strengths[0] > 0
    assert method._strength_in({"lr": 0.1, "betas": (0.9, 0.999)}) == 0.05  # steps of Adam are not known


# ---- defaults


def test_with_duty_1_defaults_are_the_paper():
    method = csgd(chain(), epochs=8)
    assert (method.strength, method.start, method.merge_epoch, method.exact) == (0.05, -1, 7, False)


@pytest.mark.parametrize(
    ("epochs", "start", "end"), [(1, -1, 0), (2, -1, 0), (4, 0, 1), (8, 0, 2), (30, 5, 11), (200, 36, 74)]
)
def test_below_it_they_merge_early(epochs, start, end):
    method = csgd(chain(), epochs=epochs, duty=0.1)
    assert (method.strength, method.start, method.merge_epoch) == ("auto", start, end)


@pytest.mark.parametrize(("steps", "start"), [(22, 3), (100, 4), (125, 5), (312, 6), (None, 3)])
def test_the_network_trains_freely_as_long_as_there_is_time(steps, start):
    method = csgd(chain(), epochs=30, merge_at=0.25, steps_per_epoch=steps)
    assert (method.start, method.merge_epoch) == (start, 7)


def test_what_is_given_counts_under_any_duty():
    given = {"strength": 0.3, "start": 1, "merge_at": 0.75, "exact": False}
    for duty in (0.1, 1):
        method = csgd(chain(), epochs=8, duty=duty, **given)
        assert (method.strength, method.start, method.merge_epoch, method.exact) == (0.3, 1, 5, False)


@pytest.mark.parametrize("cls", [CSGD, FPAGL])
def test_a_merge_before_the_end_is_of_means_and_ends_in_compacted_mode(cls):
    net = chain()
    method = csgd(net, cls=cls, epochs=4, merge_at=0.5, mode="compacted")
    train(net, method.optimizer, method, 1)
    assert not method.merged and method.net is net
    before = copy.deepcopy(net)
    train_epoch(net, method.optimizer, 1, method)
    weight = net[0].weight.detach().clone()
    method.end_epoch()
    leader = method.leaders[0]
    assert method.merged and method.net is not net and not torch.equal(before[0].weight, weight)
    for first in leader.unique().tolist():
        if cls is CSGD:
            torch.testing.assert_close(net[0].weight[first], weight[leader == first].mean(0))
        assert not net[0].weight[leader == first][1:].any()


@pytest.mark.parametrize("cls", [CSGD, FPAGL])
@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_resumed_run_merges_and_goes_on_alike(cls, epochs):
    options = {"epochs": 4, "duty": 0.1, "merge_at": 0.5, "steps_per_epoch": 4}
    net = chain()
    method = csgd(net, cls=cls, **options)
    train(net, method.optimizer, method, epochs)
    states = copy.deepcopy([net.state_dict(), method.optimizer.state_dict(), method.state_dict()])
    train(net, method.optimizer, method, 4 - epochs, start=epochs)
    other = chain(seed=5)
    resumed = csgd(other, cls=cls, **options)
    for part, state in zip((other, resumed.optimizer, resumed), states, strict=True):
        part.load_state_dict(state)
    train(other, resumed.optimizer, resumed, 4 - epochs, start=epochs)
    different = [n for n, t in net.state_dict().items() if not torch.equal(t, other.state_dict()[n])]
    assert not different and resumed.merged


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge_at": 0}, r"CSGD: merge_at: expected a share of the epochs in \(0, 1\], got 0"),
        ({"merge_at": 1.5}, r"CSGD: merge_at: expected a share of the epochs in \(0, 1\], got 1.5"),
        ({"merge_at": 0.5, "start": 1}, "CSGD: start: expected an epoch from -1 to 0, got 1"),
        ({"strength": "most"}, "CSGD: strength: expected a number, at least 0, or auto, got most"),
        ({"exact": 1}, "CSGD: exact: expected True, False or None, got 1"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        csgd(chain(), **options)
