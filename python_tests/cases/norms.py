"""Networks with group and layer norms, and masks for them."""

import torch
from torch import nn

import prunekernels as pk

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Residual(nn.Module):
    """A block with a shortcut; norm(12) makes its norms."""

    def __init__(self, norm):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 12, 3), norm(12)
        self.conv1, self.norm1 = nn.Conv2d(12, 12, 3, padding=1), norm(12)
        self.conv2, self.norm2 = nn.Conv2d(12, 12, 3, padding=1), norm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.norm0(self.stem(x)).relu()
        x = (x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))).relu()
        return self.head(x.mean((2, 3)))


class ChannelsLast(nn.Module):
    """As in ConvNeXt: layer norm and linear layers over channels that a permute has brought to the end."""

    def __init__(self):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 20), nn.Linear(20, 6)
        self.head = nn.Conv2d(6, 5, 1)

    def forward(self, x):
        x = self.norm(self.depthwise(self.stem(x)).permute(0, 2, 3, 1))
        x = self.down(torch.nn.functional.gelu(self.up(x))).permute(0, 3, 1, 2)
        return self.head(x).mean((2, 3))


class LayerNorm2d(nn.LayerNorm):
    """As timm and torchvision have it."""

    def forward(self, x):
        y = nn.functional.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)


LayerNorm2d.__module__ = "torchvision.models.convnext"
NETWORKS = {
    "groups": lambda: Residual(lambda C: nn.GroupNorm(4, C)),
    "one group": lambda: Residual(lambda C: nn.GroupNorm(1, C)),
    "a group each": lambda: Residual(lambda C: nn.GroupNorm(C, C)),
    "no factors": lambda: Residual(lambda C: nn.GroupNorm(4, C, affine=False)),
    "channels first": lambda: Residual(LayerNorm2d),
    "channels last": ChannelsLast,
    "masked linears": ChannelsLast,
}


def network(name, seed=0):
    """Converted, in float64, with factors that differ."""
    torch.manual_seed(seed)
    net = NETWORKS[name]().double()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and module.weight is not None:
                module.weight.uniform_(0.5, 1.5), module.bias.uniform_(-0.5, 0.5)
    pk.convert(net, linears=name == "masked linears")
    return net


def mask(net, how, seed=0):
    """Masks over half of the channels: of joint groups, or of each layer and the norm behind it ("alone")."""
    gen = torch.Generator().manual_seed(seed)

    def half(count):
        keep = torch.rand(count, generator=gen) > 0.5
        keep[int(torch.randint(count, (), generator=gen))] = True
        return keep

    for group in pk.coupled_groups(net, X) if how == "joint" else ():
        if not group.is_output:
            group.set_masks(net, half(group.width))
    pairs = (("stem", "norm0"), ("conv1", "norm1"), ("conv2", "norm2"), ("stem", "norm"))
    for conv, norm in pairs if how == "alone" else ():
        if hasattr(net, conv) and hasattr(net, norm):
            keep = half(12)
            getattr(net, conv).set_masks(filter=keep), getattr(net, norm).set_mask(keep)
    if how == "norms":
        for module in net.modules():
            if isinstance(module, (pk.MaskedGroupNorm, pk.MaskedLayerNorm)):
                module.set_mask(half(12))
    return net
