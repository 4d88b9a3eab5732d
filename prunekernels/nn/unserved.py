"""Convolutions that have no masked form, and what to do instead."""

from __future__ import annotations

from torch import nn

_ADVICE: dict[type[nn.Module], str] = {
    nn.Conv1d: "see the signal as an image of height 1: nn.Conv2d with kernel_size (1, k) on x.unsqueeze(2)",
    nn.ConvTranspose1d: "see the signal as an image of height 1: nn.ConvTranspose2d with kernel_size (1, k) on "
    "x.unsqueeze(2)",
    nn.Conv3d: "it stays dense; a kernel of depth 1 is an nn.Conv2d on each slice",
    nn.ConvTranspose3d: "it stays dense; a kernel of depth 1 is an nn.ConvTranspose2d on each slice",
}


def why_unserved(module: nn.Module) -> str | None:
    """Why a 1-d or 3-d convolution has no masked form, and what to do instead; None: it is no such layer."""
    for kind, advice in _ADVICE.items():
        if isinstance(module, kind):
            return f"{kind.__name__} has no masked form: {advice}"
    return None
