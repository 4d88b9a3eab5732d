"""torch.compile in live mode: compiled code runs in masked mode, and what is eager around it may pass live tensors."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import prunekernels as pk
from cases.compiled import CHANGES, assert_same_step, network, random_masks
from prunekernels.live import LiveTensor


@pytest.fixture(autouse=True)
def _reset():
    torch._dynamo.reset()


class Eager(nn.Module):
    """A part that torch.compile leaves alone."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    @torch.compiler.disable
    def forward(self, x):
        return self.part(x)


class Broken(nn.Module):
    """A part with a graph break."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        x = x * 1
        torch._dynamo.graph_break()
        return self.part(x)


def compile_part(net, name, **args):
    parent, _, last = name.rpartition(".")
    setattr(net.get_submodule(parent), last, torch.compile(net.get_submodule(name), **args))


def in_place(net, name, **args):
    net.get_submodule(name).compile(**args)


def steps(compiled, net, counter):
    """Runs both under many masks; the number of graphs after each."""
    graphs = []
    for seed in range(CHANGES):
        for each in (compiled, net):
            random_masks(each, seed)
        assert_same_step(compiled, net, torch.randn(3, 3, 6, 6))
        graphs.append(counter.frame_count)
    return graphs


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("how", "name"), [
    *((how, name) for how in (compile_part, in_place) for name in ("0", "1", "3", "3.0", "3.0.conv")),
    (compile_part, "2"), (compile_part, "5"),  # in place torch compiles no layer of its own that stands alone
])  # fmt: skip
@pytest.mark.thinned(2)
def test_compile_of_a_part_makes_one_graph_for_all_masks(how, name, training):
    net, counter = network(training), CompileCounterWithBackend("aot_eager")
    compiled = copy.deepcopy(net)
    how(compiled, name, backend=counter, fullgraph=True)
    pk.flow(compiled)
    assert steps(compiled, net, counter) == [1] * CHANGES


def test_compile_of_two_parts_of_one_network():
    net, counter = network(True), CompileCounterWithBackend("aot_eager")
    compiled = copy.deepcopy(net)
    compile_part(compiled, "3.0", backend=counter, fullgraph=True)
    in_place(compiled, "4", backend=counter, fullgraph=True)
    pk.flow(compiled)
    assert steps(compiled, net, counter) == [2] * CHANGES


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compile_of_a_part_after_flow(training):
    """Compiled code meets live tensors: graph breaks, a few graphs, and the right numbers."""
    net, counter = network(training), CompileCounterWithBackend("aot_eager")
    compiled = pk.flow(copy.deepcopy(net))
    compile_part(compiled, "3", backend=counter)
    graphs = steps(compiled, net, counter)
    assert graphs[5] == graphs[-1] <= 4
    pk.flow(compiled)  # mends it
    torch._dynamo.reset()
    assert steps(compiled, net, counter) == [graphs[-1] + 1] * CHANGES


def test_compile_of_a_part_after_flow_with_fullgraph_says_what_to_do():
    compiled = pk.flow(network(False))
    random_masks(compiled, 1)
    compile_part(compiled, "3", backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"got a live tensor; call pk.flow\(model\) again"):
        compiled(torch.randn(3, 3, 6, 6))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", [Eager, Broken])
def test_compile_with_graph_breaks(kind, training):
    net, counter = network(training), CompileCounterWithBackend("aot_eager")
    net[1], net[3][0] = kind(net[1]), kind(net[3][0])
    compiled = torch.compile(pk.flow(copy.deepcopy(net)), backend=counter)
    graphs = steps(compiled, net, counter)
    assert graphs[5] == graphs[-1] <= 8


@pytest.mark.parametrize("how", ["of the network", "in place"])
def test_compile_of_a_network_of_its_own_class_makes_one_graph(how):
    class Net(nn.Module):  # torch.compile runs its hooks outside of the graph, those of a Sequential inside
        def __init__(self):
            super().__init__()
            self.layers = network(True)

        def forward(self, x):
            return {"y": self.layers(x)}["y"]

    net, counter = pk.flow(Net()), CompileCounterWithBackend("aot_eager")
    compiled = copy.deepcopy(net)
    if how == "in place":
        compiled.compile(backend=counter, fullgraph=True)
    else:
        compiled = torch.compile(compiled, backend=counter, fullgraph=True)
    assert steps(compiled, net, counter) == [1] * CHANGES


def test_compile_of_a_part_that_writes_to_its_input():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu = pk.MaskedConv2d(3, 4, 3), nn.ReLU(inplace=True)

        def forward(self, x):
            x = self.conv(x)
            return self.relu(x) + x

    net, x = Twice(), torch.randn(2, 3, 5, 5)
    net.conv.set_masks(filter=torch.tensor([True, False, True, True]))
    want = net(x)
    net.relu = torch.compile(net.relu, backend="aot_eager")
    torch.testing.assert_close(pk.flow(net)(x), want)


def test_compile_of_a_part_with_keyword_and_nested_arguments():
    class Part(nn.Module):
        def forward(self, pair, *, extra):
            assert not any(isinstance(x, LiveTensor) for x in (*pair, extra["x"]))
            return pair[0] + pair[1] * extra["x"]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.part = pk.MaskedConv2d(3, 4, 3), Part()

        def forward(self, x):
            x = self.conv(x)
            return self.part((x, x), extra={"x": x})

    net, x = Net(), torch.randn(2, 3, 5, 5)
    net.conv.set_masks(filter=torch.tensor([True, False, True, True]))
    want = net(x)
    for how in (in_place, compile_part):
        compiled = copy.deepcopy(net)
        how(compiled, "part", backend="eager")
        torch.testing.assert_close(pk.flow(compiled)(x), want)


def test_flow_off_removes_what_it_gave_compiled_parts():
    net = network(False)
    compile_part(net, "3", backend="eager")
    net[4].compile(backend="eager")
    call = net[4]._compiled_call_impl
    pk.flow(pk.flow(net))  # twice is once
    assert len(net[3]._forward_pre_hooks) == 1
    pk.flow(net, False)
    assert not net[3]._forward_pre_hooks and net[4]._compiled_call_impl is call


def test_a_compiled_part_can_be_copied_and_pickled():
    net, x = network(False), torch.randn(2, 3, 6, 6)
    net[3].compile(backend="eager")
    random_masks(pk.flow(net), 1)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(other(x), net(x))
