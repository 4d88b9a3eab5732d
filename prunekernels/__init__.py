"""Masked 2-D convolutions in which pruned filters and kernels cost nothing, forward and backward."""

from . import plan, reference
from ._ext import build_info, has_extension, kernels
from .convert import Conversion, convert, restore
from .flow import LiveTensor
from .flow.switch import flow
from .functional import gather_channels, masked_conv2d, scatter_channels
from .masks import ConvMask
from .modules import MaskedConv2d
from .norm import MaskedBatchNorm2d

__version__ = "0.1.0"
__all__ = [
    "ConvMask",
    "Conversion",
    "LiveTensor",
    "MaskedBatchNorm2d",
    "MaskedConv2d",
    "build_info",
    "convert",
    "flow",
    "gather_channels",
    "has_extension",
    "kernels",
    "masked_conv2d",
    "plan",
    "reference",
    "restore",
    "scatter_channels",
]
