"""Masked 2-D convolutions in which pruned filters and kernels cost nothing, forward and backward."""

from . import methods, optim, plan, reference
from ._ext import build_info, has_extension, kernels
from .convert import Conversion, convert, restore
from .explain import Explanation, explain
from .flops import Flops, count_flops
from .flow import LiveTensor
from .flow.switch import flow
from .functional import gather_channels, masked_conv2d, scatter_channels
from .graph import Group, Tidied, coupled_groups, shrink, tidy_masks
from .masks import ConvMask
from .modules import MaskedConv2d
from .norm import MaskedBatchNorm2d

__version__ = "0.1.0"
__all__ = [
    "ConvMask",
    "Conversion",
    "Explanation",
    "Flops",
    "Group",
    "LiveTensor",
    "MaskedBatchNorm2d",
    "MaskedConv2d",
    "Tidied",
    "build_info",
    "convert",
    "count_flops",
    "coupled_groups",
    "explain",
    "flow",
    "gather_channels",
    "has_extension",
    "kernels",
    "masked_conv2d",
    "methods",
    "optim",
    "plan",
    "reference",
    "restore",
    "scatter_channels",
    "shrink",
    "tidy_masks",
]
