import copy
import io
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import prunekernels as pk
from cases.layers import bools
from cases.networks import (
    EXACT,
    NETWORKS,
    Basic,
    Head,
    assert_same_function,
    conv_norm,
    images,
    mask_at_random,
    trained,
)
from prunekernels.graph import coupled_groups, tidy_masks
from prunekernels.graph.shrink import shrink

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
KEEP = bools(1, 0, 1, 1)
FORMS = [
    pytest.param({"form": "module"}, id="module"),
    pytest.param({"form": "graph"}, id="graph"),
    pytest.param({"fold_constants": True}, id="folded"),
]


def convs(small):
    return {name: m for name, m in small.named_modules() if isinstance(m, nn.Conv2d)}


def masked(net, norms=True):
    net = net.double().eval()
    pk.convert(net, norms=norms)
    return net


@pytest.mark.parametrize("args", FORMS)
def test_random_masks(fuzz_seed, args):
    for name in list(NETWORKS)[fuzz_seed % 5 :: 5]:
        net = mask_at_random(trained(name, fuzz_seed), fuzz_seed)
        small = shrink(net, images(), **args)
        assert_same_function(net, small, images(5))


@pytest.mark.parametrize("args", FORMS)
@pytest.mark.parametrize("name", EXACT)
def test_integers_are_exact(name, args):
    net = mask_at_random(trained(name, exact=True), 1)
    x = images(3, exact=True)
    assert torch.equal(shrink(net, x, **args)(x), net(x))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("args", FORMS)
@pytest.mark.parametrize("kept", [0.0, 0.15, 1.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_hardly_any_and_all(name, kept, args):
    net = mask_at_random(trained(name), 3, kept=kept, norms=0.5)
    assert_same_function(net, shrink(net, images(), **args), images(3))


def test_tidied_network_shrinks_to_the_same():
    net = mask_at_random(trained("basic"), 5)
    sizes = [p.shape for p in shrink(net, images()).parameters()]
    tidy_masks(net, images())
    assert [p.shape for p in shrink(net, images()).parameters()] == sizes


@pytest.mark.parametrize("form", ["module", "graph"])
@pytest.mark.parametrize("tracks", [True, False])
def test_norms_without_factors(tracks, form):
    """A plain norm needs a weight and a bias of zero to give zeros for dead channels."""
    norm = nn.BatchNorm2d(4, affine=False, track_running_stats=tracks)
    net = masked(nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Conv2d(4, 5, 1)))
    net.train()(X)
    net.eval()[0].set_masks(filter=KEEP)
    net[1].set_mask(KEEP)
    small, optimizer = shrink(net, X, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), form=form)
    assert len(optimizer.param_groups[0]["params"]) == 4
    assert_same_function(net, small, X)
    assert [c.out_channels for c in convs(small).values()] == [3, 5] and not net[1].affine


# What is removed


def test_chain_narrows_on_both_sides():
    net = masked(nn.Sequential(conv_norm(3, 4), nn.Conv2d(4, 5, 3, padding=1), nn.Flatten(), nn.Linear(5 * 64, 2)))
    net[0][0].set_masks(filter=KEEP)
    net[0][1].set_mask(KEEP)
    net[1].set_masks(filter=bools(0, 1, 1, 0, 1))
    small = shrink(net, X)
    first, second = small.get_submodule("0.0"), small.get_submodule("1")
    assert (first.in_channels, first.out_channels) == (3, 3) == (second.in_channels, second.out_channels)
    assert small.get_submodule("0.1").num_features == 3
    assert small.get_submodule("3").in_features == 3 * 64


def test_unread_filter_is_gone():
    net = masked(nn.Sequential(conv_norm(3, 4), nn.Conv2d(4, 2, 1)))
    net[1].set_masks(input=KEEP)
    assert shrink(net, X).get_submodule("0.0").out_channels == 3


def test_single_kernels_stay_as_zeros():
    net = masked(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)))
    kernels = torch.eye(4, dtype=torch.bool)
    kernels[0, 2] = True
    kernels[2, 2] = kernels[3, 3] = False  # filters 2 and 3 are constants, no filter reads channel 3
    net[1].set_masks(kernel=kernels)
    small = shrink(net, X, fold_constants=True)
    assert small.get_submodule("1").weight.shape == (2, 3, 3, 3)
    assert torch.equal(small.get_submodule("1").weight[:, :, 0, 0] != 0, kernels[:2, :3])


def test_partners_widen_to_their_union():
    net = masked(nn.Sequential(conv_norm(3, 4), Basic(4, 4), Head(4)))
    net[0][0].set_masks(filter=bools(1, 1, 0, 0))
    net[0][1].set_mask(bools(1, 1, 0, 0))
    net[1].second[0].set_masks(filter=bools(0, 1, 1, 0))
    net[1].second[1].set_mask(bools(0, 1, 1, 0))
    small = shrink(net, X)
    assert small.get_submodule("0.0").out_channels == small.get_submodule("1.second.0").out_channels == 3
    assert small.get_submodule("1.first.0").in_channels == 3 == small.get_submodule("2.fc").in_features


def test_dead_branch_disappears():
    net = masked(nn.Sequential(conv_norm(3, 4), Basic(4, 4), Head(4)))
    for layer in (net[1].first[0], net[1].second[0]):
        layer.set_masks(filter=torch.zeros(4, dtype=torch.bool))
    net[1].second[1].set_mask(torch.zeros(4, dtype=torch.bool))
    small = shrink(net, X, form="graph")
    assert list(convs(small)) == ["0.0"]
    assert_same_function(net, small, X)


def test_constant_is_folded_where_nothing_pads():
    net = masked(nn.Sequential(conv_norm(3, 4), nn.Conv2d(4, 2, 3, bias=False)), norms=False)
    nn.init.ones_(net[0][1].bias)
    net[0][0].set_masks(filter=KEEP)
    small = shrink(net, X, fold_constants=True)
    assert small.get_submodule("0.0").out_channels == 3
    assert small.get_submodule("1").bias is not None
    assert_same_function(net, small, X)


@pytest.mark.parametrize("fold", [False, True])
def test_constant_is_kept_where_something_pads(fold):
    net = masked(nn.Sequential(conv_norm(3, 4), nn.Conv2d(4, 2, 3, padding=1)), norms=False)
    nn.init.ones_(net[0][1].bias)
    net[0][0].set_masks(filter=KEEP)
    small = shrink(net, X, fold_constants=fold)
    assert small.get_submodule("0.0").out_channels == 4
    assert_same_function(net, small, X)


def test_constant_that_relu_makes_zero_is_gone():
    net = masked(nn.Sequential(conv_norm(3, 4), nn.Conv2d(4, 2, 3, padding=1)), norms=False)
    nn.init.constant_(net[0][1].bias, -1.0)
    net[0][0].set_masks(filter=KEEP)
    assert shrink(net, X, fold_constants=True).get_submodule("0.0").out_channels == 3


@pytest.mark.parametrize("form", ["module", "graph"])
def test_joint_masks_narrow_the_padded_stream(form):
    net = trained("type_a")
    for group in coupled_groups(net, images()):
        group.set_masks(net, torch.arange(group.width) % 3 != 0)
    small = shrink(net, images(), form=form)
    assert {name: c.out_channels for name, c in convs(small).items() if "second" in name} == {
        "1.second.0": 2, "2.second.0": 6, "3.second.0": 6, "4.second.0": 10
    }  # fmt: skip
    assert_same_function(net, small, images(3))


def test_outputs_have_full_width():
    net = masked(nn.Sequential(conv_norm(3, 4), conv_norm(4, 4)), norms=False)
    net[1][0].set_masks(filter=KEEP)
    nn.init.ones_(net[1][1].bias)
    small = shrink(net, X, fold_constants=True)
    assert small.get_submodule("1.0").out_channels == 3
    assert_same_function(net, small, X)


class Outputs(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.a, self.b, self.make = conv_norm(3, 4), conv_norm(4, 4), make

    def forward(self, x):
        a = self.a(x)
        return self.make(a, self.b(a))


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


def nested(a, b):
    return {"a": a, "b": [b, a.mean()]}


def ordered(a, b):
    return OrderedDict(out=a, aux=(b, None))


def values_and_indices(a, b):
    return torch.return_types.max((a, b))


@pytest.mark.parametrize("form", ["module", "graph"])
@pytest.mark.parametrize("make", [Pair, nested, ordered, values_and_indices])
def test_structured_outputs(make, form):
    net = masked(Outputs(make))
    net.a[0].set_masks(filter=KEEP)
    net.a[1].set_mask(KEEP)
    small, want = shrink(net, X, form=form), net(X)
    buffer = io.BytesIO()
    torch.save(small, buffer)
    buffer.seek(0)
    for other in (small, copy.deepcopy(small), torch.load(buffer, weights_only=False)):
        got = other(X)
        assert type(got) is type(want)
        torch.testing.assert_close(pytree.tree_leaves(got), pytree.tree_leaves(want))


def test_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x, y):
            return self.c(self.a(x) + self.b(y))

    net, y = masked(Two()), torch.randn(2, 2, 8, 8, dtype=torch.float64)
    net.a.set_masks(filter=KEEP)
    net.b.set_masks(filter=KEEP)
    small = shrink(net, (X, y))
    assert small.c.in_channels == 3
    torch.testing.assert_close(small(X[:1], y[:1]), net(X[:1], y[:1]))


# Parameters between layers, and layers that are used twice


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.scale, self.relu = nn.Conv2d(3, 4, 1), nn.Parameter(torch.randn(4, 1, 1)), nn.PReLU(4)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.last(self.relu(self.conv(x)) * self.scale)


def test_parameters_between_layers_shrink():
    net = masked(LayerScale())
    net.conv.set_masks(filter=KEEP)
    small = shrink(net, X)
    assert small.scale.shape == (3, 1, 1) and small.relu.weight.shape == (3,)
    assert_same_function(net, small, X)


class Twice(nn.Module):
    """One layer, or one weight in two layers, on different inputs."""

    def __init__(self, tied):
        super().__init__()
        self.first, self.again, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1) if tied else self.again
        self.second.weight = self.again.weight

    def forward(self, x):
        x = F.relu(self.norm(self.again(self.first(x))))
        return self.last(F.relu(self.norm(self.second(x))))


@pytest.mark.parametrize("tied", [False, True], ids=["module", "weight"])
def test_layer_used_twice(tied):
    net = masked(Twice(tied))
    for layer in {net.again, net.second, net.first}:
        layer.set_masks(filter=KEEP)
    net.norm.set_mask(KEEP)
    small = shrink(net, X)
    assert small.again.weight is small.get_submodule("second" if tied else "again").weight
    assert small.again.weight.shape == (3, 3, 3, 3)
    assert_same_function(net, small, X)
    net.first.set_masks(filter="all")  # wider in one use than in the other
    assert_same_function(net, shrink(net, X), X)


def test_weight_shared_with_a_function():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return F.conv_transpose2d(self.b(self.a(x)), self.b.weight)

    net = masked(Net())
    net.a.set_masks(filter=KEEP)
    small = shrink(net, X)
    assert small.b.weight.shape == (4, 4, 1, 1)
    assert_same_function(net, small, X)


# Bad input, and what it leaves behind


def test_wrong_small_network_is_named(monkeypatch):
    from prunekernels.graph.rules.layers import WeightRule

    net = masked(nn.Sequential(conv_norm(3, 4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)), norms=False)
    nn.init.ones_(net[0][1].bias)
    net[0][0].set_masks(filter=KEEP)
    monkeypatch.setattr(WeightRule, "folded", lambda self, flow, node, values: torch.zeros(len(node.meta["val"][0])))
    with pytest.raises(RuntimeError, match=r"shrink: 1 \(aten.conv2d.default\): expected .* got a difference of"):
        shrink(net, X, fold_constants=True)


def test_failing_forward_names_the_layer():
    net = masked(nn.Sequential(conv_norm(3, 4), nn.Sequential(nn.ReLU(), nn.Conv2d(5, 2, 1))))
    with pytest.raises(ValueError, match=r"shrink: example_input: .* got an error in 1\.1 \(Conv2d\): "):
        shrink(net, X)


@pytest.mark.parametrize("shape", [(2, 3, 8, 10), (2, 3, 4, 4), (2, 4, 8, 8)])
def test_another_size_is_an_error(shape):
    net = masked(nn.Sequential(conv_norm(3, 4), nn.Flatten(), nn.Linear(256, 2)))
    small = shrink(net, X, form="graph")
    with pytest.raises(
        AssertionError, match="expected size.*, as in the example given to shrink; give it an example of"
    ):
        small(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("batch", [1, 2])
def test_any_batch(batch):
    net = trained("basic")
    small = shrink(net, images(batch))
    for size in (1, 2, 7):
        assert_same_function(net, small, images(size))


def test_batch_that_the_network_fixes():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(x) + torch.arange(int(x.shape[0])).view(-1, 1, 1, 1)

    net, x = masked(Fixed()), X[:1]
    small = shrink(net, x, form="graph")
    assert torch.equal(small(x), net(x))
    with pytest.raises(AssertionError, match="expected size 1 in dimension 0, as in the example given to shrink"):
        small(X)


def test_untraceable_network():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(x) if x.numpy().sum() > 0 else x

    with pytest.raises(ValueError, match="shrink: model: expected a network that torch.export can trace, got:"):
        shrink(Branches(), X.float())


def test_model_stays_as_it_is(capsys):
    net = mask_at_random(trained("basic"), 2).train()
    before = copy.deepcopy(net.state_dict())
    small = shrink(net, images())
    assert net.training and small.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    own = {p.data_ptr() for p in net.parameters()}
    assert not own & {p.data_ptr() for p in small.parameters()}
    line = capsys.readouterr().out
    assert line.startswith("shrink: ") and line.count("\n") == 1 and "max abs difference" in line


def test_nan_in_dead_weights_is_gone():
    net = masked(nn.Sequential(conv_norm(3, 4), nn.Conv2d(4, 2, 1)))
    net[0][0].set_masks(filter=KEEP)
    net[0][1].set_mask(KEEP)
    with torch.no_grad():
        net[0][0].weight[1] = torch.nan
        net[1].weight[:, 1] = torch.nan
    net[1].set_masks(input=KEEP)
    assert shrink(net, X)(X).isfinite().all()


def test_channels_last_stays():
    net = masked(nn.Sequential(conv_norm(3, 4), nn.Conv2d(4, 2, 3))).to(memory_format=torch.channels_last)
    net[0][0].set_masks(filter=KEEP)
    assert shrink(net, X).get_submodule("1").weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("root", [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(3)], ids=["conv", "norm"])
def test_root_layer(root):
    net = masked(root)
    if isinstance(net, nn.Conv2d):
        net.set_masks(filter=KEEP)
    assert_same_function(net, shrink(net, X), X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    net = mask_at_random(trained("plain"), 1).to(dtype)
    small = shrink(net, images().to(dtype))
    assert small(images().to(dtype)).dtype == dtype
