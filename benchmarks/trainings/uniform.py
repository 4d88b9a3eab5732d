"""The one rate of all layers that leaves as many multiply-adds as a budget does."""

from __future__ import annotations

import torch

import prunekernels as pk
from prunekernels.train import setup
from prunekernels.train.data import Data
from trainings.spec import RATE, Setting, Spec

DIGITS = 10_000  # rates are multiples of 1 / this


def uniform_rate(arch: str, setting: Setting, data: Data) -> float:
    """The largest rate that leaves at least 1 - RATE of the multiply-adds: in doubt the rival of a budget is larger."""
    low, high = 0, round(RATE * DIGITS)  # with RATE of the filters far more of the multiply-adds are gone
    while high - low > 1:
        middle = (low + high) // 2
        if left_by(arch, middle / DIGITS, setting, data) >= 1 - RATE:
            low = middle
        else:
            high = middle
    return low / DIGITS


def left_by(arch: str, rate: float, setting: Setting, data: Data) -> float:
    """The share of the multiply-adds that a rate of all layers leaves, with joint coupling."""
    config = Spec(arch, "dense", 0, 1).config(setting)
    model = setup.network(config, data)
    pk.convert(model)
    optimizer = setup.optimizer_of(config, model)
    example = data.normalised(data.test.images[:1])
    options = {"coupling": "joint", "example_input": example, "norms": True, "duty": 1.0}
    method = pk.methods.SFP(model, optimizer, rate=rate, epochs=1, **options)
    with method.masked(), torch.no_grad():
        pk.flow(model)
        flops = pk.count_flops(model, example)
    return flops.live / flops.dense
