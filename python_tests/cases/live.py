"""The same operands as live and as plain tensors, and checks that functions treat both alike."""

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import prunekernels as pk
from prunekernels.live import LiveList, LiveTensor, full_width, recording
from prunekernels.live.tensor import wrap

N, C, H, W = 2, 6, 4, 6
X, OTHER = (0, 2, 3, 5), (1, 2, 5)


def live_list(channels, of=C):
    return LiveList.of(np.array(channels, dtype=np.int64), of)


class Operands:
    """Operands by name, x, same (its list), other (another list) and so on: live tensors if `live`, else plain."""

    def __init__(self, live, x=X, other=OTHER, layout="nchw", dtype=torch.float64, grad=True):
        self.live, self.layout, self.dtype, self.grad, self.leaves = live, layout, dtype, grad, []
        self.generator = torch.Generator().manual_seed(0)
        self.x, self.same = self.tensor(x), self.tensor(x)
        self.other, self.none = self.tensor(other), self.tensor(())
        self.plain = self.values(N, C, H, W)
        self.pixel_gate, self.channel_gate = self.values(N, 1, H, W), self.values(N, C, 1, 1)
        self.row, self.column = self.values(W), self.values(C, 1, 1)
        self.scalar = self.values()
        self.small = self.tensor(x, (N, C, 1, 1))
        self.narrow = self.tensor((1,), (N, 3, H, W), 3)
        self.more = self.tensor(x, (3, C, H, W))
        self.flat, self.flat_other = self.tensor(x, (N, C)), self.tensor(other, (N, C))
        self.line, self.line_other = self.tensor(x, (N, C, H)), self.tensor(other, (N, C, H))

    def values(self, *size):
        values = torch.randint(-4, 5, size, generator=self.generator).to(self.dtype) + 0.5
        if len(size) == 4 and self.layout == "channels_last":
            values = values.contiguous(memory_format=torch.channels_last)
        self.leaves.append(values.requires_grad_(self.grad))
        return values * 1

    def tensor(self, channels, size=(N, C, H, W), of=C):
        compact = self.values(size[0], len(channels), *size[2:])
        if self.live:
            return wrap(compact, live_list(channels, of))
        return compact.new_zeros(size).index_copy(1, torch.tensor(channels, dtype=torch.long), compact)


def outcome(f, operands):
    """The results at full width and the gradients of a weighted sum of them."""
    operands.results = [t for t in tree_leaves(f(operands)) if isinstance(t, Tensor)]
    wide = full_width(operands.results)
    weighted = [(t * torch.arange(1.0, t.numel() + 1).view(t.shape)).sum() for t in wide if t.requires_grad]
    grads = torch.autograd.grad(sum(weighted), operands.leaves, allow_unused=True) if weighted else []
    return [t.detach() for t in wide], [torch.zeros(()) if g is None else g for g in grads]


def assert_as_plain(f, **args):
    """f of live tensors equals f of plain ones, gradients too. Returns the results and which operations fell back."""
    live, plain = Operands(True, **args), Operands(False, **args)
    with recording() as fallbacks:
        (got, grads), (want, want_grads) = outcome(f, live), outcome(f, plain)
    assert [t.shape for t in got] == [t.shape for t in want] and [t.dtype for t in got] == [t.dtype for t in want]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close([g + torch.zeros_like(w) for g, w in zip(grads, want_grads, strict=True)], want_grads)
    return live.results, [row["op"] for row in fallbacks]


def assert_flows(f, **args):
    results, fallbacks = assert_as_plain(f, **args)
    assert not fallbacks and results and all(type(t) is LiveTensor for t in results), (fallbacks, results)


def assert_falls_back(f, **args):
    _, fallbacks = assert_as_plain(f, **args)
    assert fallbacks


def in_flow(net):
    return pk.flow(copy.deepcopy(net))


def step(net, x):
    """Outputs, gradients of the input and the parameters, statistics: all that a training step computes."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = full_width(net(x))
    (y * torch.arange(1.0, y.numel() + 1).view(y.shape)).sum().backward()
    named = {"y": y.detach(), "x.grad": x.grad}
    named |= {f"{name}.grad": p.grad for name, p in net.named_parameters()}
    return named | {name: b.clone() for name, b in net.named_buffers()}


def assert_same_step(got, want, exact=False):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert (value is None) == (got[name] is None), name
        if value is None:
            continue
        if exact or not value.is_floating_point():
            assert torch.equal(got[name], value), name
        else:
            torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def without_dropout(net):
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net
