"""Which functions a saved network may call, by name. Nothing outside these lists is ever looked up."""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import Unsupported

# Of torch, torch.nn.functional, tensors' methods and ATen, each with its form that writes in place ("relu_"). They
# compute tensors from tensors: none reads or writes files, runs code or reaches into memory that is not a tensor's.
TENSOR_OPERATIONS = frozenset(
    "abs absolute adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "add addcdiv addcmul addmm affine_grid alias alpha_dropout amax amin any all arange argmax argmin argsort atan "
    "avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bernoulli bfloat16 bmm bool broadcast_to cat ceil celu "
    "channel_shuffle chunk clamp clamp_max clamp_min clip clone concat constant_pad_nd contiguous conv1d conv2d conv3d "
    "conv_transpose1d conv_transpose2d conv_transpose3d copy cos cumprod cumsum detach diff dim div dot double dropout "
    "dropout1d dropout2d dropout3d einsum elu embedding empty_like eq erf exp expand expand_as expm1 eye "
    "feature_alpha_dropout feature_dropout fill flatten flip float floor floor_divide fmod fold full full_like gather "
    "ge gelu glu grid_sample grid_sampler group_norm gt half hardshrink hardsigmoid hardswish hardtanh index "
    "index_select instance_norm int interpolate isfinite isinf isnan layer_norm le leaky_relu lerp lift_fresh_copy "
    "linear linspace local_response_norm log log10 log1p log2 log_softmax logical_and logical_not logical_or "
    "logical_xor logsigmoid logsumexp long lp_pool2d lt masked_fill matmul max max_pool1d max_pool2d max_pool3d "
    "max_pool2d_with_indices maximum mean min minimum mish mm movedim mul multiply narrow ne neg new_empty new_full "
    "new_ones new_zeros norm normalize numel one_hot ones ones_like outer pad permute pixel_shuffle pixel_unshuffle "
    "pow prelu prod rand rand_like randn randn_like reciprocal reflection_pad1d reflection_pad2d relu relu6 remainder "
    "repeat repeat_interleave replication_pad1d replication_pad2d reshape reshape_as rms_norm roll round rrelu rsqrt "
    "rsub scaled_dot_product_attention select selu sigmoid sign silu sin size slice softmax softmin softplus "
    "softshrink softsign split split_with_sizes sqrt square squeeze stack std std_mean sub subtract sum swapaxes "
    "sym_float sym_max sym_min sym_size t tanh tanhshrink tensor_split threshold tile to topk transpose tril triu "
    "true_divide type_as unbind unflatten unfold unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_nearest2d "
    "var var_mean view view_as where zero zeros zeros_like _to_copy _unsafe_view".split()
)
OPERATORS = frozenset(
    "add sub mul truediv floordiv mod pow matmul neg pos abs getitem eq ne lt le gt ge is_ is_not and_ or_ xor invert "
    "not_ iadd isub imul itruediv ifloordiv".split()
)
MATH = frozenset("ceil floor sqrt trunc".split())
ATTRIBUTES = frozenset("shape dtype device ndim T mT is_cuda".split())  # of getattr
ASSERT = "torch._assert"
GETATTR = "builtins.getattr"


def _is_tensor_operation(name: str) -> bool:
    return name in TENSOR_OPERATIONS or (name.endswith("_") and name[:-1] in TENSOR_OPERATIONS)


def _functions() -> dict[str, Callable[..., Any]]:
    """All functions by name, but for ATen's operators."""
    found: dict[str, Callable[..., Any]] = {ASSERT: torch._assert, GETATTR: builtins.getattr}
    in_place = {f"{name}_" for name in TENSOR_OPERATIONS}
    for room, module, names in (
        ("torch.nn.functional", F, TENSOR_OPERATIONS | in_place),
        ("torch", torch, TENSOR_OPERATIONS | in_place),
        ("operator", operator, OPERATORS),
        ("math", math, MATH),
    ):
        for name in sorted(names):
            function = getattr(module, name, None)
            if callable(function) and not isinstance(function, type):
                found[f"{room}.{name}"] = function
    return found


FUNCTIONS = _functions()
_NAMES = {function: name for name, function in reversed(FUNCTIONS.items())}


def name_of(target: Any) -> str:
    """The name of a function that a graph calls; raises Unsupported for one that is in no list."""
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        if namespace == "aten" and _is_tensor_operation(name):
            return f"aten.{name}.{target._overloadname}"
        raise Unsupported(f"the operator {target}")
    try:
        return _NAMES[target]
    except (KeyError, TypeError):
        where = getattr(target, "__module__", None) or "unknown"
        raise Unsupported(f"the function {where}.{getattr(target, '__name__', target)}") from None


def function_of(name: str) -> Callable[..., Any]:
    """The function of a name; raises Unsupported for one that is in no list."""
    room, *rest = name.split(".")
    if room == "aten" and len(rest) == 2 and _is_tensor_operation(rest[0]) and rest[1].replace("_", "a").isalnum():
        packet = getattr(torch.ops.aten, rest[0], None)
        overload = getattr(packet, rest[1], None)
        if isinstance(overload, torch._ops.OpOverload):
            return overload
    elif name in FUNCTIONS:
        return FUNCTIONS[name]
    raise Unsupported(f"the function {name[:100]!r}")


def check_method(name: str) -> str:
    """The name of a method of tensors; raises Unsupported for one that is in no list."""
    if not _is_tensor_operation(name) or not hasattr(Tensor, name):
        raise Unsupported(f"the method {name[:100]!r}")
    return name


def check_attribute(function: str, args: Any) -> None:
    """Raises Unsupported for a call of getattr that asks for an attribute in no list."""
    if function == GETATTR and (len(args) != 2 or args[1] not in ATTRIBUTES):
        raise Unsupported(f"the attribute {str(args[1:])[:100]}")
