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


class JudgeGroupNorm(nn.GroupNorm):
    """A group norm whose statistics are of the live channels of each group."""

    def forward(self, x):
        live = self.masked[0].channel_mask
        return where(live, over_live(x, live, self.num_groups, self.weight, self.bias, self.eps), 1)


class JudgeLayerNorm(nn.LayerNorm):
    """A layer norm of the live channels of each pixel, which are in dimension 1, as in LayerNorm2d, or the last one."""

    def forward(self, x):
        live, last = self.masked[0].channel_mask, type(self.masked[0]) is pk.MaskedLayerNorm
        pixels = x if last else x.movedim(1, -1)
        y = over_live(pixels.flatten(0, -2), live, 1, self.weight, self.bias, self.eps).view_as(pixels)
        y = torch.where(live, y, 0)
        return y if last else y.movedim(-1, 1)


def over_live(x, live, groups, weight, bias, eps):
    """Group norm of the live channels, [N, C, ...]; what it gives in dead ones has no meaning."""
    parts = []
    for some, here in zip(x.chunk(groups, 1), live.chunk(groups), strict=True):
        values = some[:, here].flatten(1) if here.any() else torch.zeros_like(some).flatten(1)
        var, mean = (t.view(-1, *[1] * (x.dim() - 1)) for t in torch.var_mean(values, 1, correction=0))
        parts.append((some - mean) * (var + eps).rsqrt())
    along = (-1, *[1] * (x.dim() - 2))
    return torch.cat(parts, 1) * weight.view(along) + bias.view(along)


_JUDGES = {
    pk.MaskedConv2d: JudgeConv,
    pk.MaskedBatchNorm2d: JudgeNorm,
    pk.MaskedGroupNorm: JudgeGroupNorm,
    pk.MaskedLayerNorm: JudgeLayerNorm,
}


def pair(mode, dtype=torch.float64, seed=0, norm=nn.BatchNorm2d):
    """The masked network in a mode, and its judge. norm(channels) makes its norms."""
    torch.manual_seed(seed)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1), norm(6), nn.ReLU(),
        nn.Conv2d(6, 5, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4),
    ).to(dtype)  # fmt: skip
    for layer in (plain[1], plain[4]):
        nn.init.normal_(layer.bias, std=0.3)
    judge, net = plain, copy.deepcopy(plain)
    pk.convert(net)
    for mine, masked in zip(judge.modules(), net.modules(), strict=True):
        kind = next((judge for cls, judge in _JUDGES.items() if isinstance(masked, cls)), None)
        if kind is not None:
            mine.__class__, mine.masked = kind, [masked]
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


def pruned_by_a_method(net, optimizer, rate=0.5, **options):
    """A method that has pruned nothing yet; its end_epoch() changes the masks."""
    return pk.methods.GHFP(net, optimizer, rate=rate, epochs=3, duty=0, warm_up=1, clip=False, **options)


def batches(steps=2, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(4, 3, 7, 6, generator=generator, dtype=torch.float64).to(dtype)
        yield x, torch.randint(4, (4,), generator=generator)
