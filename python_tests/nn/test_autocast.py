"""Masked networks in bfloat16 by autocast: what is dead reaches nothing and is zero, in all modes and layouts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.conv import assert_zero
from prunekernels.live import LiveTensor, recording

NAN = float("nan")
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
WIDTHS = [(5, 6), (16, 32)]  # of the second and the third layer; the pixel kernels' blocks are of 32
MODES = ["masked", "live"]
in_each_mode = pytest.mark.parametrize("mode", MODES)
in_each_layout = pytest.mark.parametrize("layout", LAYOUTS)


class Net(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.conv0, self.norm0 = nn.Conv2d(3, a, 3, padding=1, bias=False), nn.BatchNorm2d(a)
        self.conv1, self.norm1 = nn.Conv2d(a, b, 3, padding=1, stride=2), nn.BatchNorm2d(b)
        self.conv2, self.norm2 = nn.Conv2d(b, b, 1, bias=False), nn.BatchNorm2d(b)
        self.last = nn.Linear(b, 4)

    def forward(self, x):
        x = F.silu(self.norm0(self.conv0(x)))
        x = F.silu(self.norm1(self.conv1(x)))
        x = F.silu(self.norm2(self.conv2(x)) + x)
        self.seen = x
        return self.last(x.mean((2, 3)))


def masked_net(widths, mode, layout, poison):
    """The network, and by layer its live filters; dead filters, norms and channels hold `poison`."""
    torch.manual_seed(0)
    net = Net(*widths).to(memory_format=LAYOUTS[layout])
    with torch.no_grad():
        for norm in (net.norm0, net.norm1, net.norm2):
            norm.weight.uniform_(0.5, 1.5), norm.bias.normal_(0, 0.2)
    pk.convert(net)
    a, b = (torch.arange(width) % 3 != 1 for width in widths)
    live = {"0": a, "1": b, "2": b}
    reads = {"1": a, "2": b}
    for i, filters in live.items():
        net.get_submodule(f"conv{i}").set_masks(filter=filters, input=reads.get(i))
        net.get_submodule(f"norm{i}").set_mask(filters)
    with torch.no_grad():
        for name, tensor in dead_of(net):
            tensor[name] = poison
    return pk.flow(net, mode == "live"), b


def dead_of(net):
    """(mask of dead entries, parameter) of all masked layers."""
    for module in net.modules():
        if isinstance(module, pk.MaskedConv2d):
            kernels = module.filter_mask[:, None] & module.input_mask[None, :]
            yield ~kernels[:, :, None, None].expand(module.weight.shape), module.weight
            if module.bias is not None:
                yield ~module.filter_mask, module.bias
        elif isinstance(module, pk.MaskedBatchNorm2d):
            yield ~module.channel_mask, module.weight
            yield ~module.channel_mask, module.bias


def step(net, layout, dtype=torch.bfloat16):
    torch.manual_seed(1)
    x = torch.randn(6, 3, 12, 10).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    y = torch.randint(4, (6,))
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        scores = net(x)
        loss = F.cross_entropy(scores.float(), y)
    loss.backward()
    return scores, x.grad


@pytest.mark.parametrize("plan", ["auto", "model", "dense", "compact", "direct"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@in_each_mode
@in_each_layout
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_nan_in_what_is_dead(widths, layout, mode, training, plan):
    results = []
    for poison in (0.0, NAN):
        net, live = masked_net(widths, mode, layout, poison)
        with pk.plan.force(plan), recording() as fallbacks:
            scores, grad_x = step(net.train(training), layout)
        assert scores.dtype == torch.bfloat16 and scores.isfinite().all() and grad_x.isfinite().all()
        assert not fallbacks
        seen = net.seen.to_dense() if isinstance(net.seen, LiveTensor) else net.seen
        assert seen.dtype == torch.bfloat16
        assert_zero(seen[:, ~live])
        for dead, parameter in dead_of(net):
            assert parameter.grad.dtype == torch.float32 and parameter.grad[~dead].isfinite().all()
            assert_zero(parameter.grad[dead])
        statistics = [b for name, b in net.named_buffers() if "running" in name]
        assert all(b.isfinite().all() for b in statistics)
        results.append([scores, grad_x, *(p.grad for p in net.parameters()), *statistics])
    if plan != "auto":  # which tries one plan after another
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@in_each_layout
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_modes_agree_with_float32(widths, layout, training):
    """To the rounding of bfloat16. The activation is smooth: a ReLU would pass in one and not in the other."""

    def outcome(mode, dtype):
        net, _ = masked_net(widths, mode, layout, 0.0)
        scores, grad_x = step(net.train(training), layout, dtype)
        grads = {name: p.grad for name, p in net.named_parameters()}
        if training:
            del grads["conv1.bias"]  # nothing but rounding, as the norm takes a constant away
        return {"scores": scores.detach(), "x": grad_x, **grads}

    want = outcome("masked", torch.float32)
    for mode in MODES:
        for name, got in outcome(mode, torch.bfloat16).items():
            assert (got.float() - want[name]).norm() < 0.04 * want[name].norm(), name


@in_each_mode
@in_each_layout
def test_soft_dead_filters_train(mode, layout):
    """weight_grad="dense": the gradient of dead filters too, in float32."""
    net, _ = masked_net((16, 32), mode, layout, 0.5)
    plain = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, pk.MaskedConv2d):
            module.weight_grad = "dense"
    step(net, layout), step(plain, layout)
    for (dead, parameter), (_, other) in zip(dead_of(net), dead_of(plain), strict=True):
        if parameter.dim() == 4 and parameter.shape[1] > 3:
            continue  # a dead channel passes nothing on
        assert_zero(other.grad[dead])
    assert net.conv0.weight.grad.dtype == torch.float32


@in_each_mode
def test_layers_between_float32_and_bfloat16(mode):
    """A norm that is kept in float32 by hand, in the midst of bfloat16."""
    net, live = masked_net((16, 32), mode, "nhwc", NAN)
    forward = net.norm1.forward
    net.norm1.forward = lambda x: forward(x.float())
    step(net, "nhwc")
    for dead, parameter in dead_of(net):
        assert_zero(parameter.grad[dead])
    assert live.any()
