"""Masked 2-D convolutions in which pruned filters and kernels cost nothing, forward and backward."""

from . import methods, optim, plan, reference
from .compaction.context import compacted
from .deploy.load import load_small
from .deploy.save import save_small
from .functional import gather_channels, masked_conv2d, scatter_channels
from .graph import Group, Tidied, coupled_groups, tidy_masks
from .graph.shrink import shrink
from .inspect.explain import Explanation, explain
from .inspect.flops import Flops, count_flops
from .inspect.modes import ModeTimes, time_modes
from .live import LiveTensor
from .masks import ConvMask
from .methods.uniform_rate import rate_for
from .nn.adapters import register_adapter
from .nn.batch_norm import MaskedBatchNorm2d
from .nn.conv import MaskedConv2d
from .nn.conv_transpose import MaskedConvTranspose2d
from .nn.convert import Conversion, convert, restore
from .nn.copy_masks import copy_masks
from .nn.example import Example
from .nn.flow import flow
from .nn.group_norm import MaskedGroupNorm
from .nn.layer_norm import MaskedLayerNorm
from .nn.linear import MaskedLinear
from .nn.ranks import check_same_masks
from .nn.sync_batch_norm import MaskedSyncBatchNorm
from .nn.sync_convert import convert_sync_batchnorm
from .ops import gpus as _gpus  # noqa: F401 (asks for the GPUs once torch starts CUDA)
from .ops.extension import build_info, has_extension, kernels
from .optim.live_gradients import LiveGradients, live_gradients_hook

__version__ = "0.1.0"
__all__ = [
    "ConvMask",
    "Conversion",
    "Example",
    "Explanation",
    "Flops",
    "Group",
    "LiveGradients",
    "LiveTensor",
    "MaskedBatchNorm2d",
    "MaskedConv2d",
    "MaskedConvTranspose2d",
    "MaskedLinear",
    "MaskedGroupNorm",
    "MaskedLayerNorm",
    "MaskedSyncBatchNorm",
    "ModeTimes",
    "Tidied",
    "build_info",
    "check_same_masks",
    "compacted",
    "convert",
    "convert_sync_batchnorm",
    "copy_masks",
    "count_flops",
    "coupled_groups",
    "explain",
    "flow",
    "gather_channels",
    "has_extension",
    "kernels",
    "live_gradients_hook",
    "load_small",
    "masked_conv2d",
    "methods",
    "optim",
    "plan",
    "rate_for",
    "reference",
    "register_adapter",
    "restore",
    "save_small",
    "scatter_channels",
    "shrink",
    "tidy_masks",
    "time_modes",
]
