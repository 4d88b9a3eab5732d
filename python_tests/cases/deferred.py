"""Layers whose norms leave their second half to what follows."""

import torch
from torch import nn

import prunekernels as pk

WIDTH = 8
LIVE = torch.arange(WIDTH) % 3 != 1


class TwoNorms(nn.Module):
    """Two convolutions, a norm behind each, and a head for results of either, masked alike; programs call them."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, WIDTH, 3, bias=False), nn.BatchNorm2d(WIDTH)
        self.other, self.other_norm = nn.Conv2d(3, WIDTH, 3, bias=False), nn.BatchNorm2d(WIDTH)
        self.head = nn.Conv2d(WIDTH, 2, 1)
        pk.convert(self)
        for layer in (self.conv, self.other):
            layer.set_masks(filter=LIVE)
        for norm in (self.norm, self.other_norm):
            norm.set_mask(LIVE)
            nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
        self.head.set_masks(input=LIVE)
