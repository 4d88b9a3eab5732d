"""C-SGD beside its matrices written out, merging beside the network before it, FPAGL's options."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.merging import NETS, Padded, X, csgd, made, outputs, randomized
from cases.methods import STEPS, batches, chain, convs, norms, residual, sgd, train, train_epoch
from prunekernels.methods import CSGD, FPAGL
from prunekernels.methods.clusters import even, kmeans

# ---- clusters


@pytest.mark.parametrize("clustering", [kmeans, even])
@pytest.mark.parametrize(("rows", "count"), [(1, 1), (5, 5), (8, 1), (12, 5), (40, 13)])
def test_no_cluster_is_empty(clustering, rows, count):
    ids = clustering(torch.randn(rows, 3, 3, 3), count, torch.Generator())
    assert ids.shape == (rows,) and ids.unique().tolist() == list(range(count))


def test_kmeans_of_equal_rows_fills_all_clusters():
    assert len(kmeans(torch.ones(6, 4), 4, torch.Generator()).unique()) == 4


def test_kmeans_finds_what_is_apart():
    truth = torch.tensor([0, 1, 2, 1, 0, 2, 2, 0, 1, 0])
    rows = 10 * torch.eye(3, 20)[truth] + torch.randn(10, 20)
    ids = kmeans(rows, 3, torch.Generator())
    assert torch.equal(ids[:, None] == ids, truth[:, None] == truth)


def test_kmeans_is_a_fixed_point_and_repeats():
    rows = torch.randn(30, 7, dtype=torch.float64)
    ids = kmeans(rows, 6, torch.Generator().manual_seed(1))
    means = torch.stack([rows[ids == c].mean(0) for c in range(6)])
    assert torch.equal(torch.cdist(rows, means).argmin(1), ids)
    assert torch.equal(kmeans(rows, 6, torch.Generator().manual_seed(1)), ids)


# ---- the gradient


def matrices(ids, decay, strength):
    """The published Gamma and Lambda, entry by entry."""
    N = len(ids)
    gamma, lamda = torch.zeros(N, N, dtype=torch.float64), torch.zeros(N, N, dtype=torch.float64)
    for i in range(N):
        m = sum(int(ids[k] == ids[i]) for k in range(N))
        for j in range(N):
            if ids[i] == ids[j]:
                gamma[i, j] = 1 / m
                lamda[i, j] = decay + strength - strength / m if i == j else -strength / m
    return gamma, lamda


@pytest.mark.parametrize("clusters", ["kmeans", "even"])
def test_three_epochs_equal_the_matrices(clusters):
    net = randomized(chain(bias=True, dtype=torch.float64))
    literal = copy.deepcopy(net)
    decay, strength = 1e-2, 0.3
    method = csgd(net, sgd(net, nesterov=True, weight_decay=decay), epochs=10, strength=strength, clusters=clusters)
    train(net, method.optimizer, method, 3, dtype=torch.float64)

    ids = {}
    for group, leader in zip(method.merge_groups, method.leaders, strict=True):
        (conv,), (norm,) = group.filters, group.norms
        ids |= {f"{name}.{p}": leader for name in (conv, norm) for p in ("weight", "bias")}
    factors = {n: matrices(i, decay, strength if n in ("0.weight", "3.weight", "6.weight") else 0.1 * strength)
               for n, i in ids.items()}  # fmt: skip
    fc = [p for name, p in literal.named_parameters() if name not in ids]
    rest = [p for name, p in literal.named_parameters() if name in ids]
    groups = [{"params": rest, "weight_decay": 0}, {"params": fc, "weight_decay": decay}]
    optimizer = torch.optim.SGD(groups, 0.05, 0.9, nesterov=True)
    for epoch in range(3):
        for x, y in batches(epoch, torch.float64):
            optimizer.zero_grad()
            F.cross_entropy(literal(x), y).backward()
            for name, p in literal.named_parameters():
                if name in factors:
                    gamma, lamda = factors[name]
                    w, g = (t.reshape(len(p), -1) for t in (p.detach(), p.grad))
                    p.grad = (gamma @ g + lamda @ w).view_as(p)
            optimizer.step()
    for (name, p), q in zip(net.named_parameters(), literal.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("net", ["residual", "padded", "concatenated"])
def test_deviation_shrinks_by_one_less_lr_times_decay_and_strength(net):
    net = randomized(NETS[net]().double())
    lr, decay, strength = 0.02, 0.1, 3.0
    method = csgd(net, sgd(net, lr, momentum=0, weight_decay=decay), strength=strength)
    rows = method._clustered_tensors(method.leaders)
    parameters = [row for row in rows if isinstance(row.tensor, nn.Parameter)]

    def deviations():
        return [deviation(row.tensor.detach(), row.ids) for row in parameters]

    for x, y in batches(0, torch.float64):
        before = deviations()
        method.optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        method.optimizer.step()
        for row, old, new in zip(parameters, before, deviations(), strict=True):
            factor = 1 - lr * (decay + (strength if row.tensor.dim() > 1 else 0.1 * strength))
            torch.testing.assert_close(new, factor * old, rtol=1e-9, atol=1e-13)


def deviation(tensor, ids):
    mean = tensor.clone()
    for cluster in ids[ids >= 0].unique():
        mean[ids == cluster] = tensor[ids == cluster].mean(0)
    return tensor - mean


def test_a_masked_optimizer_does_the_same():
    nets = [chain(), chain()]
    for net, make in zip(nets, (torch.optim.SGD, pk.optim.MaskedSGD), strict=True):
        method = csgd(net, make(net.parameters(), 0.05, 0.9, weight_decay=1e-2))
        train(net, method.optimizer, method, 4)
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q)


# ---- merging


@pytest.mark.parametrize("name", NETS)
def test_merge_and_trim_are_exact(name):
    net = randomized(NETS[name]())
    method = csgd(net)
    train_epoch(net, method.optimizer, 0, method)
    assert max(method.deviations().values()) > 1e-2
    method.collapse()
    assert max(method.deviations().values()) < 1e-6
    before = outputs(net)
    method.merge()
    small = pk.shrink(net, X, fold_constants=True).eval()
    for y in (outputs(net), small(X)):
        torch.testing.assert_close(y, before, rtol=1e-5, atol=1e-5)
    for layer, conv in convs(net).items():
        live = int(conv.filter_mask.sum())
        assert live == (conv.out_channels + 1) // 2
        assert small.get_submodule(layer).out_channels == live
        assert torch.equal(conv.hard_mask, conv.filter_mask) and not conv.weight[~conv.filter_mask].any()


def test_equal_filters_stay_equal_and_merged_ones_train_on():
    net = chain()
    method = csgd(net, epochs=3)
    method.collapse()
    train(net, method.optimizer, method, 2)
    assert max(method.deviations().values()) < 1e-6
    before = outputs(net)
    method.merge()
    torch.testing.assert_close(outputs(net), before, rtol=1e-5, atol=1e-5)
    train(net, method.optimizer, method, 3)
    assert [tuple(counts) for counts in method.history[-1].values()] == [(4, 0, 4, 0), (6, 0, 6, 0), (5, 0, 5, 0)]
    assert not any(conv.weight[~conv.filter_mask].any() for conv in convs(net).values())
    assert not any(norm.weight[~norm.channel_mask].any() for norm in norms(net).values())


def test_the_first_filter_of_a_cluster_stays():
    net = chain()
    method = csgd(net, clusters="even", epochs=1)
    weight = net[3].weight.detach().clone()
    columns = net[6].weight.detach().clone()
    method.end_epoch()
    assert method.merged and method.states["3"].tolist() == [0, 2] * 6
    assert torch.equal(net[3].weight[0], torch.cat((weight[0, 0:1] + weight[0, 1:2], weight[0, 1:2] * 0,
        weight[0, 2:3] + weight[0, 3:4], weight[0, 3:4] * 0, weight[0, 4:5] + weight[0, 5:6], weight[0, 5:6] * 0,
        weight[0, 6:7] + weight[0, 7:8], weight[0, 7:8] * 0)))  # fmt: skip
    torch.testing.assert_close(net[6].weight[0, ::2], columns[0, ::2] + columns[0, 1::2])


def test_clusters_are_those_of_the_layer_nearest_to_the_input():
    """Here the stem and the projection, though a block's last layer comes before the projection."""
    method = csgd(made(Padded), clusters=lambda rows, count, generator: even(rows.flip(0), count, generator))
    layers = {group.layers[0]: group for group in method.merge_groups}
    assert layers.keys() == {"stem", "inner", "project"}
    assert layers["stem"].layers == ["stem", "a", "b"]
    assert [c.tolist() for c in layers["stem"].classes()] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    seen = []
    net = made(Padded)
    csgd(net, clusters=lambda rows, count, generator: seen.append(rows) or even(rows, count, generator))
    expected = [net.stem.weight, net.a.weight[4:], net.inner.weight, net.project.weight]
    assert len(seen) == 4 and all(any(torch.equal(rows, e) for rows in seen) for e in expected)


def test_independent_leaves_filters_that_meet_alone():
    method = csgd(residual(), coupling="independent")
    assert list(method.layers) == ["first", "last"]
    assert method.left_out == {"stem": "it meets others", "second": "it meets others"}


class Adds(nn.Module):
    """Its first filters meet an input, the second ones a factor of each channel's own, the third leave."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(C, K, 1) for C, K in ((3, 3), (3, 8), (8, 8), (8, 6)))
        self.prelu = nn.PReLU(8)

    def forward(self, x):
        x = self.prelu(self.b(self.a(x) + x))
        return self.d(F.relu(self.c(x))).mean((2, 3))


def test_what_cannot_be_merged_is_left_out():
    method = csgd(made(Adds))
    assert list(method.layers) == ["c"] and set(method.left_out) == {"a", "b", "d"}
    assert method.left_out["a"] == method.left_out["b"] == "merging its filters would change outputs"
    assert method.left_out["d"] == "its channels are outputs of the network (see prune_outputs)"


def test_round_to_and_skip():
    method = csgd(residual(), round_to=4, rate=0.7, skip=["last"], epochs=1)
    method.end_epoch()
    assert {name: counts.live for name, counts in method.history[-1].items()} == {"stem": 4, "second": 4, "first": 4}


def test_start_puts_clusters_off():
    net, plain = chain(), chain()
    method = csgd(net, start=0)
    optimizer = sgd(plain)
    train(net, method.optimizer, method, 1)
    train_epoch(plain, optimizer, 0)
    assert all(map(torch.equal, net.parameters(), plain.parameters()))
    assert method.leaders is not None and not method.merged
    train(net, method.optimizer, method, 1, start=1)
    train_epoch(plain, optimizer, 1)
    assert not torch.equal(net[0].weight, plain[0].weight)


# ---- FPAGL


def test_all_options_off_is_csgd():
    nets = [chain(), chain()]
    train(nets[0], (method := csgd(nets[0])).optimizer, method, 3)
    off = {"taylor": False, "adaptive": None, "collapse": None}
    train(nets[1], (method := csgd(nets[1], cls=FPAGL, **off)).optimizer, method, 3)
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))


@pytest.mark.parametrize("adaptive", ["filter", "element", None])
@pytest.mark.parametrize("taylor", [False, True])
def test_gradients_of_fpagl(taylor, adaptive):
    net = chain(dtype=torch.float64)
    method = csgd(net, sgd(net, momentum=0, weight_decay=0), cls=FPAGL, taylor=taylor, adaptive=adaptive, strength=0.3)
    importance = torch.zeros(12, dtype=torch.float64)
    ids = next(rows.ids for rows in method._clustered if rows.tensor is net[3].weight)
    for x, y in batches(0, torch.float64):
        method.optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        w, g = net[3].weight.detach().clone(), net[3].weight.grad.clone()
        importance += (w * g).sum((1, 2, 3)).abs()
        expected = torch.empty_like(g)
        for i in range(12):
            members = (ids == ids[i]).nonzero().flatten()
            share = importance[members] if taylor else torch.ones(len(members), dtype=torch.float64)
            inward = (share.view(-1, 1, 1, 1) * w[members]).sum(0) / share.sum() - w[i]
            pulled = g[members].mean(0) - 0.3 * inward
            if adaptive is None:
                expected[i] = pulled
            elif adaptive == "filter":
                expected[i] = g[i] if (-g[i] * inward).sum() >= 0 else pulled
            else:
                expected[i] = torch.where(-g[i] * inward >= 0, g[i], pulled)
        method.optimizer.step()
        alone = torch.bincount(ids)[ids] == 1  # where rounding decides between equal gradients
        torch.testing.assert_close(net[3].weight.grad, torch.where(alone.view(-1, 1, 1, 1), g, expected))


@pytest.mark.parametrize("options", [{}, {"taylor": False}, {"adaptive": "element"}, {"adaptive": None}], ids=str)
def test_fpagl_collapses_and_merges_exactly(options):
    net = chain()
    method = csgd(net, cls=FPAGL, epochs=4, **options)
    train(net, method.optimizer, method, 2)
    assert not method.collapsed and max(method.deviations().values()) > 1e-2
    train(net, method.optimizer, method, 1, start=2)
    assert method.collapsed and max(method.deviations().values()) < 1e-6
    train_epoch(net, method.optimizer, 3, method)
    before = outputs(net)
    method.end_epoch()
    assert method.merged
    torch.testing.assert_close(outputs(net), before, rtol=1e-5, atol=1e-5)


def test_collapse_puts_filters_on_weighted_centres():
    net = chain()
    method = csgd(net, cls=FPAGL, clusters="even", collapse=0.0)
    train_epoch(net, method.optimizer, 0, method)
    weight, importance = net[0].weight.detach().clone(), method.importance[net[0].weight]
    method.end_epoch()
    centre = (importance[:2].view(2, 1, 1, 1) * weight[:2]).sum(0) / importance[:2].sum()
    torch.testing.assert_close(net[0].weight[0], centre)
    assert torch.equal(net[0].weight[0], net[0].weight[1])


# ---- checkpoints and bad input


@pytest.mark.parametrize(("cls", "epochs"), [(CSGD, 1), (FPAGL, 1), (FPAGL, 3), (CSGD, 4)])
def test_goes_on_where_it_stopped(cls, epochs):
    net = chain()
    method = csgd(net, cls=cls, epochs=4)
    train(net, method.optimizer, method, epochs)
    states = copy.deepcopy([net.state_dict(), method.optimizer.state_dict(), method.state_dict()])
    train(net, method.optimizer, method, 2, start=epochs)
    other = chain(seed=5)
    resumed = csgd(other, cls=cls, epochs=4)
    for part, state in zip((other, resumed.optimizer, resumed), states, strict=True):
        part.load_state_dict(state)
    train(other, resumed.optimizer, resumed, 2, start=epochs)
    different = [n for n, t in net.state_dict().items() if not torch.equal(t, other.state_dict()[n])]
    assert not different and resumed.history == method.history and resumed.steps == 0 < STEPS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"example_input": None}, "CSGD: example_input: expected an input, as merging needs the graph, got None"),
        ({"clusters": "rings"}, "CSGD: clusters: expected one of kmeans, even or a function, got 'rings'"),
        ({"strength": "much"}, "CSGD: strength: expected a number, at least 0, or auto, got much"),
        ({"strength": -1}, "CSGD: strength: expected a number, at least 0, or auto, got -1"),
        ({"start": 2}, "CSGD: start: expected an epoch from -1 to 1, got 2"),
        ({"budget": "global"}, "CSGD: budget: expected layer or a dict, as clusters do not compare, got 'global'"),
        ({"rate": 1.0}, r"CSGD: rate: expected a number in \[0, 1\), got 1.0"),
        ({"clusters": lambda rows, count, generator: rows[:, 0, 0, 0]}, "CSGD: clusters: expected 4 clusters of 8"),
        ({"cls": FPAGL, "adaptive": "layer"}, "FPAGL: adaptive: expected filter, element or None, got 'layer'"),
        ({"cls": FPAGL, "collapse": 2}, r"FPAGL: collapse: expected a share of the epochs in \[0, 1\] or None, got 2"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        csgd(chain(), **options)


def test_merging_before_there_are_clusters():
    method = csgd(chain(), start=0)
    with pytest.raises(ValueError, match="CSGD: start: expected an epoch that is over, before a merge, got 0"):
        method.merge()


def test_nothing_to_merge():
    net = nn.Sequential(nn.Conv2d(3, 4, 1))
    pk.convert(net)
    with pytest.raises(ValueError, match="CSGD: model: expected layers whose filters can be merged, got"):
        csgd(net, prune_outputs=True)
    with pytest.raises(
        ValueError, match="CSGD: model: expected some layers left to prune, got none: 0: its channels are"
    ):
        csgd(net)


def test_detached_gradients_are_left_alone():
    net, plain = chain(), chain()
    method, optimizer = csgd(net), sgd(plain)
    method.detach()
    train_epoch(net, method.optimizer, 0)
    train_epoch(plain, optimizer, 0)
    assert all(map(torch.equal, net.parameters(), plain.parameters()))
