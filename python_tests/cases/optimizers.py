"""Optimizers whose steps are element by element, and masks and batches to train with."""

import functools

import torch

from cases.compacted import batches, mask_small, small_images
from prunekernels.optim import MaskedAdamW, MaskedSGD

DECAY = {"weight_decay": 0.1}
SGD = functools.partial(torch.optim.SGD, lr=0.05)
ADAM = {"lr": 0.01, "eps": 1e-3}
OPTIMIZERS = {
    "sgd": SGD,
    "sgd_momentum": functools.partial(SGD, momentum=0.9, dampening=0.1, **DECAY),
    "sgd_nesterov": functools.partial(SGD, momentum=0.9, nesterov=True, **DECAY),
    "sgd_maximize": functools.partial(torch.optim.SGD, lr=0.001, momentum=0.5, maximize=True, **DECAY),
    "sgd_foreach": functools.partial(SGD, momentum=0.9, foreach=True, **DECAY),
    "sgd_fused": functools.partial(SGD, momentum=0.9, fused=True, **DECAY),
    "adam_amsgrad": functools.partial(torch.optim.Adam, amsgrad=True, **ADAM, **DECAY),
    "adamw": functools.partial(torch.optim.AdamW, foreach=False, **ADAM, **DECAY),
    "adamw_foreach": functools.partial(torch.optim.AdamW, foreach=True, **ADAM, **DECAY),
    "adamw_fused": functools.partial(torch.optim.AdamW, fused=True, **ADAM, **DECAY),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=0.01, centered=True, momentum=0.9, eps=1e-3, **DECAY),
    "adagrad": functools.partial(torch.optim.Adagrad, lr=0.01, eps=1e-3, initial_accumulator_value=0.1, **DECAY),
    "nadam": functools.partial(torch.optim.NAdam, decoupled_weight_decay=True, **ADAM, **DECAY),
    "radam": functools.partial(torch.optim.RAdam, **ADAM, **DECAY),
    "adamax": functools.partial(torch.optim.Adamax, **ADAM, **DECAY),
    "adadelta": functools.partial(torch.optim.Adadelta, eps=1e-3, **DECAY),
    "asgd": functools.partial(torch.optim.ASGD, t0=2, **DECAY),
    "masked_sgd": functools.partial(MaskedSGD, lr=0.05, momentum=0.9, nesterov=True, **DECAY),
    "masked_adamw": functools.partial(MaskedAdamW, **ADAM, **DECAY),
}
X = small_images()


def over(name):
    return lambda net: OPTIMIZERS[name](net.parameters())


def masks(seed, hard=True):
    return functools.partial(mask_small, seed=seed, hard=hard)


ROUNDS = ((masks(1), batches(seed=1)), (masks(2), batches(seed=2)), (masks(1), batches(seed=3)))
