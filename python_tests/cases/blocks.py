"""Blocks of well-known networks, each between two convolutions: what channels go through in public libraries."""

import torch
import torch.nn.functional as F
from torch import nn

import prunekernels as pk
from cases.networks import conv_norm


class Between(nn.Module):
    """conv_norm(3, 8), a block of layers and how it uses them, and a convolution that reads what it gives."""

    def __init__(self, how, width=8, **layers):
        super().__init__()
        self.first, self.how, self.last = conv_norm(3, 8), how, nn.Conv2d(width, 4, 3, padding=1)
        self.layers = nn.ModuleDict(layers)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.last(self.how(self.layers, self.first(x)))
        return self.head(x.mean((2, 3)))


class Scale(nn.Module):
    """Layer scale: one number for each channel, or more of them."""

    def __init__(self, *shape):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(shape))

    def forward(self, x):
        return x * (self.gamma[:, None, None] if self.gamma.dim() == 1 else self.gamma)


class LayerNorm(nn.LayerNorm):
    """Over the channels of an image, as ConvNeXt's."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PlainNorm(nn.BatchNorm2d):
    """Which pk.convert leaves alone, as its forward is its own."""

    def forward(self, x):
        return super().forward(x)


def conv(c=8, k=8, r=1, **args):
    return nn.Conv2d(c, k, r, padding=r // 2, **args)


def shuffled(x, groups=2):
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def excite(m, x):
    return x * torch.sigmoid(m["up"](F.relu(m["down"](x.mean((2, 3), keepdim=True)))))


def spatial(m, x):
    """CBAM's second half: which pixels matter, by mean and maximum over the channels."""
    return x * torch.sigmoid(m["conv"](torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)))


def along_channels(m, x):
    """ECA: a convolution over the channels themselves."""
    return x * torch.sigmoid(m["conv"](x.mean((2, 3))[:, None]))[:, 0, :, None, None]


def selective(m, x):
    """Branches weighed against each other, as of SKNet and ResNeSt."""
    a, b = m["a"](x), m["b"](x)
    weights = m["fc"]((a + b).mean((2, 3), keepdim=True)).view(x.shape[0], 2, -1, 1, 1).softmax(1)
    return a * weights[:, 0] + b * weights[:, 1]


def attention(m, x):
    """Over the pixels, with one head."""
    q, k, v = m["qkv"](x).flatten(2).chunk(3, 1)
    weights = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(-1)
    return x + (v @ weights.transpose(1, 2)).view(x.shape)


BLOCKS = {
    "depthwise": lambda: Between(
        lambda m, x: m["point"](F.relu6(m["norm"](m["depth"](x)))),
        depth=conv(r=3, groups=8), norm=nn.BatchNorm2d(8), point=conv(),
    ),
    "excite": lambda: Between(excite, down=conv(8, 4), up=conv(4, 8)),
    "cat": lambda: Between(lambda m, x: torch.cat([x, m["a"](x), m["b"](x)], 1), width=18, a=conv(8, 4), b=conv(8, 6)),
    "group_norm": lambda: Between(lambda m, x: F.relu(m["norm"](m["conv"](x))), conv=conv(), norm=nn.GroupNorm(2, 8)),
    "layer_norm": lambda: Between(lambda m, x: F.gelu(m["norm"](m["conv"](x))), conv=conv(), norm=LayerNorm(8)),
    "instance_norm": lambda: Between(lambda m, x: m["norm"](x), norm=nn.InstanceNorm2d(8, affine=True)),
    "shuffle": lambda: Between(lambda m, x: shuffled(torch.cat([m["a"](x), m["b"](x)], 1)), a=conv(8, 4), b=conv(8, 4)),
    "split": lambda: Between(
        lambda m, x: torch.cat([a := x[:, :4], m["a"](x[:, 4:]) + a], 1), a=conv(4, 4, 3)
    ),
    "chunk": lambda: Between(lambda m, x: torch.cat([x.chunk(2, 1)[0], m["a"](x.chunk(2, 1)[1])], 1), a=conv(4, 4)),
    "grouped": lambda: Between(lambda m, x: F.relu(m["a"](x)), a=conv(r=3, groups=2)),
    "scale": lambda: Between(lambda m, x: x + m["scale"](m["conv"](x)), conv=conv(), scale=Scale(8)),
    "scale_of_images": lambda: Between(lambda m, x: m["scale"](m["conv"](x)), conv=conv(), scale=Scale(1, 8, 1, 1)),
    "scale_of_planes": lambda: Between(lambda m, x: m["scale"](x), scale=Scale(8, 1, 1)),
    "positions_added": lambda: Between(lambda m, x: F.relu(x + m["at"].gamma), at=Scale(1, 8, 6, 6)),
    "prelu": lambda: Between(lambda m, x: m["act"](m["conv"](x)), conv=conv(), act=nn.PReLU(8)),
    "gate": lambda: Between(lambda m, x: F.glu(m["conv"](x), 1), width=8, conv=conv(8, 16)),
    "transposed": lambda: Between(
        lambda m, x: m["up"](F.max_pool2d(m["conv"](x), 2)), conv=conv(), up=nn.ConvTranspose2d(8, 8, 2, 2)
    ),
    "unet": lambda: Between(
        lambda m, x: torch.cat([x, F.interpolate(m["conv"](F.max_pool2d(x, 2)), size=x.shape[2:])], 1),
        width=14, conv=conv(8, 6, 3),
    ),
    "ghost": lambda: Between(
        lambda m, x: torch.cat([a := m["a"](x), m["b"](a)], 1)[:, :6], width=6, a=conv(8, 4), b=conv(4, 4, 3, groups=4)
    ),
    "spatial": lambda: Between(spatial, conv=conv(2, 1, 3)),
    "along_channels": lambda: Between(along_channels, conv=nn.Conv1d(1, 1, 3, padding=1, bias=False)),
    "selective": lambda: Between(selective, a=conv(), b=conv(r=3), fc=conv(8, 16)),
    "attention": lambda: Between(attention, qkv=conv(8, 24)),
    "residuals": lambda: Between(
        lambda m, x: (y := x + m["a"](x)) + m["b"](F.relu(y)), a=conv_norm(8, 8), b=conv_norm(8, 8, act=False)
    ),
    "repeated": lambda: Between(lambda m, x: m["a"](F.relu(m["a"](x))), a=conv(r=3)),
    "plain_norm": lambda: Between(lambda m, x: F.relu(m["norm"](m["conv"](x))), conv=conv(), norm=PlainNorm(8)),
    "synced_norm": lambda: Between(lambda m, x: F.relu(m["norm"](m["conv"](x))), conv=conv(), norm=nn.SyncBatchNorm(8)),
    "mean": lambda: Between(lambda m, x: x - x.mean(1, keepdim=True)),
    "share": lambda: Between(lambda m, x: x.sum(1, keepdim=True) / x.shape[1] + x),
    "normalized": lambda: Between(lambda m, x: F.normalize(x, dim=1)),
    "softmax": lambda: Between(lambda m, x: x.softmax(1)),
    "flip": lambda: Between(lambda m, x: x.flip(1)),
    "ones": lambda: Between(lambda m, x: x + torch.ones_like(x)),
    "positions": lambda: Between(lambda m, x: x * torch.arange(x.shape[1], dtype=x.dtype)[:, None, None]),
    "deviation": lambda: Between(lambda m, x: x / (1 + x.std(1, keepdim=True))),
    "pixel_shuffle": lambda: Between(lambda m, x: F.pixel_unshuffle(F.pixel_shuffle(m["a"](x), 2), 2), a=conv()),
    "cumulated": lambda: Between(lambda m, x: x.cumsum(1) / 8),
    "response_norm": lambda: Between(lambda m, x: F.local_response_norm(x, 3)),
    "einsum": lambda: Between(lambda m, x: torch.einsum("nchw,ck->nkhw", x, m["fc"].weight), fc=nn.Linear(8, 8)),
}  # fmt: skip


def block(name, seed=0):
    """float64, with norms as after some training, masked but with everything live."""
    torch.manual_seed(seed)
    net = BLOCKS[name]().double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
    pk.convert(net)
    return net
