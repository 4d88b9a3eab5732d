"""The small network that a training leaves, as text: its masks. Built anew from them, with new weights."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

import prunekernels as pk
from prunekernels.train import setup
from prunekernels.train.config import Config
from prunekernels.train.data import Data
from prunekernels.train.models import with_new_weights, zero_kernels

KINDS = ("filter_mask", "input_mask", "kernel_mask", "channel_mask")  # what hard_mask kills, filter_mask kills as well


def masks_of(model: nn.Module) -> dict[str, str]:
    """The masks of a network, by kind: the bits of all layers in a row, 1 = live, as a hex number. A kind in which all
    is live is left out."""
    found = {}
    for kind in KINDS:
        bits = np.concatenate([mask.flatten().cpu().numpy() for mask in _masks(model, kind)] or [np.ones(1, bool)])
        if not bits.all():
            found[kind] = np.packbits(bits).tobytes().hex()
    return found


def set_masks(model: nn.Module, masks: Mapping[str, str]) -> None:
    """Gives a masked network the masks that masks_of returned for one of the same kind."""
    for kind, text in masks.items():
        bits = torch.from_numpy(np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))).bool()
        for mask in _masks(model, kind):
            mask.copy_(bits[: mask.numel()].view(mask.shape))
            bits = bits[mask.numel() :]


def _masks(model: nn.Module, kind: str) -> list[Tensor]:
    """Those of all layers that have the kind; they may be edited in place."""
    return [getattr(module, kind) for module in model.modules() if kind in dict(module.named_buffers(recurse=False))]


def live_counts(model: nn.Module) -> list[int]:
    """How many filters of each convolution are live."""
    return [int(mask.sum()) for mask in _masks(model, "filter_mask")]


def masked_network(config: Config, data: Data, masks: Mapping[str, str]) -> nn.Module:
    """A network with these masks and new weights, in masked mode."""
    model = setup.network(config, data)
    pk.convert(model)
    set_masks(model, masks)
    return model


def shrunk_to(config: Config, data: Data, masks: Mapping[str, str]) -> nn.Module:
    """The small network that these masks leave, in training mode, with new weights; dead kernels are zeros, and stay
    zeros in training."""
    model = masked_network(config, data, masks)
    example = data.normalised(data.test.images[:2]).to(next(model.parameters()).device)
    with contextlib.redirect_stdout(io.StringIO()):
        small = pk.shrink(model.train(), example, form="graph")
    return with_new_weights(small)


def key_of(small: nn.Module) -> str:
    """A name for an architecture: what two networks share that differ in the values of their weights alone. Masks that
    leave as many filters and kernels of each layer, but others, leave the same architecture."""
    shapes = [
        f"{name.rpartition('.')[2]} {tuple(p.shape)} {int(zero_kernels(p).sum()) if p.dim() == 4 else 0}"
        for name, p in small.named_parameters()
    ]
    digest = hashlib.sha256("; ".join(shapes).encode()).hexdigest()[:8]
    return f"{sum(p.numel() for p in small.parameters())}-{digest}"
