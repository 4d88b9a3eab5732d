"""Adapts a classifier from Fashion-MNIST's items to the same kind of items on textures, which have no labels, by DANN
(domain-adversarial training), while PGP prunes its feature extractor.

python examples/adapt_fashion.py --seeds 0 1 2 --md adapt.md

Beside it train the dense network, with and without adaptation, and, from new weights, the small one that PGP ends with
("scratch").
"""

import math
import time

import torch
from fashion.comparison import Items, Result, compare, items_of, parser
from torch import Tensor, nn
from torch.nn import functional as F

import prunekernels as pk


def reversed_gradient(x: Tensor, strength: float) -> Tensor:
    """x itself, whose gradient is -strength times what comes in."""
    return x.detach() + strength * (x.detach() - x)


def block(inputs: int, filters: int) -> nn.Module:
    conv = nn.Conv2d(inputs, filters, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(filters), nn.ReLU())


class Adapted(nn.Module):
    """A feature extractor with two heads: the item's class, and the domain, whose gradients reach it reversed."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            block(1, width), nn.MaxPool2d(2), block(width, 2 * width), block(2 * width, 2 * width), nn.MaxPool2d(2),
            block(2 * width, 4 * width), block(4 * width, 4 * width), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.classes = nn.Linear(4 * width, 10)
        self.domain = nn.Sequential(nn.Linear(4 * width, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor, strength: float = 0.0) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        return self.classes(features), self.domain(reversed_gradient(features, strength)).flatten()


def on_textures(images: Tensor, generator: torch.Generator) -> Tensor:
    """The images [N, 1, 28, 28], in [0, 1], before a smooth random texture each: |image - texture|."""
    coarse = torch.rand(len(images), 1, 8, 8, generator=generator)
    texture = F.interpolate(coarse, 28, mode="bicubic").clamp(0, 1)
    return (images - texture).abs()
