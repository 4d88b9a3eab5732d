"""save_small, load_small: the loaded network is the saved one, to the bit, in eval mode and in training."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import prunekernels as pk
from cases.blocks import BLOCKS, block
from cases.deploy import (
    REFERENCE,
    assert_same_network,
    outputs_of,
    round_trip,
    small_network,
    small_reference,
    step,
)
from cases.networks import NETWORKS

WITH_ONE_SIZE = {"positions_added", "biases"}  # their forward takes no other
NOT_TRAINED = {"synced_norm"}  # SyncBatchNorm trains on GPUs alone


@pytest.mark.parametrize("form", ["module", "graph"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, form, tmp_path):
    small, x = small_network(name, form)
    loaded = round_trip(small, tmp_path / "net")
    assert type(loaded) is not type(small) or form == "graph"
    assert_same_network(small, loaded, x, sizes=name not in WITH_ONE_SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCE)
def test_reference_networks(name, tmp_path):
    small, x = small_reference(name)
    assert_same_network(small, round_trip(small, tmp_path / "net"), x)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", sorted(set(BLOCKS) - NOT_TRAINED))
def test_blocks(name, tmp_path):
    torch.manual_seed(0)
    net, x = block(name).float(), torch.randn(3, 3, 6, 6)
    small = pk.shrink(net, x, form="module")
    loaded = round_trip(small, tmp_path / "net")
    own = {key: value for key, value in small.state_dict().items()}
    assert all(torch.equal(own[key], value) for key, value in loaded.state_dict().items())
    for images in (x, x[:1]):
        for got, want in zip(outputs_of(loaded, images), outputs_of(small.eval(), images), strict=True):
            assert torch.equal(got, want)


# ---- what trains otherwise than it evaluates


class Functional(nn.Module):
    """Dropout as a function, a norm that averages all batches, a shared layer, frozen and own parameters."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6, momentum=None)
        self.scale = nn.Parameter(torch.rand(6, 1, 1))
        self.twice, self.head = nn.Conv2d(6, 6, 1), nn.Linear(6, 4)
        self.register_buffer("mean", torch.rand(3, 1, 1), persistent=False)
        self.conv.bias.requires_grad_(False)

    def forward(self, x, more=None):
        x = self.norm(self.conv(x - self.mean)) * self.scale
        x = F.dropout(self.twice(F.relu(self.twice(x), inplace=True)), 0.3, self.training)
        return self.head(x.mean((2, 3))) + (0 if more is None else more)


class Paths(nn.Module):
    """Drops a path, and has a head that only trains."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.path, self.head, self.more = nn.Conv2d(6, 6, 1), nn.Linear(6, 4), nn.Linear(6, 2)

    def forward(self, x):
        x = self.norm(self.conv(x))
        path = self.path(x)
        if self.training:
            path = path * x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(0.5) / 0.5
        x = (x + path).mean((2, 3))
        return {"out": self.head(x), "more": self.more(x)} if self.training else {"out": self.head(x)}


class Buffers(nn.Module):
    """Computes from buffers, and changes them in training; a norm of another class, which counts its batches."""

    class Norm(nn.BatchNorm2d):
        def forward(self, x):
            if self.training:
                self.num_batches_tracked.add_(1)
            mean, var = self.running_mean, self.running_var
            return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, self.momentum, self.eps)

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), Buffers.Norm(4)
        self.register_buffer("scale", torch.full((4, 1, 1), 0.5))

    def forward(self, x):
        x = self.norm(self.conv(x)) * (1 + self.scale.sqrt())
        if self.training:
            self.scale.mul_(0.9)
        return x


@pytest.mark.parametrize("make", [Functional, Paths, Buffers])
def test_training_forward(make, tmp_path):
    torch.manual_seed(0)
    net, x = make(), torch.randn(3, 3, 8, 8)
    loaded = round_trip(net, tmp_path / "net", x)
    assert_same_network(net, loaded, x)
    for given in (net, loaded):  # the second step reads what the first has changed
        step(given, x)
    assert_same_network(net, loaded, x)
    loaded.train()
    assert not torch.equal(next(iter(outputs_of(loaded, x))), next(iter(outputs_of(loaded.eval(), x))))


class NormOfItsOwn(nn.BatchNorm2d):
    """As timm's: a norm that ends in an activation."""

    def __init__(self, width):
        super().__init__(width, momentum=0.2)
        self.act = nn.LeakyReLU(0.2)

    def forward(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)
        mean, var = self.running_mean, self.running_var
        return self.act(F.batch_norm(x, mean, var, self.weight, self.bias, self.training, self.momentum, self.eps))


def test_norm_of_another_class_is_a_layer_again(tmp_path):
    net, x = nn.Sequential(nn.Conv2d(3, 4, 1), NormOfItsOwn(4), nn.Conv2d(4, 3, 1)), torch.randn(3, 3, 4, 4)
    loaded = round_trip(net, tmp_path / "net", x)
    assert_same_network(net, loaded, x)
    assert type(loaded.get_submodule("1")) is nn.BatchNorm2d and isinstance(loaded, fx.GraphModule)
    pk.convert(loaded)
    assert isinstance(loaded.get_submodule("1"), pk.MaskedBatchNorm2d)


def test_norm_that_is_read_elsewhere_stays(tmp_path):
    class Twice(NormOfItsOwn):
        def forward(self, x):
            return super().forward(x) + F.batch_norm(x, self.running_mean, self.running_var, eps=0.5)

    net, x = nn.Sequential(nn.Conv2d(3, 4, 1), Twice(4), Twice(4)), torch.randn(3, 3, 4, 4)
    net[2] = net[1]
    assert_same_network(net, round_trip(net, tmp_path / "net", x), x)


def test_graph_of_its_own_for_training_survives_copies(tmp_path):
    torch.manual_seed(0)
    net, x = Paths(), torch.randn(3, 3, 8, 8)
    loaded = copy.deepcopy(round_trip(net, tmp_path / "net", x)).double()
    assert_same_network(copy.deepcopy(net).double(), loaded, x.double())
    again = round_trip(loaded, tmp_path / "again", x.double())
    assert_same_network(net.double(), again, x.double())


def test_flags_of_tensors(tmp_path):
    net = Functional()
    loaded = round_trip(net, tmp_path / "net", torch.randn(2, 3, 8, 8))
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in net.named_parameters()
    }
    assert loaded.state_dict().keys() == net.state_dict().keys() and "mean" in dict(loaded.named_buffers())


def test_tied_tensors_and_channels_last(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1))
    net[2].weight = net[0].weight
    net = net.to(memory_format=torch.channels_last)
    loaded = round_trip(net, tmp_path / "net", torch.randn(2, 3, 8, 8))
    assert loaded.get_parameter("2.weight") is loaded.get_parameter("0.weight")
    assert loaded.get_parameter("0.weight").is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype, tmp_path):
    small, x = small_network("basic", dtype=torch.float32)
    small = small.to(dtype)
    loaded = round_trip(small, tmp_path / "net", x.to(dtype))
    assert torch.equal(loaded(x.to(dtype)), small.eval()(x.to(dtype)))
    assert {p.dtype for p in loaded.parameters()} == {dtype}


# ---- arguments and outputs


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, batch, scale=1.0, *, shift=None):
        out = self.a(batch["image"]) * scale + self.b(batch["pair"][1])
        return {"out": out if shift is None else out + shift, "pair": (out, [out.mean(), None, 3])}


@pytest.mark.parametrize("form", ["forward", "graph"])
def test_nested_arguments_and_outputs(form, tmp_path):
    torch.manual_seed(0)
    batch = {"image": torch.randn(2, 3, 4, 4), "pair": (torch.zeros(1), torch.randn(2, 3, 4, 4))}
    example = pk.Example(batch, scale=2.0, shift=torch.randn(4, 1, 1))
    net = Several()
    if form == "graph":
        pk.convert(net)
        net = pk.shrink(net.eval(), example, form="graph")
    loaded = round_trip(net, tmp_path / "net", None if form == "graph" else example)
    got, want = example.call(loaded), example.call(net.eval())
    assert torch.equal(got["out"], want["out"]) and torch.equal(got["pair"][1][0], want["pair"][1][0])
    assert got["pair"][1][1:] == [None, 3] and isinstance(got["pair"], tuple)


def test_forward_that_fx_cannot_follow_becomes_a_graph(tmp_path):
    class Odd(nn.Sequential):
        def forward(self, x):
            for _ in range(x.shape[2] // 4):
                x = super().forward(x)
            return x

    net, x = Odd(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)), torch.randn(2, 3, 8, 8)
    loaded = round_trip(net, tmp_path / "net", x)
    assert torch.equal(loaded(x), net.eval()(x))
    with pytest.raises(AssertionError, match="expected"):
        loaded(torch.randn(2, 3, 12, 12))


def test_hook_that_changes_outputs(tmp_path):
    """The symbolic trace does not see it, a run does."""
    net, x = nn.Sequential(nn.Conv2d(3, 3, 1)), torch.randn(2, 3, 4, 4)
    net[0].register_forward_hook(lambda module, args, out: out * 2)
    loaded = round_trip(net, tmp_path / "net", x)
    assert torch.equal(loaded(x), net(x)) and not loaded.get_submodule("0")._forward_hooks


def test_without_the_class_and_without_pickle(tmp_path):
    """In another process, which has no module to import it from, and in which unpickling is an error."""
    net, x = Functional().eval(), torch.randn(2, 3, 8, 8)
    pk.save_small(net, tmp_path / "net", x, formats=["safetensors"])
    torch.save({"x": x, "out": net(x).detach()}, tmp_path / "want.pt")
    code = f"""
import pickle, torch, prunekernels as pk
torch.set_num_threads({torch.get_num_threads()})
want = torch.load({str(tmp_path / "want.pt")!r})
def refuse(*args, **kwargs): raise RuntimeError("unpickled")
pickle.load = pickle.loads = pickle.Unpickler = torch.load = refuse
loaded = pk.load_small({str(tmp_path / "net")!r})
assert torch.equal(loaded(want["x"]), want["out"])
assert type(loaded).__mro__[1].__module__.startswith("torch.fx"), type(loaded).__mro__
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


# ---- what comes after


def test_loaded_network_is_saved_again(tmp_path):
    small, x = small_network("excite")
    loaded = round_trip(small, tmp_path / "one")
    assert_same_network(small, round_trip(loaded, tmp_path / "two"), x)


def test_integers_among_the_arguments(tmp_path):
    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.table = nn.Conv2d(3, 4, 1), nn.Embedding(5, 4)

        def forward(self, x, which):
            return self.conv(x) + self.table(which)[:, :, None, None]

    net, given = Chosen().eval(), (torch.randn(2, 3, 4, 4), torch.tensor([4, 1]))
    loaded = round_trip(net, tmp_path / "net", given)
    again = round_trip(loaded, tmp_path / "again")
    assert torch.equal(again(*given), net(*given))


def test_loaded_network_is_pruned_again(tmp_path):
    small, x = small_network("inverted")
    loaded = round_trip(small, tmp_path / "net")
    assert isinstance(loaded, fx.GraphModule)
    pk.convert(loaded)
    for group in pk.coupled_groups(loaded, x):
        group.set_masks(loaded, torch.arange(group.width) > 0)
    smaller = pk.shrink(loaded.eval(), x)
    torch.testing.assert_close(smaller(x), loaded(x), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in small.parameters())


def test_optimizer_state_fits(tmp_path):
    small, x = small_network("basic")
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1, momentum=0.9)
    small.train()(x).square().sum().backward()
    optimizer.step()
    loaded = round_trip(small, tmp_path / "net").train()
    its = torch.optim.SGD(loaded.parameters(), lr=0.1, momentum=0.9)
    its.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, opt in ((small, optimizer), (loaded, its)):
        opt.zero_grad()
        torch.manual_seed(0)
        net.train()(x).square().sum().backward()
        opt.step()
    state = loaded.state_dict()
    assert all(torch.equal(state[key], value) for key, value in small.state_dict().items())


def test_odd_names(tmp_path):
    net = nn.Sequential()
    net.add_module("block-1", nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    x = torch.randn(2, 3, 4, 4)
    assert_same_network(net, round_trip(net, tmp_path / "net", x), x)


def test_small_stays_as_it_was(tmp_path):
    net, x = Paths(), torch.randn(3, 3, 8, 8)
    net.train()
    net.norm.eval()
    before = copy.deepcopy(net.state_dict())
    names = set(vars(net))
    round_trip(net, tmp_path / "net", x)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    assert net.training and not net.norm.training and set(vars(net)) == names


# ---- refused


class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return torch.linalg.svdvals(self.conv(x))


def test_unknown_operation():
    with pytest.raises(ValueError, match=r"save_small: small: expected a network that a graph can describe; .*svd"):
        pk.save_small(Hidden(), "never", torch.randn(2, 3, 4, 4))


def test_forward_of_its_own_in_training_that_no_graph_holds(tmp_path):
    """Not even fx follows it, and a run in eval mode does not see it."""

    class Odd(nn.Sequential):
        def forward(self, x):
            if self.training and x.shape[2] > 2:
                x = x + 1
            return super().forward(x)

    with pytest.raises(ValueError, match="a forward that torch.fx cannot follow .*; in the graph form: another output"):
        pk.save_small(Odd(nn.Conv2d(3, 3, 1)), tmp_path / "net", torch.randn(2, 3, 4, 4))
    assert not list(tmp_path.iterdir())


def test_masked_network():
    with pytest.raises(ValueError, match="expected plain layers, as of pk.shrink, got masks in 0"):
        pk.save_small(nn.Sequential(pk.MaskedConv2d(3, 3, 1)), "never", torch.randn(2, 3, 4, 4))


def test_example_is_missing():
    with pytest.raises(ValueError, match="example_input: expected what the network takes"):
        pk.save_small(nn.Sequential(nn.Conv2d(3, 3, 1)), "never")


@pytest.mark.parametrize("example", [torch.randn(2, 4, 4, 4), (torch.randn(2, 3, 4, 4), 1)])
def test_example_that_the_network_does_not_take(example, tmp_path):
    with pytest.raises(ValueError, match="save_small: example_input: expected an input that the network takes"):
        pk.save_small(nn.Sequential(nn.Conv2d(3, 3, 1)), tmp_path / "net", example)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("formats", [(), "pt2", ["pt2", "tflite"]])
def test_formats(formats):
    with pytest.raises(ValueError, match="formats: expected some of safetensors, pt2, onnx, got"):
        pk.save_small(nn.Conv2d(3, 3, 1), "never", torch.randn(2, 3, 4, 4), formats=formats)
