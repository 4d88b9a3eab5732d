"""Averages of a network's weights: torch's own, and what other libraries do, in a few lines each."""

import copy
import itertools

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import prunekernels as pk

DECAY = 0.9


def masked_net(norms=True, seed=0):
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d if norms else lambda channels: nn.GroupNorm(1, channels)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1, bias=False), norm(6), nn.ReLU(),
        nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    pk.convert(net)
    return net


class TorchAverage:
    """torch's AveragedModel, in all forms."""

    options = {}  # noqa: RUF012

    def __init__(self, net):
        self.holder = AveragedModel(net, **self.options)

    @property
    def network(self):
        return self.holder.module

    def update(self, net):
        self.holder.update_parameters(net)


class TorchEma(TorchAverage):
    options = {"multi_avg_fn": get_ema_multi_avg_fn(DECAY)}  # noqa: RUF012


class TorchEmaOfBuffers(TorchAverage):
    options = {"multi_avg_fn": get_ema_multi_avg_fn(DECAY), "use_buffers": True}  # noqa: RUF012


class TorchSingleEmaOfBuffers(TorchAverage):
    options = {"avg_fn": get_ema_avg_fn(DECAY), "use_buffers": True}  # noqa: RUF012


class ByStateDict(nn.Module):
    """As timm's ModelEmaV2: writes into the state dict of its module."""

    def __init__(self, net):
        super().__init__()
        self.module = copy.deepcopy(net).eval()

    @property
    def holder(self):
        return self

    @property
    def network(self):
        return self.module

    def update(self, net):
        with torch.no_grad():
            for mine, theirs in zip(self.module.state_dict().values(), net.state_dict().values(), strict=True):
                mine.copy_(DECAY * mine + (1.0 - DECAY) * theirs)


class ByLerpOfStateDict(ByStateDict):
    """As timm's ModelEmaV3: lerp of what floats, a copy of the rest."""

    def update(self, net):
        with torch.no_grad():
            for mine, theirs in zip(self.module.state_dict().values(), net.state_dict().values(), strict=True):
                if mine.is_floating_point():
                    mine.lerp_(theirs, 1 - DECAY)
                else:
                    mine.copy_(theirs)


class ByKeptStateDict:
    """As ultralytics' ModelEMA: keeps the tensors of both state dicts, and leaves alone what does not float."""

    def __init__(self, net):
        self.ema = copy.deepcopy(net).eval()
        self.pairs = None

    @property
    def holder(self):
        return self

    @property
    def network(self):
        return self.ema

    def update(self, net):
        if self.pairs is None:
            theirs = net.state_dict()
            floating = [(k, v) for k, v in self.ema.state_dict().items() if v.is_floating_point()]
            self.pairs = [v for _, v in floating], [theirs[k] for k, _ in floating]
        torch._foreach_lerp_(*self.pairs, 1 - DECAY)


def swap(average, net):
    """As Lightning's WeightAveraging around a validation: exchanges all values, past the version counters."""
    ours = itertools.chain(average.parameters(), average.buffers())
    theirs = itertools.chain(net.parameters(), net.buffers())
    for a, b in zip(ours, theirs, strict=True):
        kept = a.data.clone()
        a.data.copy_(b.data)
        b.data.copy_(kept)


AVERAGES = [
    TorchAverage,
    TorchEma,
    TorchEmaOfBuffers,
    TorchSingleEmaOfBuffers,
    ByStateDict,
    ByLerpOfStateDict,
    ByKeptStateDict,
]
