"""Norms in live mode that leave their second half to the relu, the sum, or the sum and relu behind them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.deferred import LIVE, WIDTH, TwoNorms
from prunekernels.live import LiveTensor, deferred
from prunekernels.live.deferred import Deferred

pytestmark = pytest.mark.skipif(not pk.has_extension(), reason="norms are deferred by the extension")


class Net(TwoNorms):
    """tail(norm(x), x, y) behind a convolution, y being the result of another norm."""

    def __init__(self, tail):
        super().__init__()
        self.tail = tail
        self.other_norm._channels = self.norm._channels  # as those of one group, made of one mask, may be

    def forward(self, x):
        between = self.conv(x)
        return self.head(self.tail(self.norm(between), between, self.other_norm(self.other(x))))


@pytest.fixture
def calls(monkeypatch):
    """What was done with deferred norms: "relu", "plus", and "written" by themselves."""
    made = []

    def log(name, said):
        original = getattr(Deferred, name)

        def method(self, *args):
            before, result = self.written, original(self, *args)
            if not before if name == "__call__" else result is not None:
                made.append(said)
            return result

        monkeypatch.setattr(Deferred, name, method)

    log("relu", "relu"), log("plus", "plus"), log("__call__", "written")
    return made


def outcome(net, patience, monkeypatch, grad=True):
    """Result, gradients and statistics. patience: 0: norms are not deferred."""
    monkeypatch.setattr(deferred.Uses, "PATIENCE", patience)
    net = copy.deepcopy(net)
    net.other_norm._channels = net.norm._channels
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0)).requires_grad_(grad)
    y = net(x)
    if not grad:
        return [y]
    y.sin().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in net.parameters() if p.grad is not None), *net.buffers()]


def relu_in_place(y, x, z):
    return F.relu(y, inplace=True)


def sum_in_place(y, x, z):
    y += z
    return y.relu_()


def sum_into_another(y, x, z):
    z = z * 2
    z += y
    return z


def relu_and_itself(y, x, z):
    return F.relu(y) + y


def sum_used_twice(y, x, z):
    total = y + z
    return F.relu(total) * total


def addend_changed(y, x, z):
    z = z * 2
    total = y + z
    z.mul_(3)
    return F.relu(total)


def input_changed(y, x, z):
    x.mul_(2)
    return F.relu(y)


def input_read(y, x, z):
    seen = x * 2
    return F.relu(y) + seen


TAILS = {  # and what is done with deferred norms
    "relu": (lambda y, x, z: F.relu(y), "relu"),
    "torch.relu": (lambda y, x, z: torch.relu(y), "relu"),
    "method": (lambda y, x, z: y.relu(), "relu"),
    "in place": (relu_in_place, "relu"),
    "module": (lambda y, x, z: nn.ReLU(inplace=True)(y), "relu"),
    "sum": (lambda y, x, z: F.relu(y + z), "written plus relu"),
    "sum, swapped": (lambda y, x, z: torch.add(z.relu(), y).relu(), "relu plus relu"),
    "sum in place": (sum_in_place, "written plus relu"),
    "sum into another": (sum_into_another, "written written"),
    "difference": (lambda y, x, z: F.relu(y - z), "written written"),
    "scaled sum": (lambda y, x, z: F.relu(torch.add(y, z, alpha=2)), "written written"),
    "three": (lambda y, x, z: F.relu(y + z + z), "written plus written"),
    "with itself": (lambda y, x, z: F.relu(y + y), "written"),
    "relu and itself": (relu_and_itself, "relu written"),
    "relu twice": (lambda y, x, z: F.relu(y) * F.relu(y), "relu written"),
    "sum used twice": (sum_used_twice, "written plus relu written"),
    "addend changed": (addend_changed, "written plus written"),
    "input read": (input_read, "written"),
    "sigmoid": (lambda y, x, z: torch.sigmoid(y), "written"),
    "view": (lambda y, x, z: F.relu(y[:, :, 1:]), "written"),
    "detached": (lambda y, x, z: F.relu(y) + y.detach(), "relu written"),
    "unused": (lambda y, x, z: z.relu(), "relu"),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", TAILS)
def test_the_same_as_one_after_the_other(name, layout, training, monkeypatch, calls):
    torch.manual_seed(0)
    tail, done = TAILS[name]
    net = pk.flow(Net(tail)).train(training).to(memory_format=layout)
    want = outcome(net, 0, monkeypatch)
    assert calls == []
    got = outcome(net, 3, monkeypatch)
    assert " ".join(calls) == done
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
@pytest.mark.parametrize("name", [*TAILS, "input changed"])
def test_without_gradients(name, mode, monkeypatch):
    """Where torch allows to change the input of a norm in place, too."""
    torch.manual_seed(0)
    net = pk.flow(Net(TAILS[name][0] if name in TAILS else input_changed)).eval()
    with mode():
        got, want = (outcome(net, patience, monkeypatch, grad=False) for patience in (3, 0))
    assert torch.equal(got[0], want[0])


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def asked(y, x, z):
    """Everything that can be asked of a result of a norm, beside a relu of it."""
    seen = []
    out = F.relu(y)
    (asked.grad,) = torch.autograd.grad((out * 3).sum(), y, retain_graph=True)
    y.register_hook(lambda grad: seen.append(grad.clone()))
    y.retain_grad()
    extra = Doubled.apply(y) + torch.utils.checkpoint.checkpoint(torch.sin, y, use_reentrant=False)
    asked.seen, asked.y = seen, y
    return out + extra


def test_hooks_and_gradients_of_the_result(monkeypatch):
    torch.manual_seed(0)
    net, found = pk.flow(Net(asked)), []
    for patience in (3, 0):
        outcomes = outcome(net, patience, monkeypatch)
        found.append([*outcomes, asked.grad, sum(asked.seen), asked.y.grad])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def first_half(training=True):
    torch.manual_seed(0)
    net = pk.flow(Net(None)).train(training)
    between = net.conv(torch.randn(2, 3, 9, 9))
    return net, between, net.norm(between)


def test_it_is_a_tensor_like_any_other(calls):
    _, _, y = first_half()
    assert isinstance(y.deferred, Deferred) and type(y) is LiveTensor
    assert y.shape == (2, WIDTH, 7, 7) and y.requires_grad and y.grad_fn is not None and calls == []
    want = copy.deepcopy(y.detach()).to_dense()
    assert y.deferred is None and torch.equal(y.to_dense(), want) and not want[:, ~LIVE].any() and want[:, LIVE].any()


def test_what_nobody_has_any_more_is_not_computed(calls):
    _, between, y = first_half()
    F.relu(y)
    del y
    between.to_dense()
    assert calls == ["relu"]


def test_parameters_may_change_before_it_is_used(calls):
    net, _, y = first_half()
    want = first_half()[2].to_dense()
    with torch.no_grad():
        net.norm.weight.zero_(), net.norm.bias.zero_()
    assert torch.equal(y.to_dense(), want)


def test_a_change_of_the_stored_input_is_an_error():
    """Written to behind the back of the live tensor."""
    with torch.no_grad():
        _, between, _ = first_half()
        stored = between.compact
        y = pk.flow(first_half()[0]).norm(between)
        stored.mul_(2)
        for use in (F.relu, torch.sigmoid):
            with pytest.raises(RuntimeError, match="changed in place through `compact`"):
                use(y)


def test_a_norm_that_nothing_fuses_with_stops_deferring(calls):
    net, between, _ = first_half()
    for _ in range(5):
        torch.sigmoid(net.norm(between))
    assert calls == ["written"] * deferred.Uses.PATIENCE
    net.norm.set_mask(LIVE)  # a change of masks is a new start
    F.relu(net.norm(between))
    assert calls[-1] == "relu"


def test_a_relu_now_and_then_keeps_it_deferring(calls):
    net, between, _ = first_half()
    for _ in range(3):
        torch.sigmoid(net.norm(between)), torch.sigmoid(net.norm(between)), F.relu(net.norm(between))
    assert calls == ["written", "written", "relu"] * 3


@pytest.mark.parametrize("create_graph", [False, True])
def test_backward_twice(create_graph):
    _, _, y = first_half()
    out = F.relu(y).to_dense()
    x = y.deferred.x
    first, again = (torch.autograd.grad(out.sin().sum(), x, retain_graph=True, create_graph=c)[0]
                    for c in (create_graph, False))  # fmt: skip
    torch.testing.assert_close(first, again)
    (y * 2).to_dense()  # closes the gate
    torch.testing.assert_close(torch.autograd.grad(out.sin().sum(), x)[0], again)


def test_layers_are_saved_and_copied_as_before():
    net, between, _ = first_half()
    other = copy.deepcopy(net)
    assert not any("uses" in name for name in net.state_dict())
    assert torch.equal(other.norm(between.detach()).to_dense(), net.norm(between.detach()).to_dense())


def test_without_gradients_a_relu_takes_the_memory_of_the_norm():
    with torch.no_grad():
        net, between, y = first_half(training=False)
        place = y.deferred.y.data_ptr()
        assert F.relu(y).compact.data_ptr() == place
        again = net.norm(between)
        torch.testing.assert_close(y.to_dense(), again.to_dense(), rtol=0, atol=0)
        assert y.compact.data_ptr() != place
