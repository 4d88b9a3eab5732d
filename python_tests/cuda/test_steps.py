"""Training steps on a real GPU: nothing waits for it, everything captures into graphs, on any stream and device."""

import gc

import pytest
import torch

import prunekernels as pk
from cases.conv import FORCED, PLAIN, PLANS, expected, inputs, masks, only, run
from cases.cuda import (  # noqa: F401
    BF16,
    DEVICE,
    F32,
    FORMATS,
    WHY_NOT,
    WIDE,
    assert_right,
    flow_network,
    flow_step,
    network,
    no_waiting,
    set_masks,
    there,
    usual_settings,
)
from cases.networks import NETWORKS, mask_at_random
from prunekernels import reference

if WHY_NOT:
    pytest.skip(WHY_NOT, allow_module_level=True)


def step(model, x, plan):
    """Forward and backward; the gradients stand in .grad afterwards."""
    for p in model.parameters():
        p.grad = None
    with pk.plan.force(plan):
        y = model(x)
        y.float().square().sum().backward()
    return y.detach()


def results(model, y):
    return [y.clone(), *(p.grad.clone() for p in model.parameters())]


def data(seed, dtype=F32, layout="channels_last"):
    x = torch.randint(-2, 3, (4, 16, 7, 9), generator=torch.Generator().manual_seed(seed))
    return x.to(DEVICE, dtype).contiguous(memory_format=FORMATS[layout])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_step_does_not_wait(dtype, layout, plan):
    model, x = network(dtype=dtype, layout=layout), data(0, dtype, layout)
    with pk.plan.measure(True):
        step(model, x, plan)
        with no_waiting():
            step(model, x, plan)


def captured(model, x, plan):
    """A graph of a step on x, and the tensors in which it leaves its results."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(model, x, plan)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    for p in model.parameters():
        p.grad = None
    with torch.cuda.graph(graph):
        y = step(model, x, plan)
    return graph, [y, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_graph(dtype, layout, plan):
    model, x = network(dtype=dtype, layout=layout), data(0, dtype, layout)
    with pk.plan.measure(True):
        graph, outputs = captured(model, x, plan)
        kept = [t.clone() for t in outputs]
        for seed in (1, 2):
            x.copy_(data(seed, dtype, layout))
            graph.replay()
            got = [t.clone() for t in outputs]
            want = results(model, step(model, data(seed, dtype, layout), plan))
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b)
    del kept


@pytest.mark.parametrize("plan", FORCED)
@pytest.mark.parametrize("layout", FORMATS)
def test_a_graph_keeps_the_masks_of_its_capture(layout, plan):
    """Even if they are changed, their tensors freed and the memory used again."""
    model, x = network(layout=layout), data(0, layout=layout)
    graph, outputs = captured(model, x, plan)
    graph.replay()
    want = [t.clone() for t in outputs]
    for seed in range(1, 4):
        set_masks(model, seed)
        step(model, data(seed, layout=layout), plan)
    del model
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    garbage = [torch.full((size,), 0x7F7F7F7F, dtype=torch.int32, device=DEVICE) for size in (64, 256, 1024) * 300]
    graph.replay()
    assert all(map(torch.equal, outputs, want))
    del garbage, graph
    torch.cuda.synchronize()


def test_an_unknown_mask_is_refused_while_capturing():
    x, weight, bias, _ = there(inputs(PLAIN))
    mask = pk.ConvMask(there(only(6, 1, 2)), in_channels=4)
    graph = torch.cuda.CUDAGraph()
    pk.masked_conv2d(x, weight, bias, padding=1, filter_mask=there(only(6, 1)))  # cuDNN's own start
    with pytest.raises((ValueError, RuntimeError), match="(?s)masked_conv2d: mask: expected.*capture.*got"):
        with torch.cuda.graph(graph):
            pk.masked_conv2d(x, weight, bias, padding=1, mask=mask)
    y = pk.masked_conv2d(x, weight, bias, padding=1, mask=mask)  # and afterwards all is well
    want = reference.masked_conv2d(x.cpu(), weight.cpu(), bias.cpu(), padding=1, filter_mask=only(6, 1, 2))
    torch.testing.assert_close(y.cpu().double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plan", FORCED)
@pytest.mark.parametrize("layout", FORMATS)
def test_streams(layout, plan):
    """A mask first met on one stream serves on others, whatever is in flight, and may die while they still read it."""
    problem, made = inputs(WIDE, layout=layout), masks(WIDE, "all")
    want = expected(WIDE, "all")
    there_problem = there(problem)
    torch.cuda.synchronize()
    got = []
    for _ in range(3):
        prepared = pk.ConvMask(**there(made), out_channels=WIDE.k, in_channels=WIDE.c)
        torch.cuda.synchronize()
        for stream in (torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.current_stream()):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(1_000_000)  # the kernels run after the host has gone on
                got.append(run(there_problem, WIDE, plan, mask=prepared))
        del prepared
        pk.masked_conv2d(*there_problem[:3], filter_mask=there(only(WIDE.k, 3)), padding=1)  # lets go of dead masks
    torch.cuda.synchronize()
    for each in got:
        assert_right(each, want, ["dense"] * 3, F32, WIDE, made)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("plan", PLANS)
def test_the_other_device(plan):
    """Tensors that are not on the current device."""
    last = f"cuda:{torch.cuda.device_count() - 1}"
    problem, made = inputs(WIDE, layout="channels_last"), masks(WIDE, "all")
    moved = [t.to(last) for t in problem]
    got = run(moved, WIDE, plan, **{name: mask.to(last) for name, mask in made.items()})
    assert torch.cuda.current_device() == 0 and {str(t.device) for t in got} == {last}
    assert_right(got, expected(WIDE, "all"), ["dense"] * 3, F32, WIDE, made)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", FORMATS)
def test_training_with_masks_that_change(layout, plan):
    """The same steps on the CPU, in float64."""
    gpu = network(layout=layout)
    cpu = torch.nn.Sequential(pk.MaskedConv2d(16, 24, 3, padding=1), torch.nn.ReLU(), pk.MaskedConv2d(24, 40, 1))
    cpu.double().load_state_dict(gpu.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-5) for m in (gpu, cpu)]
    for seed in range(4):
        set_masks(gpu, seed)
        for a, b in zip(gpu, cpu, strict=True):
            if isinstance(a, pk.MaskedConv2d):
                b.set_masks(filter=a.filter_mask.cpu(), input=a.input_mask.cpu())
        for _ in range(2):
            y = step(gpu, data(seed, layout=layout), plan)
            want = step(cpu, data(seed).cpu().double(), "dense")
            torch.testing.assert_close(y.cpu().double(), want, rtol=1e-3, atol=1e-3)
            for optimizer in optimizers:
                optimizer.step()
    for a, b in zip(gpu.parameters(), cpu.parameters(), strict=True):
        torch.testing.assert_close(a.detach().cpu().double(), b.detach(), rtol=1e-3, atol=1e-4)
    assert all(name in FORCED for layer in (gpu[0], gpu[2]) for name in layer.plan)


# ---- live mode

NETS = [(name, layout) for name in NETWORKS for layout in FORMATS]
NETS.remove(("plain", "channels_last"))  # its view() asks for the other one


def assert_close(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-3, atol=5e-4)


def remask(net, seed):
    return mask_at_random(net.cpu(), seed).to(DEVICE)


def flow_gears(name, layout):
    """A network in live mode, images, and what masked mode makes of them."""
    net, x = flow_network(name, layout, DEVICE)
    want = flow_step(pk.flow(remask(net, 0), False), x)
    return pk.flow(net), x, want


@pytest.mark.parametrize(("name", "layout"), NETS)
def test_network_gear_does_not_wait(name, layout):
    """The numbers of masked mode, and steps that never wait for the device once they have met their lists."""
    net, x, want = flow_gears(name, layout)
    for seed in range(3):
        assert_close(flow_step(net, x), want)
        with no_waiting():
            got = flow_step(net, x)
        assert_close(got, want)
        want = flow_step(pk.flow(remask(net, seed + 1), False), x)
        pk.flow(net)


def flow_captured(net, x):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            flow_step(net, x)
    torch.cuda.current_stream().wait_stream(side)
    net.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = flow_step(net, x)
    return graph, got


@pytest.mark.parametrize(("name", "layout"), NETS)
def test_network_gear_in_a_graph(name, layout):
    net, x, want = flow_gears(name, layout)
    graph, got = flow_captured(net, x)
    for _ in range(2):
        graph.replay()
        assert_close(got, want)


@pytest.mark.parametrize(("name", "layout"), NETS[::3])
def test_a_graph_of_the_network_gear_keeps_its_masks(name, layout):
    net, x, want = flow_gears(name, layout)
    graph, got = flow_captured(net, x)
    for seed in (1, 2):
        net.load_state_dict(mask_at_random(flow_network(name, layout)[0], seed).state_dict())  # other masks alone
        flow_step(net, x)
    gc.collect()
    torch.cuda.empty_cache()
    garbage = [torch.full((size,), 0x7F7F7F7F, dtype=torch.int32, device=DEVICE) for size in (64, 256, 1024) * 300]
    graph.replay()
    assert_close(got, want)
    del garbage


@pytest.mark.parametrize(("name", "layout"), NETS[::3])
def test_network_gear_in_bfloat16(name, layout):
    """As near to float32 as masked mode is."""
    net, x, want = flow_gears(name, layout)
    with torch.autocast(DEVICE, dtype=BF16):
        got = flow_step(net, x)[0], flow_step(pk.flow(net, False), x)[0]
    near, usual = ((y.float() - want[0]).abs().max() for y in got)
    assert near <= 4 * usual + 2e-2
