"""Random masks: how many die, which are chosen, what stays frozen."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.methods import batches, chain, convs, momentum, norms, residual, sgd, train, train_epoch
from prunekernels.methods import CoarsePruning, trials

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(3))
HELD_OUT = list(batches(99, steps=3))


def coarse_of(net, **options):
    given = {"rate": 0.5, "epochs": 6, "data": HELD_OUT, "masks": 6, "example_input": X}
    return CoarsePruning(net, sgd(net), **(given | options))


def errors(net):
    """By torch alone."""
    training = net.training
    net.eval()
    with torch.no_grad():
        wrong = sum(int((net(x).argmax(1) != y).sum()) for x, y in HELD_OUT)
    net.train(training)
    return wrong


def live_kernels(conv):
    return conv.kernel_mask & conv.input_mask & conv.filter_mask[:, None]


def test_feature_maps_then_kernels():
    net = chain()
    method = coarse_of(net)
    assert (method.start, method.kernel_start) == (1, 3)
    train(net, method.optimizer, method, 1)
    assert not method.error_rates and all(conv.density == 1 for conv in convs(net).values())
    train(net, method.optimizer, method, 1, start=1)
    assert [tuple(counts) for counts in method.history[-1].values()] == [(4, 0, 4, 0), (6, 0, 6, 0), (5, 0, 5, 0)]
    assert [int(live_kernels(conv).sum()) for conv in convs(net).values()] == [12, 24, 30]
    assert len(method.error_rates) == 1 and len(method.error_rates[0]) == 6
    train(net, method.optimizer, method, 4, start=2)
    assert [int(live_kernels(conv).sum()) for conv in convs(net).values()] == [6, 12, 15]
    assert len(method.error_rates) == 2 and method.finished


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("kernels", [False, True])
def test_the_mask_with_the_fewest_errors_is_chosen(kernels, layerwise, monkeypatch):
    """Every mask tried is looked at again, one by one, in masked mode."""
    net = chain()
    options = {"start": 0, "kernel_start": 1} if kernels else {"kernel_rate": 0.0, "start": 1}
    method = coarse_of(net, layerwise=layerwise, **options)
    train(net, method.optimizer, method, 1)
    train_epoch(net, method.optimizer, 1, method)
    tried = []
    name = "_try_kernels" if kernels else "_try_filters"
    attempt = getattr(method, name)
    monkeypatch.setattr(method, name, lambda masks: (tried.append(copy.deepcopy(masks)), attempt(masks)))
    before, known = copy.deepcopy(net), len(method.error_rates)
    method.end_epoch()
    rates = sum(method.error_rates[known:], [])
    assert len(tried) == len(rates) == (18 if layerwise else 6) and len(set(rates)) > 1
    images = sum(len(y) for _, y in HELD_OUT)
    for masks, rate in zip(tried, rates, strict=True):
        other = copy.deepcopy(before)
        for mask, conv, norm in zip(masks, convs(other).values(), norms(other).values(), strict=True):
            if kernels:
                conv.set_masks(kernel=mask)
            else:
                conv.set_masks(filter=~mask)
                norm.set_mask(~mask)
        assert errors(other) / images == pytest.approx(rate)
    best = tried[-6:][min(range(6), key=lambda i: rates[-6:][i])]
    if kernels:
        expected = dict(zip(convs(net), best, strict=True))
        assert all(torch.equal(conv.kernel_mask, expected[name]) for name, conv in convs(net).items())
    else:
        assert all(torch.equal(a, ~b) for a, b in zip([c.filter_mask for c in convs(net).values()], best, strict=True))
    assert errors(net) == round(min(rates[-6:]) * images)


@pytest.mark.parametrize("statistics", ["stored", "batch"])
@pytest.mark.parametrize("flow", [False, True])
def test_trying_leaves_no_trace(flow, statistics):
    """Weights, statistics and modes are as they were, and so are masks if it fails."""
    net = pk.flow(chain(), flow)
    method = coarse_of(net, start=0, statistics=statistics)
    train_epoch(net, method.optimizer, 0, method)
    net[1].eval()
    before = copy.deepcopy(net.state_dict())
    method.data = [*HELD_OUT, (X, torch.zeros(2, 1, dtype=torch.long))]
    with pytest.raises(ValueError, match=r"CoarsePruning: data: expected labels \[2\], got \[2, 1\]"):
        method.end_epoch()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net.training and not net[1].training and net[2].training
    assert [conv._flow for conv in convs(net).values()] == [flow] * 3
    assert len(net._forward_hooks) == flow


def test_what_is_gone_is_zero_and_frozen():
    net = chain(bias=True)
    method = coarse_of(net, start=0, kernel_start=1)
    train(net, method.optimizer, method, 4)
    for conv in convs(net).values():
        dead = ~(conv.kernel_mask & conv.filter_mask[:, None])
        assert not conv.weight[dead].any() and not momentum(method.optimizer, conv.weight)[dead].any()
        assert not conv.bias[~conv.filter_mask].any() and torch.equal(conv.hard_mask, conv.filter_mask)
        assert conv.weight[live_kernels(conv)].all()
    for norm in norms(net).values():
        assert not norm.weight[~norm.channel_mask].any()
    small = pk.shrink(net, X).eval()
    torch.testing.assert_close(small(X), net.eval()(X))
    assert all(small.get_submodule(name).out_channels <= int(c.filter_mask.sum()) for name, c in convs(net).items())


def test_a_trained_network_is_pruned_at_once():
    net = chain()
    for options in ({}, {"example_input": None}):  # which norm is behind which filter is found out
        method = coarse_of(copy.deepcopy(net), start=-1, **options)
        assert [int((state == 2).sum()) for state in method.states.values()] == [4, 6, 5]
        assert all(int(norm.channel_mask.sum()) == norm.num_features // 2 for norm in norms(method.model).values())


@pytest.mark.parametrize("parts", [1, 3])
def test_the_data_is_gone_through_once_for_all_masks(parts, monkeypatch):
    monkeypatch.setattr(trials, "PART_BYTES", 1 if parts == 3 else 1 << 20)
    loaded = []

    def data():
        for batch in HELD_OUT:
            loaded.append(1)
            yield batch

    expected = coarse_of(chain(), start=-1)
    method = coarse_of(chain(), start=-1, data=data)
    assert len(loaded) == 3 and method.error_rates == expected.error_rates
    assert all(torch.equal(a, b) for a, b in zip(method.filters.dead, expected.filters.dead, strict=True))


def test_seeds_decide():
    dead = [torch.cat(coarse_of(chain(), start=-1, seed=seed).filters.dead) for seed in (0, 0, 1)]
    assert torch.equal(dead[0], dead[1]) and not torch.equal(dead[0], dead[2])


def test_joint_coupling_and_skip():
    net = residual()
    method = coarse_of(net, start=-1, coupling="joint", skip=["first"], round_to=4)
    assert torch.equal(net.stem.filter_mask, net.second.filter_mask) and int(net.stem.filter_mask.sum()) == 4
    assert net.first.filter_mask.all() and int(net.last.filter_mask.sum()) == 4
    train(net, method.optimizer, method, 6)
    assert net.first.kernel_mask.all() and int(live_kernels(net.last).sum()) == 8


@pytest.mark.parametrize("block", [(2, 3), (4, 1), (16, 16)])
def test_kernels_go_in_blocks_of_what_is_live(block):
    net = chain()
    coarse_of(net, start=-1, kernel_start=0, block=block).end_epoch()
    r, c = block
    for conv in convs(net).values():
        live = conv.kernel_mask[conv.filter_mask][:, conv.input_mask]
        blocks = [part for rows in live.split(r) for part in rows.split(c, 1)]
        assert all(part.all() or not part.any() for part in blocks)
        assert sum(not part.any() for part in blocks) == len(blocks) // 2


def test_blocks_of_one_kernel_are_the_default():
    default, one = chain(), chain()
    for net, options in ((default, {}), (one, {"block": [1, 1]})):
        coarse_of(net, start=-1, kernel_start=0, **options).end_epoch()
    assert all(torch.equal(default.state_dict()[name], value) for name, value in one.state_dict().items())


def test_kernels_of_groups():
    net = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))
    net = nn.Sequential(*net, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    pk.convert(net)
    data = [(torch.randn(4, 4, 8, 8), torch.arange(4))]
    method = coarse_of(net, rate=0.0, kernel_rate=0.5, start=-1, kernel_start=0, data=data, example_input=None)
    net[1].set_masks(input=torch.arange(8) < 6)
    method.end_epoch()
    assert [int(net[i].kernel_mask.sum()) for i in (0, 1, 3)] == [16, 4 + 6, 4]  # dead ones are left alone


@pytest.mark.parametrize("halving", [False, True])
@pytest.mark.parametrize("epochs", [1, 2, 4])
def test_goes_on_where_it_stopped(epochs, halving):
    net = chain()
    method = coarse_of(net, start=0, kernel_start=2, halving=halving)
    train(net, method.optimizer, method, epochs)
    states = copy.deepcopy([net.state_dict(), method.optimizer.state_dict(), method.state_dict()])
    train(net, method.optimizer, method, 2, start=epochs)
    other = chain(seed=5)
    resumed = coarse_of(other, start=0, kernel_start=2, halving=halving)
    for part, state in zip((other, resumed.optimizer, resumed), states, strict=True):
        part.load_state_dict(state)
    train(other, resumed.optimizer, resumed, 2, start=epochs)
    different = [n for n, t in net.state_dict().items() if not torch.equal(t, other.state_dict()[n])]
    assert not different
    assert resumed.history == method.history and resumed.error_rates == method.error_rates
    assert resumed.tried_on == method.tried_on and len(method.tried_on) == 2


def test_a_state_from_before_halving_loads():
    method = coarse_of(chain(), start=-1)
    state = method.state_dict()
    del state["tried_on"]
    coarse_of(chain(), start=-1, state=state)


@pytest.mark.parametrize(
    ("epochs", "expected"), [(1, (-1, 0)), (2, (-1, 0)), (3, (0, 1)), (6, (1, 3)), (30, (9, 19)), (90, (29, 59))]
)
def test_default_epochs(epochs, expected):
    method = coarse_of(chain(), epochs=epochs, masks=1)
    assert (method.start, method.kernel_start) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": None}, r"data: expected batches \(x, y\) or a function that returns them, got None"),
        ({"data": [], "start": -1}, r"data: expected batches with images in every pass \(of an iterator: .*, got none"),
        ({"data": [X], "start": -1}, r"data: expected batches \(x, y\) of tensors, got Tensor"),
        ({"masks": 0}, "masks: expected an integer from 1, got 0"),
        ({"kernel_rate": 1.0}, r"kernel_rate: expected a number in \[0, 1\), got 1.0"),
        (
            {"start": 3, "kernel_start": 3},
            r"start, kernel_start: expected -1 <= start < kernel_start < 6, got \(3, 3\)",
        ),
        ({"block": 3}, "block: expected two integers from 1, got 3"),
        ({"kernel_rate": "half"}, r"kernel_rate: expected a number in \[0, 1\), got half"),
        ({"block": (0, 1)}, r"block: expected two integers from 1, got \(0, 1\)"),
        (
            {"block": (16, 32), "kernel_rate": 0.0},
            r"block: expected none where kernel_rate is 0, which prunes filters alone, got \(16, 32\)",
        ),
        ({"prunings": 0}, "prunings: expected an integer from 1, got 0"),
        (
            {"start": 1, "prunings": 3, "kernel_start": 3},
            r"start, kernel_start: expected -1 <= start, start \+ 2 < kernel_start < 6, got \(1, 3\)",
        ),
        ({"statistics": "mine"}, "statistics: expected one of stored, batch, got 'mine'"),
        ({"halving": 3}, "halving: expected True, False or None, got 3"),
        (
            {"data": [(HELD_OUT[0][0], HELD_OUT[0][1][:3])], "start": -1},
            r"data: expected labels \[4, ...\], got \[3\]",
        ),
        ({"rate": -0.5}, r"rate: expected a number in \[0, 1\), got -0.5"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=f"CoarsePruning: {message}"):
        coarse_of(chain(), **options)


def test_an_iterator_serves_once():
    net = chain()
    method = coarse_of(net, start=0, kernel_start=1, data=iter(HELD_OUT))
    train(net, method.optimizer, method, 1)
    train_epoch(net, method.optimizer, 1, method)
    with pytest.raises(ValueError, match="data: expected batches with images in every pass"):
        method.end_epoch()


def test_less_errors_than_an_average_mask():
    """On a network that has learned something."""
    net = chain()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9)
    for _ in range(30):
        for x, y in HELD_OUT:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    method = coarse_of(net, start=-1, masks=30)
    rates = method.error_rates[0]
    assert min(rates) < sum(rates) / len(rates)


# ---- filters that go in several prunings


@pytest.mark.parametrize("start", [-1, 1])
def test_filters_go_in_several_prunings(start):
    """Of each layer the same share of what is left, in each pruning; what is gone stays gone."""
    net = chain()
    method = coarse_of(net, epochs=8, start=start, prunings=3, kernel_rate=0.0)
    gone = [int((state == 2).sum()) for state in method.states.values()]
    seen = [gone] if start == -1 else []
    before = {name: conv.filter_mask.clone() for name, conv in convs(net).items()}
    for epoch in range(5):
        train_epoch(net, method.optimizer, epoch, method)
        counts = method.end_epoch()
        seen.append([row.hard for row in counts.values()])
        assert all(not (conv.filter_mask & ~before[name]).any() for name, conv in convs(net).items())
        before = {name: conv.filter_mask.clone() for name, conv in convs(net).items()}
    shares = [1 - 0.5 ** (k / 3) for k in (1, 2, 3)]
    expected = [[int(K * share) for K in (8, 12, 10)] for share in shares]
    assert seen[start + (start == -1) :][:3] == expected
    assert seen[-1] == [4, 6, 5] and len(method.error_rates) == 3


@pytest.mark.parametrize(("halves", "layerwise"), [(True, False), (False, True)])
def test_prunings_resume(halves, layerwise):
    options = {"start": 0, "prunings": 2, "kernel_start": 3, "halving": halves, "layerwise": layerwise}
    net = chain()
    method = coarse_of(net, **options)
    train(net, method.optimizer, method, 1)
    states = copy.deepcopy([net.state_dict(), method.optimizer.state_dict(), method.state_dict()])
    train(net, method.optimizer, method, 3, start=1)
    other = chain(seed=5)
    resumed = coarse_of(other, **options)
    for part, state in zip((other, resumed.optimizer, resumed), states, strict=True):
        part.load_state_dict(state)
    train(other, resumed.optimizer, resumed, 3, start=1)
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in net.state_dict().items())
    assert resumed.error_rates == method.error_rates


# ---- successive halving

IMAGES = torch.cat([x for x, _ in batches(98, steps=64)])
MANY = [(x, x.mean((2, 3)).argmax(1)) for x in IMAGES.split(32)]  # 256 images whose labels can be learned


def learned(seed=0):
    """A network whose errors under masks differ."""
    net = chain(seed)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9)
    for x, y in MANY * 3:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (False, "stored", 1, 1, 0.5)),
        ({"preset": "paper"}, (False, "stored", 1, 1, 0.5)),
        ({"preset": "paper", "duty": 0.1}, (False, "stored", 1, 1, 0.5)),
        ({"duty": 0.1}, (True, "batch", 0, 2, 0.0)),
        ({"duty": 0.1, "epochs": 8}, (True, "batch", 0, 2, 0.0)),
        ({"duty": 0.1, "epochs": 32}, (True, "batch", 3, 2, 0.0)),
        ({"duty": 0.1, "epochs": 2}, (True, "batch", 0, 1, 0.0)),
        ({"duty": 0.1, "epochs": 8, "fine_tune": 7}, (True, "batch", -1, 1, 0.0)),
        ({"duty": 0.1, "epochs": 1}, (True, "batch", -1, 1, 0.0)),
        ({"duty": 0.1, "start": 4}, (True, "batch", 4, 1, 0.0)),
        ({"duty": 0.1, "halving": False, "kernel_rate": 0.25}, (False, "batch", 0, 2, 0.25)),
        ({"halving": True, "statistics": "batch"}, (True, "batch", 1, 1, 0.5)),
    ],
)
def test_duty_decides_what_is_left_open(options, expected):
    method = coarse_of(chain(), **({"masks": 2} | options))
    assert (method.halving, method.statistics, method.start, method.prunings, method.kernel_rate) == expected


def test_norms_of_the_batch():
    """Statistics that do not fit decide nothing."""
    rates = {}
    for name, factor in (("as trained", 1.0), ("others", 100.0)):
        net = learned()
        for norm in norms(net).values():
            norm.running_mean.mul_(factor)
        for statistics in ("stored", "batch"):
            method = coarse_of(copy.deepcopy(net), data=MANY, start=-1, statistics=statistics)
            rates[name, statistics] = method.error_rates
    assert rates["as trained", "batch"] == rates["others", "batch"] != rates["as trained", "stored"]
    assert rates["as trained", "stored"] != rates["others", "stored"]


@pytest.mark.parametrize("layerwise", [False, True])
def test_the_better_half_is_tried_on_twice_as_many(layerwise):
    options = {"data": MANY, "masks": 20, "start": -1, "layerwise": layerwise}
    method, full = (coarse_of(learned(), halving=halving, **options) for halving in (True, False))
    assert len(method.tried_on) == (3 if layerwise else 1)
    for labels in method.tried_on:  # 32, 64, 128 and 256 images; three masks are left at the end
        assert sorted(labels) == [32] * 10 + [64] * 5 + [128] * 2 + [256] * 3
    assert all(labels == [256] * 20 for labels in full.tried_on)
    for rates, labels, all_rates in zip(method.error_rates[:1], method.tried_on, full.error_rates, strict=False):
        assert [r for r, n in zip(rates, labels, strict=True) if n == 256] == [
            r for r, n in zip(all_rates, labels, strict=True) if n == 256
        ]  # the same masks are drawn, and those left are judged alike


@pytest.mark.parametrize("seed", range(3))
def test_the_winner_of_the_halving_is_among_the_best(seed):
    """On networks that answer this way or that by their masks: in the best quarter of the full judgement."""
    options = {"data": MANY, "masks": 24, "start": -1, "seed": seed}
    method, full = (coarse_of(learned(seed), halving=halving, **options) for halving in (True, False))
    left = [i for i, labels in enumerate(method.tried_on[0]) if labels == 256]
    winner = min(left, key=lambda i: method.error_rates[0][i])
    rates = full.error_rates[0]
    assert len(set(rates)) > 12 and sorted(rates).index(rates[winner]) < 6
    assert method.error_rates[0][winner] == rates[winner]
