"""Models in live mode among the rest of torch: hooks, copies, compilers, modes, threads, checkpoints."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import prunekernels as pk
from cases.live import Operands, assert_same_step, in_flow, live_list, step, without_dropout
from cases.networks import NETWORKS, images, mask_at_random, trained
from prunekernels.live import LiveList, LiveTensor, recording
from prunekernels.live.tensor import _without_rules, wrap


def both(name="bottleneck", seed=1, training=False):
    """One masked network in masked mode and in live mode; no activation writes to the input of a hook."""
    net = without_dropout(mask_at_random(trained(name, seed), seed, norms=1.0)).train(training)
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return net, in_flow(net)


def close(a, b):
    return torch.allclose(a, b, rtol=1e-9, atol=1e-9)


# ---- hooks on modules -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.Module, nn.ReLU, pk.MaskedConv2d, pk.MaskedBatchNorm2d, nn.Sequential])
def test_forward_hooks_see_full_width(kind):
    seen = []
    for net in both():
        for module in net.modules():
            if isinstance(module, kind):
                module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach() + 0))
                module.register_forward_hook(lambda module, args, result: seen.append(result.detach() + 0))
        net(images() * 0 + 1)
    half = len(seen) // 2
    assert half and all(map(close, seen[:half], seen[half:]))


def test_a_hook_may_replace_what_it_sees():
    x, results = images(), []
    for net in both():
        net[1].body[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        net[1].body[0][0].register_forward_hook(lambda module, args, result: result + 1)
        net[1].register_forward_hook(lambda module, args, result: result.sigmoid())
        results.append(net(x))
    assert close(*results)


@pytest.mark.parametrize("kind", [nn.Module, nn.ReLU, pk.MaskedConv2d, pk.MaskedBatchNorm2d])
def test_backward_hooks_see_full_width(kind):
    """In a dead channel they may see zeros where masked mode has a gradient that no parameter gets."""
    seen, x = [], images()
    for net in both(training=True):
        for module in net.modules():
            if isinstance(module, kind):
                module.register_full_backward_hook(lambda module, inner, outer: seen.extend([*inner, *outer]))
        net(x.requires_grad_()).square().sum().backward()
    half = len(seen) // 2
    assert half
    for want, got in zip(seen[:half], seen[half:], strict=True):
        assert (want is None) == (got is None)
        if want is not None:
            assert got.shape == want.shape and close(torch.where(got != 0, want, 0), got)


def test_no_hook_of_its_own_is_left():
    net, network = both()
    pk.flow(network[1])
    pk.flow(network)
    assert sum(len(module._forward_hooks) for module in network.modules()) == 1
    pk.flow(network, False)
    assert not any(module._forward_hooks or getattr(module, "_flow", False) for module in network.modules())
    pk.flow(network[1])
    pk.restore(network)
    assert not any(module._forward_hooks or hasattr(module, "_flow") for module in network.modules())
    assert close(network(images() * 0 + 1), net(images() * 0 + 1))


# ---- copies ---------------------------------------------------------------------------------------------------------


def saved(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), saved])
def test_copies_stay_in_live_mode(clone):
    net, network = both()
    x = images()
    network(x)
    copied = clone(network)
    assert close(copied(x), net(x)) and type(copied[0][0](x)) is LiveTensor
    counts = []
    for each in (network, copied):
        with recording(each) as fallbacks:
            each(x)
        counts.append(fallbacks)
    assert counts[0] == counts[1]
    norms = [[m._channels for m in each.modules() if isinstance(m, pk.MaskedBatchNorm2d)] for each in (network, copied)]
    assert all(a is b for a, b in zip(*norms, strict=True))


def test_state_dicts_are_those_of_masked_mode():
    net, network = both()
    other = in_flow(without_dropout(trained("bottleneck", 7)))
    network(images())
    assert network.state_dict().keys() == net.state_dict().keys()
    other.load_state_dict(net.state_dict())
    x = images()
    assert close(other(x), net(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_another_dtype_after_a_step(dtype):
    net, network = both()
    x = images()
    network(x)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    net.to(dtype), network.to(dtype)
    assert torch.allclose(network(x.to(dtype)), net(x.to(dtype)), rtol=tolerance, atol=tolerance)


def test_on_meta():
    _, network = both()
    x = images()
    network(x)
    assert network.to("meta")(x.to("meta")).shape == (2, 5)


# ---- modes, compilers, threads --------------------------------------------------------------------------------------


def test_autocast():
    net, network = (each.float() for each in both())
    x = images().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = network(x), net(x)
    assert got.dtype == want.dtype == torch.bfloat16 and torch.allclose(got, want, rtol=0.1, atol=0.1)
    got, want = (torch.autograd.grad(y.float().sum(), x)[0] for y in (got, want))
    assert torch.allclose(got, want, rtol=0.2, atol=0.2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            for block in self.net[:-1]:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return self.net[-1](x)

    net, network = both()
    x = images()
    assert_same_step(step(pk.flow(Checkpointed(network)), x), step(Checkpointed(net), x))


def test_threads():
    net, network = both()
    x = images()
    want, wrong = net(x), []

    def run():
        for _ in range(10):
            if not close(network(x), want):
                wrong.append(1)

    with recording(network):
        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiled(training):
    torch._dynamo.reset()
    net, network = both(training=training)
    x = images()
    compiled = torch.compile(network, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x))
    if not training:
        got, want = (torch.autograd.grad(call(x).sum(), list(net.parameters()))[0] for call, net in
                     ((compiled, network), (net, net)))  # fmt: skip
        torch.testing.assert_close(got, want)


@pytest.mark.slow
def test_a_compiled_part_is_given_a_live_tensor():
    torch._dynamo.reset()
    net, network = both()
    x = images()
    network[1] = torch.compile(network[1], backend="aot_eager")
    assert close(network(x), net(x))


@pytest.mark.parametrize("grad", [True, False])
def test_a_compiled_function_of_a_live_tensor(grad):
    torch._dynamo.reset()
    live, plain = Operands(True), Operands(False)
    call = torch.compile(lambda x: (x.relu() * 2).sigmoid().sum((2, 3)) + x.mean((2, 3)), backend="aot_eager")
    results = [call(o.x if grad else o.x.detach()) for o in (live, plain)]
    assert close(*results)
    if grad:
        assert close(
            *(torch.autograd.grad(y.sum(), o.leaves[0])[0] for y, o in zip(results, (live, plain), strict=True))
        )


def test_exported():
    net, network = both()
    x = images()
    assert close(torch.export.export(network, (x,)).module()(x), net(x))
    assert close(network(x), net(x))  # exporting first leaves no fake tensor in a cache


def test_traced():
    net, network = both()
    x, y = images(), images()
    network(x)
    assert close(torch.jit.trace(network, x)(y), net(y))


def test_vmap():
    net, network = both()
    x = torch.stack([images(), images()])
    assert close(torch.func.vmap(network)(x), torch.stack([net(each) for each in x]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.autograd.set_detect_anomaly])
def test_modes(mode):
    net, network = both()
    x = images()
    with mode(True) if mode is torch.autograd.set_detect_anomaly else mode():
        assert close(network(x), net(x))


def test_saved_tensors_may_be_moved():
    net, network = both(training=True)
    x = images()
    with torch.autograd.graph.save_on_cpu():
        y = network(x)
    for a, b in zip(*(torch.autograd.grad(y.sum(), list(n.parameters())) for y, n in ((y, network), (net(x), net))),
                    strict=True):  # fmt: skip
        assert close(a, b)


@pytest.mark.parametrize("name", NETWORKS)
def test_second_gradients_of_networks(name):
    net, network = both(name)
    x = images(1).requires_grad_()

    def penalty(model):
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(
            grad.square().sum(), [p for p in model.parameters() if p.dim() == 4], allow_unused=True
        )

    for got, want in zip(penalty(network), penalty(net), strict=True):
        assert (got is None) == (want is None) or not (want if got is None else got).any()
        assert got is None or want is None or torch.allclose(got, want, rtol=1e-7, atol=1e-7)


# ---- below the rules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
def test_code_below_python_may_read_and_write(grad):
    results = []
    for is_live in (True, False):
        o = Operands(is_live)
        x = o.x * 1 if grad else (o.x * 1).detach()
        with _without_rules():
            y = torch.sigmoid(x)
            written = torch.Tensor.mul_(x, 2)
        total = (written * 3).sum() + y.sum()
        grads = torch.autograd.grad(total, o.leaves[0]) if grad else ()
        results.append([total, x * 1, *grads])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.to_dense() if type(got) is LiveTensor else got, want)


def test_code_below_python_may_not_write_to_what_has_views():
    x = Operands(True).x.detach()
    view = x.view(2, -1)
    with (
        pytest.raises(NotImplementedError, match="mul_.*expected a tensor without views to write to"),
        _without_rules(),
    ):
        x.mul_(2)
    assert type(view) is LiveTensor


def test_scripted_functions():
    @torch.jit.script
    def scripted(x):
        return torch.relu(x) * 2 + torch.sigmoid(x)

    assert close(scripted(Operands(True).x), scripted(Operands(False).x))


def test_recording_may_begin_inside_a_module():
    class Recorded(nn.Module):
        def forward(self, x):
            self.context = recording()
            self.context.__enter__()
            return x

    module = Recorded()
    nn.Sequential(module)(torch.zeros(1))
    module.context.__exit__(None, None, None)


def test_fallbacks_are_named():
    net = nn.Sequential(pk.MaskedConv2d(3, 4, 1), nn.Sigmoid(), pk.MaskedConv2d(4, 4, 1), nn.GroupNorm(2, 4))
    for layer in (net[0], net[2]):
        layer.set_masks(filter=torch.arange(4) > 1)
    with recording(pk.flow(net)) as fallbacks:
        for _ in range(2):
            net(torch.zeros(1, 3, 4, 4))
    assert {(row["op"], row["module"], row["count"]) for row in fallbacks} == {
        ("conv2d (channels that hold 0.5)", "2", 2),
        ("group_norm", "3", 2),
    }


def test_a_list_is_one_object_and_its_own_union():
    a, b = live_list((1, 2), 4), live_list((2, 3), 4)
    assert live_list((1, 2), 4) is a and a.union(a) is a and a.union(b) is b.union(a) is live_list((1, 2, 3), 4)
    assert a.intersection(b) is live_list((2,), 4) and a.spread(2) is live_list((2, 3, 4, 5), 8)
    assert LiveList.cat([a, b]) is live_list((1, 2, 6, 7), 8) and a.pad(1, 2) is live_list((2, 3), 7)
    assert a.slice(2, 4) == (live_list((0,), 2), 1, 1) and LiveList.all(3) is live_list(range(3), 3)
    assert repr(a) == "LiveList(2/4)" and not a.full and a.mask().tolist() == [False, True, True, False]


def test_nothing_dead_is_a_plain_tensor():
    x = torch.zeros(1, 2, 3, 3)
    assert wrap(x, LiveList.all(2)) is x


def test_training_after_inference_mode():
    net = in_flow(mask_at_random(trained("basic", 0), 0))
    with torch.inference_mode():
        net.eval()(images())
    net.train()(images()).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
