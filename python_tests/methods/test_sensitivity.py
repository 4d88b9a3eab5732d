"""sensitivity: each layer pruned alone gives what masks set by hand give; the model stays as it was."""

import copy
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.methods import chain, convs, residual, sgd
from prunekernels.methods import GHFP, Sensitivity, recalibrate_norms, sensitivity
from prunekernels.methods.sensitivity_table import Row

GENERATOR = torch.Generator().manual_seed(0)
DATA = [(torch.randn(n, 3, 6, 6, generator=GENERATOR), torch.randint(4, (n,), generator=GENERATOR)) for n in (16, 9)]
X, Y = (torch.cat(parts) for parts in zip(*DATA, strict=True))


def trained(make=chain):
    """Norms have statistics, so that filters differ."""
    net = make()
    recalibrate_norms(net, DATA)
    return net.eval()


def by_hand(net, dead, norms):
    """Accuracy and loss with these filters masked in a copy, with the norms behind them."""
    net = copy.deepcopy(net)
    for name, rows in dead.items():
        keep = net.get_submodule(name).filter_mask.clone()
        keep[rows] = False
        net.get_submodule(name).set_masks(filter=keep)
    for name, rows in norms.items():
        keep = net.get_submodule(name).channel_mask.clone()
        keep[rows] = False
        net.get_submodule(name).set_mask(keep)
    with torch.no_grad():
        outputs = net(X)
    return float((outputs.argmax(1) == Y).float().mean()), float(F.cross_entropy(outputs, Y))


def weakest(conv, count):
    return conv.weight.detach().flatten(1).norm(dim=1).argsort()[:count]


@pytest.mark.parametrize("is_live", [False, True])
def test_values_are_those_of_masks_set_by_hand(is_live):
    net = pk.flow(trained(), is_live)
    rates = (0.25, 0.5, 0.9)
    found = sensitivity(net, DATA, rates=rates)
    losses = sensitivity(net, lambda: iter(DATA), rates=rates, loss=F.cross_entropy)
    assert (found.measure, losses.measure, found.images) == ("accuracy", "loss", 25)
    assert [row.layers for row in found.rows] == [("0",), ("3",), ("6",)]
    assert [row.filters for row in found.rows] == [8, 12, 10]
    base = by_hand(net, {}, {})
    assert (found.base, losses.base) == pytest.approx(base, abs=1e-5)
    for row, other in zip(found.rows, losses.rows, strict=True):
        (name,) = row.layers
        for i, rate in enumerate(rates):
            assert row.dead[i] == int(row.filters * rate)
            rows = weakest(net.get_submodule(name), row.dead[i])
            accuracy, loss = by_hand(net, {name: rows}, {str(int(name) + 1): rows})
            assert row.values[i] == pytest.approx(accuracy) and other.values[i] == pytest.approx(loss, abs=1e-5)
    assert len({value for row in losses.rows for value in row.values}) == 9


def test_by_the_statistics_of_each_batch():
    """As after recalibrated norms; those that are stored stay."""
    net = trained()
    before = state_of(net)
    found = sensitivity(net, [(X, Y)], rates=(0.5,), statistics="batch", loss=F.cross_entropy)
    assert same(before, state_of(net))
    rows = weakest(net[3], 6)
    keep = torch.ones(12, dtype=torch.bool)
    keep[rows] = False
    net[3].set_masks(filter=keep)
    net[4].set_mask(keep)
    with torch.no_grad():
        assert found.rows[1].values[0] == pytest.approx(float(F.cross_entropy(net.train()(X), Y)), abs=1e-5)


def test_joint_coupling_prunes_what_meets_together():
    net = trained(residual)
    found = sensitivity(net, DATA, rates=(0.5,), coupling="joint")
    assert len(found.rows) == 3
    row = next(row for row in found.rows if "stem" in row.layers)
    assert set(row.layers) == {"stem", "second"} and row.dead == (4,)
    scores = sum(
        w / w.mean()
        for w in (net.get_submodule(name).weight.detach().flatten(1).norm(dim=1) for name in ("stem", "second"))
    )
    rows = scores.argsort()[:4]
    dead = {"stem": rows, "second": rows}
    assert row.values[0] == pytest.approx(by_hand(net, dead, {"stem_norm": rows, "second_norm": rows})[0])


def test_saved_multiply_adds():
    """Those of the layer and of what reads it."""
    found = sensitivity(trained(), DATA, rates=(0.5,), example_input=X[:2])
    first, second, third = 36 * 8 * 27, 36 * 12 * 72, 36 * 10 * 108
    head = 10 * 4  # a linear layer, once an image
    saved = [(first + second) / 2, (second + third) / 2, (third + head) / 2]
    assert [row.saved[0] * (first + second + third + head) for row in found.rows] == pytest.approx(saved)


def state_of(net):
    masks = {
        n: [getattr(m, k).clone() for k in ("filter_mask", "hard_mask", "input_mask", "kernel_mask")]
        for n, m in convs(net).items()
    }
    channel = {n: [m.channel_mask.clone()] for n, m in net.named_modules() if isinstance(m, pk.MaskedBatchNorm2d)}
    values = {n: [t.detach().clone()] for n, t in net.state_dict(keep_vars=True).items()}
    modes = {n: [torch.tensor([m.training, getattr(m, "_flow", False)])] for n, m in net.named_modules()}
    return {"masks": masks, "norms": channel, "values": values, "modes": modes}


def same(a, b):
    return all(
        torch.equal(x, y) for kind in a for name in a[kind] for x, y in zip(a[kind][name], b[kind][name], strict=True)
    )


@pytest.mark.parametrize("coupling", ["independent", "joint"])
def test_the_model_stays_as_it_was(coupling):
    net = trained(residual).train()
    net.first_norm.eval()
    pk.flow(net)
    method = GHFP(net, sgd(net), epochs=4, duty=0)
    for _ in range(2):
        method.end_epoch()
    net.first.set_masks(kernel=torch.rand(6, 8) < 0.7)
    before, hooks = state_of(net), len(net._forward_hooks)
    sensitivity(net, DATA, rates=(0.5, 0.75), coupling=coupling)
    assert same(before, state_of(net)) and len(net._forward_hooks) == hooks
    with pytest.raises(ValueError, match="expected 3 channels"):
        sensitivity(net, [DATA[0], (X[:, :1], Y)], rates=(0.5,))
    assert same(before, state_of(net))


def test_what_is_dead_already_stays_dead():
    """It counts: a rate below the dead share costs nothing."""
    net = trained()
    keep = torch.arange(12) % 2 > 0
    net[3].set_masks(filter=keep)
    net[4].set_mask(keep)
    found = sensitivity(net, DATA, rates=(0.25, 0.5, 0.75), skip=["0", "6"])
    (row,) = found.rows
    assert row.dead == (6, 6, 9) and row.values[:2] == (found.base, found.base) and row.saved[:2] == (0.0, 0.0)
    assert set(found.left_out) == {"0", "6"}
    live = keep.nonzero().flatten()
    rows = live[net[3].weight.detach().flatten(1).norm(dim=1)[live].argsort()[:3]]
    assert row.values[2] == pytest.approx(by_hand(net, {"3": rows}, {"4": rows})[0])


def test_data_is_loaded_once():
    loads = []

    def load():
        for batch in DATA:
            loads.append(len(batch[1]))
            yield batch

    found = sensitivity(trained(), load(), rates=(0.5, 0.75), metric=lambda outputs, y: -F.cross_entropy(outputs, y))
    assert loads == [16, 9] and found.measure == "metric" and found.base < 0


def test_parts_give_the_same_numbers(monkeypatch):
    whole = sensitivity(trained(), DATA, rates=(0.5,))
    monkeypatch.setattr("prunekernels.methods.layer_sensitivity.PART_BYTES", 1)
    assert sensitivity(trained(), DATA, rates=(0.5,)).to_dict() == whole.to_dict()


def test_small_layers_keep_a_filter():
    net = nn.Sequential(nn.Conv2d(3, 1, 3), nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    pk.convert(net)
    found = sensitivity(net, [(X, Y % 2)], rates=(0.5, 0.9))
    assert [row.dead for row in found.rows] == [(0, 0), (1, 1)]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"rates": (0.0, 0.5)}, r"rates: expected rising numbers in \(0, 1\), got \(0.0, 0.5\)"),
        ({"rates": (0.5, 0.2)}, "rates: expected rising numbers"),
        ({"rates": ()}, "rates: expected rising numbers"),
        ({"coupling": "both"}, "coupling: expected one of independent, joint, got 'both'"),
        ({"statistics": "new"}, "statistics: expected one of stored, batch, got 'new'"),
        ({"criterion": "taylor"}, "criterion: expected a function of weights, or l1, l2 or geometric_median"),
        ({"metric": F.mse_loss, "loss": F.mse_loss}, "loss: expected None, where there is a metric"),
        ({"skip": ["9"]}, "skip: expected names of MaskedConv2d layers, got '9'"),
        ({"skip": ["0", "3", "6"]}, "model: expected some layers left to prune, got none"),
        ({"data": []}, "data: expected batches with images, got none"),
        ({"data": [X]}, r"data: expected batches \(x, y\), x a tensor, got Tensor"),
        ({"data": [(X, Y[:3])]}, r"data: expected labels \[25\], or a metric, got \[3\]"),
        ({"data": [(X, None)]}, r"data: expected labels \[25\], or a metric, got NoneType"),
    ],
)
def test_what_is_refused(options, error):
    with pytest.raises(ValueError, match=f"sensitivity: {error}"):
        sensitivity(trained(), **({"data": DATA} | options))


def test_plain_networks_are_refused():
    with pytest.raises(ValueError, match="sensitivity: model: expected MaskedConv2d layers .*, got none"):
        sensitivity(nn.Conv2d(3, 4, 3), DATA)


def test_its_rates_are_those_of_a_method():
    """Each group is pruned at the rate that its row has, 0 included."""
    net = trained(residual)
    found = sensitivity(net, [(X, Y)], coupling="joint", statistics="batch")
    wanted = found.rates(0.05) | {"last": 0.0}
    method = GHFP(net, sgd(net), 0.5, 1, coupling="joint", example_input=X[:2], rates=wanted)
    counts = method.end_epoch()
    assert {name: c.hard for name, c in counts.items()} == {
        name: int(net.get_submodule(name).out_channels * rate) for name, rate in wanted.items()
    }


# ---- the result

FOUND = Sensitivity(
    "accuracy",
    0.9,
    (0.25, 0.5, 0.75),
    (
        Row(("stem",), 8, (2, 4, 6), (0.89, 0.7, 0.6), (0.1, 0.2, 0.3)),
        Row(("a", "b", "c"), 4, (1, 2, 3), (0.91, 0.905, 0.8), (0.2, 0.4, 0.6)),
    ),
    1000,
    {},
)


def test_rates_for_a_target():
    assert FOUND.rates(0.01) == {"stem": 0.25, "a": 0.5, "b": 0.5, "c": 0.5}
    assert FOUND.rates(0) == {"stem": 0.0, "a": 0.5, "b": 0.5, "c": 0.5}
    assert FOUND.rates(1) == dict.fromkeys(("stem", "a", "b", "c"), 0.75)
    rising = Sensitivity("loss", 0.5, (0.5,), (Row(("stem",), 8, (4,), (0.7,), (0.2,)),), 10, {})
    assert rising.rates(0.1) == {"stem": 0.0} and rising.rates(0.3) == {"stem": 0.5}
    with pytest.raises(ValueError, match="Sensitivity.rates: drop: expected a number, at least 0, got -1"):
        FOUND.rates(-1)


def test_tables():
    assert str(FOUND).splitlines()[0] == "accuracy as it is: 0.9000 of 1000 images" and repr(FOUND) == str(FOUND)
    assert str(FOUND).splitlines()[2:] == [
        "stem                8  0.8900  0.7000  0.6000",
        "a and 2 more        4  0.9100  0.9050  0.8000",
    ]
    assert FOUND.table().splitlines() == [
        "| layer | filters | 0.25 | 0.5 | 0.75 |",
        "| --- | --- | --- | --- | --- |",
        "| stem | 8 | 0.8900 (10%) | 0.7000 (20%) | 0.6000 (30%) |",
        "| a and 2 more | 4 | 0.9100 (20%) | 0.9050 (40%) | 0.8000 (60%) |",
    ]


def test_plain_values():
    values = FOUND.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["rows"][1]["layers"] == ["a", "b", "c"] and values["tried"] == [0.25, 0.5, 0.75]


def test_the_picture(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    FOUND.plot(tmp_path / "s.png")
    assert image.imread(tmp_path / "s.png").shape[1] > 300


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'Sensitivity.plot: expected matplotlib: pip install "prunekernels\[cli\]"'):
        FOUND.plot(tmp_path / "s.png")


def test_progress_counts_each_image_once_for_each_trial():
    net, told = chain(), []
    data = [(torch.randn(n, 3, 6, 6), torch.randint(4, (n,))) for n in (4, 3)]
    sensitivity(net, data, rates=(0.25, 0.5), progress=lambda *counts: told.append(counts))
    done, trials = zip(*told, strict=True)
    assert set(trials) == {7} and list(done) == sorted(done) and done[-1] == 7 * 7
