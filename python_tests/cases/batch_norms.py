"""Calls of masked_batch_norm and its gradients, for the CUDA operators, emulated and on a GPU."""

import torch


class Problem:
    """A batch norm of some channels. form: "compact": x has those of index; "wide": all, of which those that are not at
    index hold NaN; "all": there is no index.
    """

    def __init__(self, dtype=torch.float32, layout=torch.channels_last, size=(3, 12, 5, 7), form="compact"):
        gen = torch.Generator().manual_seed(1)
        draw = lambda *shape: torch.randn(shape, generator=gen)  # noqa: E731
        C = size[1]
        self.features = C if form in ("wide", "all") else 2 * C + 1
        count = 7 if form == "wide" else C
        self.index = torch.randperm(self.features, generator=gen)[:count].sort().values.int()
        self.index = None if form == "all" else self.index
        self.x, self.grad = (draw(*size).to(dtype).contiguous(memory_format=layout) for _ in range(2))
        if form == "wide":
            dead = torch.ones(C, dtype=torch.bool).index_fill_(0, self.index.long(), False)
            self.x[:, dead] = self.grad[:, dead] = float("nan")
        self.parameters = [draw(self.features), draw(self.features)]
        self.running = [draw(self.features), draw(self.features).square() + 0.5]

    def to(self, device):
        """This problem on a device."""
        self.x, self.grad = self.x.to(device), self.grad.to(device)
        self.index = None if self.index is None else self.index.to(device)
        self.parameters, self.running = ([t.to(device) for t in each] for each in (self.parameters, self.running))
        return self

    def outcome(self, ops, training=True, affine=True):
        """y, mean, 1 / deviation, running mean and variance, gradients of x, weight and bias."""
        weight, bias = self.parameters if affine else (None, None)
        mean, var = (each.clone() for each in self.running)
        rest = (self.index, self.features, training)
        y, center, invstd = ops.masked_batch_norm(self.x, weight, bias, mean, var, *rest, 0.25, 1e-5)
        back = ops.masked_batch_norm_backward(self.grad, self.x, weight, center, invstd, *rest)
        return [y, center, invstd, mean, var, *back]

    def deferred(self, ops, adds, relu, training=True):
        """y, the table, running mean and variance, and gradients of x, weight and bias behind a relu alone."""
        weight, bias = self.parameters
        mean, var = (each.clone() for each in self.running)
        rest = (self.index, self.features)
        add = self.grad if adds else None
        y, table, _ = ops.deferred_batch_norm(self.x, weight, bias, mean, var, *rest, training, 0.25, 1e-5)
        if relu:
            y = ops.batch_norm_relu(y, self.x, table, *rest, add, None)
        else:
            ops.apply_batch_norm_(y, self.x, table, *rest, add, False)
        statistics = (weight, table[0], table[1])
        back = ops.masked_batch_norm_backward(self.grad, self.x, *statistics, *rest, training, table if relu else None)
        return [y, table, mean, var, *back]


def assert_near(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.stride() == b.stride() or not a.numel()
        rtol = 2**-7 if a.dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()) if b.numel() else 0)
