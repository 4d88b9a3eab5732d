"""Networks with transposed convolutions."""

import torch
from torch import nn


def stage(channels, width):
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


class UNet(nn.Module):
    """Two levels: transposed convolutions on the way up, whose results are joined with those of the way down."""

    def __init__(self, width=8, out=2):
        super().__init__()
        self.first, self.second, self.bottom = stage(3, width), stage(width, 2 * width), stage(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.back2 = stage(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 3, stride=2, padding=1, output_padding=1)
        self.back1 = stage(2 * width, width)
        self.head = nn.Conv2d(width, out, 1)

    def forward(self, x):
        pool = nn.functional.max_pool2d
        a = self.first(x)
        b = self.second(pool(a, 2))
        c = self.up2(self.bottom(pool(b, 2)))
        b = self.back2(torch.cat([c, b], 1))
        return self.head(self.back1(torch.cat([self.up1(b), a], 1)))


class Adding(nn.Module):
    """A transposed convolution whose result is added to that of a convolution, in groups or not."""

    def __init__(self, groups=1):
        super().__init__()
        self.low, self.high = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 12, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 12, 2, stride=2, groups=groups)
        self.last = nn.ConvTranspose2d(12, 4, 3, padding=1)

    def forward(self, x):
        low = self.low(nn.functional.max_pool2d(x, 2)).relu()
        return self.last((self.up(low) + self.high(x)).relu())
