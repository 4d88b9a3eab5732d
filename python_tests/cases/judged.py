"""A masked network and its judge: the same network of plain operators, with torch.where for each mask."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk

MODES = ("masked", "live")


def where(live, x, dim=0):
    return torch.where(live.view(-1, *[1] * (x.dim() - dim - 1)), x, 0)


class JudgeConv(nn.Conv2d):
    """The contract of a masked convolution; masks are read from `masked[0]`, which a list hides from modules()."""

    def forward(self, x):
        masked = self.masked[0]
        filters = masked.filter_mask & masked.hard_mask
        kernels = (filters[:, None] & masked.kernel_mask)[:, :, None, None]
        bias = None if self.bias is None else where(filters, self.bias)
        x, weight = where(masked.input_mask, x, 1), torch.where(kernels, self.weight, 0)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class JudgeNorm(nn.BatchNorm2d):
    """A batch norm with zeros for dead channels, whose statistics stay."""

    def forward(self, x):
        live, training = self.masked[0].channel_mask, self.training
        of_all = self.running_mean.clone(), self.running_var.clone()
        y = F.batch_norm(where(live, x, 1), *of_all, self.weight, self.bias, training, self.momentum, self.eps)
        self.num_batches_tracked += training
        for running, new in zip((self.running_mean, self.running_var), of_all, strict=True):
            running.copy_(torch.where(live, new.detach(), running))
        return where(live, y, 1)


_JUDGES = {pk.MaskedConv2d: JudgeConv, pk.MaskedBatchNorm2d: JudgeNorm}


def pair(mode, dtype=torch.float64, seed=0):
    """The masked network in a mode, and its judge."""
    torch.manual_seed(seed)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 5, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4),
    ).to(dtype)  # fmt: skip
    for norm in (plain[1], plain[4]):
        nn.init.normal_(norm.bias, std=0.3)
    judge, net = plain, copy.deepcopy(plain)
    pk.convert(net)
    for mine, masked in zip(judge, net, strict=True):
        if type(masked) in _JUDGES:
            mine.__class__, mine.masked = _JUDGES[type(masked)], [masked]
    return pk.flow(net, mode == "live"), judge


def take(judge, net):
    """The judge goes on from the values of the network, which a change of masks may have set to zero."""
    values = dict(net.named_parameters()) | dict(net.named_buffers())
    with torch.no_grad():
        for name, tensor in (*judge.named_parameters(), *judge.named_buffers()):
            tensor.copy_(values[name])


def assert_same_network(net, judge, grads=True, **tolerance):
    """Parameters, gradients and statistics."""
    got = dict(net.named_parameters()) | dict(net.named_buffers())
    for name, want in (*judge.named_parameters(), *judge.named_buffers()):
        torch.testing.assert_close(got[name], want, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
        if grads and isinstance(want, nn.Parameter) and want.requires_grad:
            torch.testing.assert_close(got[name].grad, want.grad, msg=lambda t, n=name: f"{n}.grad: {t}", **tolerance)


def pruned_by_a_method(net, optimizer, rate=0.5):
    """A method that has pruned nothing yet; its end_epoch() changes the masks."""
    return pk.methods.GHFP(net, optimizer, rate=rate, epochs=3, duty=0, warm_up=1, clip=False)


def batches(steps=2, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(4, 3, 7, 6, generator=generator, dtype=torch.float64).to(dtype)
        yield x, torch.randint(4, (4,), generator=generator)
