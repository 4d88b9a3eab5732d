"""How many filters of each unit go: shares of layers, of all filters, and of the multiply-adds."""

import time
from itertools import pairwise

import pytest
import torch

import prunekernels as pk
from cases.methods import EVERY, chain, ranking, residual, run, sgd, train
from prunekernels import methods
from prunekernels.graph import Group, narrow
from prunekernels.graph.analysis import ChannelAnalysis
from prunekernels.graph.layer_uses import any_weights
from prunekernels.graph.trace import trace
from prunekernels.methods import GHFP, PGP, SFP, CoarsePruning, PruneWhileTraining
from prunekernels.methods.budgets import Budget
from prunekernels.train.models import build

IMAGES = torch.randn(2, 3, 6, 6)


def counts(rankings, shares, kind, round_to=1, rates=None, floor=None):
    units = [Group(r.width, {f"{i}": torch.arange(r.width)}, {}, {}) for i, r in enumerate(rankings)]
    own = [None] * len(units) if rates is None else rates
    budget = Budget("SFP", kind, units, shares[0], own, round_to=round_to, floor=floor)
    return budget.counts(rankings, lambda rate: (rate, *shares[1:]))


def test_each_layer_keeps_a_filter():
    assert counts([ranking([1, 2, 3, 4, 5, 6], members=[range(6), (0, 1)])], (0.9,), "layer") == [4]
    assert counts([ranking([0.0])], (0.99,), "layer") == [0]


def test_layer_budget():
    rankings = [ranking([1.0] * 10), ranking([100.0] * 5)]
    assert counts(rankings, (0.5,), "layer") == [5, 2]
    assert counts(rankings, (0.5, 0.5), "layer") == [2, 1]
    assert counts(rankings, (0.5,), "layer", round_to=4) == [2, 1]
    assert counts(rankings, (0.5, 0.5), "layer", rates=[None, 0.9]) == [2, 2]
    assert counts(rankings, (0.5,), "layer", rates=[0.0, None]) == [0, 2]


@pytest.mark.parametrize(("rate", "wanted"), [(0.5, {8: 4, 16: 8, 32: 16}), (0.25, {8: 6, 16: 12, 32: 24})])
@pytest.mark.parametrize("cls", [GHFP, PGP, PruneWhileTraining, CoarsePruning])
def test_layer_budget_of_layers_that_meet_with_fewer_channels(cls, rate, wanted):
    """The shortcuts of this network pad channels, so that its three stages meet in one group."""
    torch.manual_seed(0)
    net = build("resnet20", num_classes=10, width=0.5)
    pk.convert(net)
    images = torch.randn(2, 3, 16, 16)
    options = {"data": [(images, torch.tensor([0, 1]))], "masks": 4, "kernel_rate": 0.0} if cls is CoarsePruning else {}
    method = cls(net, sgd(net), rate, 2, coupling="joint", example_input=images, steps_per_epoch=1, **options)
    assert max(len(unit.layers) for unit in method.units) == 10  # stem and the last of each block
    for _ in range(2):
        torch.nn.functional.cross_entropy(net(images), torch.tensor([0, 1])).backward()
        method.opt.step()
        method.step()
        method.end_epoch()
    assert {(c.live, c.live + c.hard) for c in method.history[-1].values()} == {(n, K) for K, n in wanted.items()}
    small = pk.count_flops(pk.shrink(net, images), images).dense
    plain = build("resnet20", num_classes=10, width=0.5 * (1 - rate))
    assert small == pk.count_flops(plain, images).dense


def test_global_budget_compares_scores_over_their_mean():
    rankings = [ranking([1, 1, 1, 1]), ranking([10, 10, 90, 90])]
    assert counts(rankings, (0.25,), "global") == [0, 2]
    assert counts(rankings, (0.75,), "global") == [3, 3]
    assert counts(rankings, (0.99,), "global") == [3, 3]


def test_global_budget_counts_hard_dead_first():
    rankings = [ranking([9, 1, 1, 1], hard=(0,)), ranking([1, 2, 3, 4])]
    assert counts(rankings, (0.125,), "global") == [1, 0]
    assert counts(rankings, (0.25,), "global") == [1, 1]


def test_global_budget_of_zeros():
    assert counts([ranking([0, 0, 0]), ranking([0, 0, 0])], (0.5,), "global") == [2, 1]


def test_floor_keeps_a_share_of_each_unit():
    rankings = [ranking([1, 1, 1, 1, 96]), ranking([1, 2, 3, 4, 5])]
    assert counts(rankings, (0.4,), "global") == [4, 0]
    assert counts(rankings, (0.4,), "global", floor=0.41) == [2, 2]  # three of five stay
    assert counts(rankings, (0.4,), "global", floor=0.6) == [2, 2]


def test_rates_are_fixed_and_the_others_meet_a_global_budget():
    rankings = [ranking([1, 1, 1, 1]), ranking([10, 10, 90, 90]), ranking([1, 2, 3, 4])]
    assert counts(rankings, (0.5,), "global", rates=[0.25, None, None]) == [1, 2, 3]
    assert counts(rankings, (0.5, 0.5), "global", rates=[0.5, None, None]) == [1, 2, 0]
    assert counts(rankings, (0.5,), "global", rates=[0.25, None, None], floor=0.5) == [1, 2, 2]


# ---- of multiply-adds


def flops_method(net, images, cls=PruneWhileTraining, rate=0.5, epochs=1, **options):
    return cls(net, sgd(net), rate, epochs, budget="flops", example_input=images, **options)


def multiply_adds(net, images, capsys):
    small = pk.shrink(net, images)
    capsys.readouterr()
    return pk.count_flops(small, images).dense


def network(name, **options):
    torch.manual_seed(0)
    net = build(name, 10, **options)
    pk.convert(net)
    return net


@pytest.mark.parametrize("rate", [0.3, 0.7])
@pytest.mark.parametrize(
    ("name", "coupling"), [("vgg_small", "joint"), ("resnet20", "joint"), ("resnet20", "independent")]
)
def test_the_small_network_has_what_was_counted(name, coupling, rate, capsys):
    net, images = network(name, width=0.5), torch.randn(1, 3, 16, 16)
    method = flops_method(net, images, rate=rate, coupling=coupling, criterion="random")
    method.end_epoch()
    dense, left = pk.count_flops(net, images).dense, multiply_adds(net, images, capsys)
    costs, dead = method._budget.costs, torch.cat(method.filters.dead).numpy()
    assert (costs.dense, costs.saved(dead)) == (dense, dense - left)
    assert (0.94 - rate) * dense <= left <= (1 - rate) * dense  # no filter more than is needed


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "densenet40"])
def test_large_networks_have_what_was_counted(name):
    """Over 2 s: traces. They are counted as shrink does before it makes the small network."""
    net, images = network(name, width=0.25), torch.randn(1, 3, 16, 16)
    method = flops_method(net, images, rate=0.5, coupling="joint", criterion="random")
    method.end_epoch()
    traced = trace("test", net, images, "none")
    analysis = ChannelAnalysis(traced, any_weights(net, traced), constants=False)
    left = narrow.multiply_adds(analysis, narrow.kept_in_forward(analysis, literal=False))
    costs, dead = method._budget.costs, torch.cat(method.filters.dead).numpy()
    assert costs.dense - costs.saved(dead) == left <= 0.5 * costs.dense


def test_as_few_filters_as_possible_go():
    """One filter less of the last unit in the order, and too little is saved."""
    net = chain()
    method = flops_method(net, IMAGES, rate=0.4)
    rankings = method._rankings()
    counts, costs = method._counts(rankings, 0), method._budget.costs
    dead = [r.first(count) for r, count in zip(rankings, counts, strict=True)]
    assert costs.saved(torch.cat(dead).numpy()) >= 0.4 * costs.dense

    def turn(r, i):
        """When the filter at this place of the order goes: by its score over the sum of those that are then left."""
        scores = r.scores[r.order].tolist()
        return scores[i] * r.width / sum(scores[i:])

    gone = {u: turn(r, count - 1) for u, (r, count) in enumerate(zip(rankings, counts, strict=True)) if count}
    assert max(gone.values()) <= min(turn(r, count) for r, count in zip(rankings, counts, strict=True))
    counts[max(gone, key=lambda u: gone[u])] -= 1
    dead = [r.first(count) for r, count in zip(rankings, counts, strict=True)]
    assert costs.saved(torch.cat(dead).numpy()) < 0.4 * costs.dense


def test_costs_of_layers_that_stay():
    """Skipped and linear layers cost all of their filters, times what they read."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 12, 1), torch.nn.Conv2d(12, 6, 1),
        torch.nn.ConvTranspose2d(6, 4, 2, 2), torch.nn.Conv2d(4, 8, 3), torch.nn.Flatten(), torch.nn.Linear(800, 5),
    )  # fmt: skip
    pk.convert(net)
    method = flops_method(net, IMAGES, rate=0.3, skip=["1"])
    method.end_epoch()
    dead, costs = torch.cat(method.filters.dead), method._budget.costs
    assert costs.saved(dead.numpy()) >= 0.3 * costs.dense
    pixels, left = 36, {name: counts.live for name, counts in method.history[0].items()}
    expected = pixels * (27 * left["0"] + left["0"] * 12 + 12 * left["2"])
    expected += 144 * left["2"] * left["3"] + 100 * 9 * left["3"] * left["4"]
    images = len(IMAGES)
    assert costs.dense - costs.saved(dead.numpy()) == images * (expected + 100 * left["4"] * 5)


@pytest.mark.parametrize("name", EVERY)
def test_every_method_saves_its_rate(name, capsys):
    net = residual()
    options = {"coupling": "joint", "budget": "flops", "example_input": IMAGES, "duty": 0.5, "steps_per_epoch": 4}
    _, _, method = run(EVERY[name], 4, net=net, total=4, **options)
    dense, left = pk.count_flops(net, IMAGES).dense, multiply_adds(net.eval(), IMAGES, capsys)
    assert 0.4 * dense <= left <= 0.5 * dense
    assert all(counts.soft == 0 for counts in method.history[-1].values())


def test_the_schedule_is_of_multiply_adds():
    net = network("vgg_small", width=0.5)
    method = flops_method(net, torch.randn(1, 3, 16, 16), rate=0.6, epochs=6, start=0, end=3, period=1)
    costs, saved = method._budget.costs, []
    for _ in range(6):
        method.end_epoch()
        saved.append(costs.saved(torch.cat(method.filters.dead).numpy()) / costs.dense)
    assert saved == pytest.approx([0.15, 0.3, 0.45, 0.6, 0.6, 0.6], abs=0.03)
    assert all(got >= share for got, share in zip(saved, [0.15, 0.3, 0.45, 0.6], strict=False))


def test_hard_filters_of_ghfp_save_their_part():
    net = network("vgg_small", width=0.5)
    method = GHFP(net, sgd(net), 0.5, 4, budget="flops", example_input=torch.randn(1, 3, 16, 16), hard=0.5)
    method.end_epoch()
    saved = [
        method._budget.costs.saved(torch.cat(masks).numpy()) for masks in (method.filters.dead, method.filters.hard)
    ]
    assert [s / method._budget.costs.dense for s in saved] == pytest.approx([0.5, 0.25], abs=0.03)
    hard = [mask.clone() for mask in method.filters.hard]
    for _ in range(2):
        method.end_epoch()
        assert all(bool(now[was].all()) for now, was in zip(method.filters.hard, hard, strict=True))


def test_a_resumed_training_decides_the_same():
    options = {"coupling": "joint", "budget": "flops", "example_input": IMAGES, "rates": {"last": 0.2}, "total": 4}
    options |= {"duty": 0.5, "steps_per_epoch": 4}
    net, _, method = run(GHFP, 4, net=residual(), **options)
    part, optimizer, first = run(GHFP, 2, net=residual(), **options)
    state = first.state_dict()
    first.detach()
    second = GHFP(part, optimizer, 0.5, 4, state=state, **{k: v for k, v in options.items() if k != "total"})
    train(part, optimizer, second, 2, 2)
    assert second.history == method.history
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), part.state_dict().values(), strict=True))


def test_coarse_pruning_draws_masks_of_a_budget():
    net = chain()
    data = [(torch.randn(8, 3, 6, 6), torch.randint(4, (8,)))]
    options = {"data": data, "masks": 3, "start": -1, "kernel_rate": 0}
    method = flops_method(net, IMAGES, CoarsePruning, rate=0.4, epochs=2, **options)
    costs = method._budget.costs
    assert 0.4 <= costs.saved(torch.cat(method.filters.hard).numpy()) / costs.dense < 0.55


@pytest.mark.parametrize("round_to", [2, 4])
def test_round_to_holds_within_the_budget(round_to):
    net = network("resnet20", width=0.5)
    images = torch.randn(1, 3, 16, 16)
    method = flops_method(net, images, rate=0.4, coupling="joint", round_to=round_to)
    method.end_epoch()
    assert all(int((~dead).sum()) % round_to == 0 for dead in method.filters.dead)
    costs = method._budget.costs
    assert 0.4 <= costs.saved(torch.cat(method.filters.dead).numpy()) / costs.dense < 0.5


def test_floor_holds_within_the_budget():
    net = chain()
    net[3].weight.data[:10] *= 1e-3
    shares = {}
    for floor in (0.0, 0.5):
        method = flops_method(net, IMAGES, rate=0.5, floor=floor)
        counts = method._counts(method._rankings(), 0)
        shares[floor] = [1 - count / r.width for count, r in zip(counts, method._rankings(), strict=True)]
        method.detach()
    assert min(shares[0.0]) < 0.5 <= min(shares[0.5])


def test_rates_stay_within_the_budget():
    net = network("vgg_small", width=0.5)
    images = torch.randn(1, 3, 16, 16)
    names = [name for name, layer in net.named_modules() if isinstance(layer, pk.MaskedConv2d)]
    method = flops_method(net, images, rates={names[0]: 0.0, names[-1]: 0.25})
    method.end_epoch()
    counts = method.history[0]
    assert counts[names[0]].live == 16 and counts[names[-1]].live == 48
    costs = method._budget.costs
    assert 0.5 <= costs.saved(torch.cat(method.filters.dead).numpy()) / costs.dense < 0.53


def test_a_decision_is_fast():
    """Over the units of a ResNet-50: 53 convolutions, 26,560 filters."""
    widths = [64, *([64, 64, 256] * 3), *([128, 128, 512] * 4), *([256, 256, 1024] * 6), *([512, 512, 2048] * 3)]
    net = torch.nn.Sequential(*(torch.nn.Conv2d(C, K, 1) for C, K in pairwise([3, *widths])))
    pk.convert(net)
    method = flops_method(net, torch.randn(1, 3, 1, 1), criterion="random")
    rankings, seconds = method._rankings(), []
    for _ in range(3):
        begun = time.process_time()
        method._counts(rankings, 0)
        seconds.append(time.process_time() - begun)
    assert min(seconds) < 0.1


# ---- what cannot be

MOST, LEAST = "rate: expected at most 0.", "rate: expected at least 0."
BAD = {
    "layers": ({"rate": 0.9, "skip": ["3"]}, rf"{MOST}\d+ with budget='flops', as floor=0.1, .* keep .*, got 0.9"),
    "floor": ({"floor": 0.9}, rf"{MOST}\d+ with budget='flops', as floor=0.9, .*got 0.5"),
    "rates over": ({"rate": 0.2, "rates": {"*": 0.5}}, f"{LEAST}7.* as rates alone take .*got 0.2"),
    "rates under": ({"rates": {"[03]": 0.1}}, f"{MOST}4.* got 0.5"),
    "no input": ({"example_input": None}, "example_input: expected an input, from which budget='flops' counts .*None"),
    "no norms": ({"norms": False}, "norms: expected True with budget='flops'.*, got False"),
    "floor 2": ({"floor": 2}, "floor: expected a share .*, got 2"),
    "floor of layers": ({"budget": "layer", "floor": 0.1}, "floor: expected a share .*, got 0.1"),
    "floor of all": ({"budget": "global", "floor": 0.6}, f"{MOST}3.*budget='global', as floor=0.6, .* the filters"),
    "rates of all": ({"budget": "global", "rates": {"*": 0.1}}, f"{MOST}0.*budget='global'.*, got 0.5"),
    "rates over all": ({"budget": "global", "rate": 0.1, "rates": {"3": 0.5}}, f"{LEAST}2.*, got 0.1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_budgets(case):
    options, error = BAD[case]
    net = chain()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    with pytest.raises(ValueError, match=f"SFP: {error}"):
        SFP(net, sgd(net), **{"rate": 0.5, "epochs": 9, "budget": "flops", "example_input": IMAGES} | options)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_the_largest_rate_that_an_error_names_is_possible():
    net = chain()
    with pytest.raises(ValueError, match="expected at most") as error:
        flops_method(net, IMAGES, rate=0.99)
    most = float(str(error.value).split("at most ")[1].split()[0])
    method = flops_method(net, IMAGES, rate=most)
    method.end_epoch()
    costs = method._budget.costs
    assert costs.saved(torch.cat(method.filters.dead).numpy()) >= most * costs.dense
    method.detach()
    with pytest.raises(ValueError, match="expected at most"):
        flops_method(net, IMAGES, rate=most + 0.002)


def test_pgp_with_off_by_one_is_judged_by_its_largest_share():
    net = chain()
    options = {"rate": 0.7, "epochs": 2, "fine_tune": 0, "floor": 0.4}
    flops_method(net, IMAGES, PGP, **options).detach()
    with pytest.raises(ValueError, match="PGP: rate: expected at most .* got 0.7"):
        flops_method(net, IMAGES, PGP, off_by_one=True, **options)


def test_filters_of_several_layers_may_keep_a_budget_from_being_met():
    """In independent coupling a channel stays until all of its filters are dead, which scores decide."""
    net = residual()
    net.stem.weight.data[4:], net.second.weight.data[:4] = 1e-3, 1e-3
    method = flops_method(net, IMAGES, rate=0.6, floor=0.5, criterion="l2")
    with pytest.warns(UserWarning, match="PruneWhileTraining: budget: 0.600 of the multiply-adds were to go, 0.* do"):
        method.end_epoch()
    assert [int(dead.sum()) for dead in method.filters.dead] == [4, 3, 4, 2]


def test_csgd_refuses_it():
    net = chain()
    with pytest.raises(
        ValueError, match="CSGD: budget: expected layer or a dict, as clusters do not compare, got 'flops'"
    ):
        methods.CSGD(net, sgd(net), example_input=IMAGES, budget="flops")
