"""time_modes: each mode runs as it says, and the network is left as it was. Times: only that they exist."""

import random
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import prunekernels as pk
from cases.ranks import run_ranks
from prunekernels.compaction.compaction import Compaction
from prunekernels.inspect.modes import time_modes

module = sys.modules["prunekernels.inspect.modes"]
KEEP = torch.arange(6) < 4
X = torch.randn(2, 3, 8, 8)


class Log(list):
    """One list for a network and its copies."""

    def __deepcopy__(self, memo):
        return self


class Spy(nn.Module):
    """Hands on what it gets, and notes how it came."""

    def __init__(self):
        super().__init__()
        self.seen = Log()

    def forward(self, x):
        self.seen.append((type(x), x.dtype, torch.is_grad_enabled(), self.training, x.shape[1]))
        return x


class Net(nn.Module):
    """conv -> norm -> dropout -> spy -> conv; outputs in a dict, one of them no float."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop = pk.MaskedConv2d(3, 6, 3), pk.MaskedBatchNorm2d(6), nn.Dropout(0.5)
        self.spy, self.last = Spy(), pk.MaskedConv2d(6, 2, 1)
        self.first.set_masks(filter=KEEP)
        self.norm.set_mask(KEEP)
        self.last.set_masks(input=KEEP)

    def forward(self, x, scale=1.0):
        random.random()
        y = self.last(self.spy(self.drop(self.norm(self.first(x)).relu())))
        return {"out": [y * scale, y.argmax(1)]}


def seen_types(net):
    return [seen[0] for seen in net.spy.seen]


TWO = ("masked", "live")


@pytest.mark.parametrize("was_live", [False, True])
def test_each_mode_runs_as_it_says_and_in_turns(was_live):
    net = pk.flow(Net(), was_live)
    times = time_modes(net, X, modes=TWO, repeats=2)
    assert seen_types(net) == [torch.Tensor, pk.LiveTensor] * 3
    assert list(times.ms) == ["masked", "live"] and all(ms > 0 for ms in times.ms.values())
    assert times.reasons == {} and times.backward and times.best in times.ms


def test_in_compacted_mode_the_small_network_runs():
    net = Net()
    times = time_modes(net, X, repeats=2)
    assert list(times.ms) == ["masked", "live", "compacted"] and times.reasons == {}
    trained = [(seen[0], seen[4]) for seen in net.spy.seen if seen[2:4] == (True, True)]
    assert trained == [(torch.Tensor, 6), (pk.LiveTensor, 6), (torch.Tensor, 4)] * 3


@pytest.mark.parametrize("entered", [False, True])
def test_a_compacted_form_that_is_kept_is_used_and_left_as_it_was(entered):
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    compaction = Compaction(net, X, optimizer)
    small, opt = compaction.enter()
    small(X)["out"][0].sum().backward()
    opt.step()
    small.first.weight.grad = grad = torch.ones_like(small.first.weight)
    if not entered:
        compaction.leave()
    before = state_of(net), state_of(small)
    times = time_modes(net, X, compaction=compaction)
    assert times.reasons == {} and compaction.entered == entered
    assert_as_before(net, before[0])
    if entered:
        assert_as_before(small, before[1])
        assert small.first.weight.grad is grad and torch.equal(grad, torch.ones_like(grad))
        compaction.leave()
    assert net.norm.num_batches_tracked == 1


def state_of(net):
    return {
        "state": {name: value.clone() for name, value in net.state_dict().items()},
        "random": (torch.get_rng_state().tolist(), random.getstate()),
        "flow": [getattr(m, "_flow", None) for m in net.modules()],
        "training": [m.training for m in net.modules()],
        "hooks": [(list(m._forward_hooks.items()), list(m._forward_pre_hooks.items())) for m in net.modules()],
        "ids": [id(t) for t in (*net.parameters(), *net.buffers())],
        "masks": [b._version for name, b in net.named_buffers() if "mask" in name],
        "grads": [p.grad for p in net.parameters()],
    }


def assert_as_before(net, before):
    after = state_of(net)
    for name, value in before.pop("state").items():
        assert torch.equal(after["state"][name], value), name
    del after["state"]
    grads, now = before.pop("grads"), after.pop("grads")
    assert all(a is b for a, b in zip(grads, now, strict=True))
    assert after == before


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("was_live", [False, True])
def test_the_network_is_left_as_it_was(was_live, fails):
    net = pk.flow(Net(), was_live)
    net.norm.eval()
    net.first.weight.grad = torch.ones_like(net.first.weight)
    net.last.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 5, 8, 8) if fails else X
    before = state_of(net)
    times = time_modes(net, x)
    assert (times.best is None) == fails
    assert_as_before(net, before)
    assert torch.equal(net.first.weight.grad, torch.ones_like(net.first.weight))


def test_statistics_of_norms_are_left_as_they_were():
    net = Net()
    before = state_of(net)
    time_modes(net, X)
    assert_as_before(net, before)
    assert net.norm.num_batches_tracked == 0


class Counting(nn.Module):
    """Puts another tensor in the place of its buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count = self.count + 1
        return x


def test_a_buffer_that_the_network_replaced_is_put_back():
    net = nn.Sequential(pk.MaskedConv2d(3, 4, 1), Counting())
    count = net[1].count
    time_modes(net, X)
    assert net[1].count is count and count == 0


def test_hooks_on_gradients_do_not_run():
    net = Net()
    ran = []
    parameter = net.first.weight
    parameter.register_hook(lambda grad: ran.append("hook"))
    parameter.register_post_accumulate_grad_hook(lambda parameter: ran.append("after"))
    time_modes(net, X)
    assert ran == []
    net(X)["out"][0].sum().backward()
    assert ran == ["hook", "after"]


def test_eval_mode_is_forward_alone_unless_asked_for_more():
    net = Net().eval()
    times = time_modes(net, X, modes=TWO, repeats=1)
    assert not times.backward and str(times).startswith("forward: masked ")
    assert {seen[2:4] for seen in net.spy.seen} == {(False, False)}
    times = time_modes(net, X, modes=TWO, repeats=1, backward=True)
    assert times.backward and net.spy.seen[-1][2:4] == (True, False)
    assert not time_modes(net.train(), X, modes=TWO, repeats=1, backward=False).backward
    assert net.spy.seen[-1][2:4] == (False, True)


def test_a_frozen_network_has_no_backward():
    assert not time_modes(Net().requires_grad_(False), X, modes=TWO).backward


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_are_there_whatever_surrounds_the_call(context):
    net = Net()
    with context():
        times = time_modes(net, X)
        assert not torch.is_grad_enabled()
    assert times.backward and times.reasons == {}
    assert {seen[2] for seen in net.spy.seen if seen[3]} == {True}


@pytest.mark.parametrize("training", [False, True])
def test_a_network_of_inference_mode(training):
    with torch.inference_mode():
        net = Net().train(training)
        before = {name: value.clone() for name, value in net.state_dict().items()}
    times = time_modes(net, X, modes=TWO)
    assert not times.backward and times.reasons == {}
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_autocast_is_the_callers(monkeypatch):
    cleared = []
    net = Net()
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: cleared.append(len(net.spy.seen)))
    with torch.autocast("cpu", torch.bfloat16):
        times = time_modes(net, X, repeats=2)
        assert len(set(cleared)) >= 9  # weights are cast in each pass, as in a training step
    assert times.reasons == {}
    assert {seen[1] for seen in net.spy.seen if seen[3]} == {torch.bfloat16}


def test_the_example_gets_no_gradients():
    x = X.clone().requires_grad_()
    assert time_modes(Net(), x, modes=TWO).backward and x.grad is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    class Checkpointed(Net):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    net = Checkpointed()
    if reentrant:  # wants an input with a gradient
        net = nn.Sequential(nn.Conv2d(3, 3, 1), net)
    times = time_modes(net, X, modes=TWO)
    assert times.backward and times.reasons == {}


# ---- modes that cannot run


def test_a_network_without_masked_layers():
    times = time_modes(nn.Conv2d(3, 4, 1), X)
    assert times.best == "masked" and times.ms["live"] is times.ms["compacted"] is None
    assert times.reasons == dict.fromkeys(("live", "compacted"), "it has no masked layers: see pk.convert")
    assert str(times).endswith("compacted cannot run (it has no masked layers: see pk.convert)")


class NoLive(nn.Module):
    def forward(self, x):
        if type(x) is pk.LiveTensor:
            raise RuntimeError("no live tensors\nhere")
        return x


class FailsLater(Spy):
    def forward(self, x):
        if len(self.seen) == 4:
            raise RuntimeError("no more")
        return super().forward(x)


@pytest.mark.parametrize(
    ("spy", "mode", "reason"), [(NoLive, "live", "no live tensors"), (FailsLater, "masked", "no more")]
)
def test_a_mode_that_fails_has_a_reason(spy, mode, reason):
    net = Net()
    net.spy = spy()
    times = time_modes(net, X, modes=TWO)
    assert times.reasons[mode] == reason and times.ms[mode] is None
    assert f"{mode} cannot run ({reason})" in str(times)
    assert not any(m._flow for m in net.modules() if hasattr(m, "_flow"))


class Choosing(Net):
    def forward(self, x):
        return super().forward(x if x.detach().numpy().sum() > 0 else -x)


def test_compacted_mode_of_a_network_that_cannot_be_traced():
    net = Choosing()
    before = state_of(net)
    times = time_modes(net, X)
    assert times.ms["compacted"] is None and times.best in TWO
    assert times.reasons["compacted"].startswith("compacted: model: expected a network that torch.export can trace")
    assert "\n" not in str(times)
    assert_as_before(net, before)


def wrapped(net):
    return torch.compile(net, backend="eager")


def in_place(net):
    net.compile(backend="eager")
    return net


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
@pytest.mark.parametrize("how", [wrapped, in_place])
def test_what_torch_compile_runs_is_never_in_live_mode(how):
    times = time_modes(how(Net()), X)
    assert times.reasons == {"live": "torch.compile runs the whole network, in masked mode"}
    assert times.best in ("masked", "compacted")


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_a_part_that_torch_compile_runs_hands_on_all_channels():
    net = Net()
    net.norm.compile(backend="eager")
    assert time_modes(net, X).reasons == {}
    assert pk.LiveTensor not in seen_types(net)


def time_in_ddp(rank):
    torch.manual_seed(0)
    net = Net()
    ddp = nn.parallel.DistributedDataParallel(net)
    ddp(X)["out"][0].sum().backward()
    grad = net.first.weight.grad
    before = grad.clone()
    times = time_modes(ddp, X)
    same = net.first.weight.grad is grad and torch.equal(grad, before)
    ddp(X)["out"][0].sum().backward()
    return times.reasons, same, not torch.equal(grad, before)


def test_distributed_data_parallel_in_compacted_mode_and_others():
    assert run_ranks(time_in_ddp, 1) == [({}, True, True)]


# ---- arguments and the result


def test_the_fastest_pass_counts(monkeypatch):
    clocked = iter([3.0, 5.0, 2.0, 7.0])
    monkeypatch.setattr(module, "_clock", lambda run, device: next(clocked))
    times = time_modes(Net(), X, modes=TWO, repeats=2)
    assert times.ms == {"masked": 2.0, "live": 5.0} and times.best == "masked"
    assert str(times) == "forward and backward: masked 2.0 ms, live 5.0 ms; masked is the fastest"


def test_modes_and_forms_of_examples():
    net = Net()
    assert list(time_modes(net, {"x": X, "scale": 2.0}, modes=["live"]).ms) == ["live"]
    assert str(time_modes(net, (X, 2.0), modes=["live"])).endswith(" ms")
    assert time_modes(net, pk.Example(X, scale=0.5), modes=[]).best is None


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"modes": ("masked", "fast")}, "time_modes: modes: expected some of masked, live, compacted, got 'fast'"),
        ({"repeats": 0}, "time_modes: repeats: expected a number of passes from 1 on, got 0"),
        ({"repeats": 1.5}, "time_modes: repeats: .* got 1.5"),
    ],
)
def test_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        time_modes(Net(), X, **kwargs)


def test_an_example_of_no_use():
    with pytest.raises(TypeError, match="time_modes: example_input: expected a tensor, .* got str"):
        time_modes(Net(), "cat.jpg")
