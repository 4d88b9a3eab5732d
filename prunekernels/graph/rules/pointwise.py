"""Rules of operators with one operand in which channels do not meet: f(x), pooling, reductions over space."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from ..build import Builder
from ..channels import Channels, NetworkChannels
from ..trace import apply, argument, op_name, sizes_of
from .base import Rule, TransparentRule, sizes_among


class PointwiseRule(TransparentRule):
    """f(x) element by element: a constant becomes f of it."""

    def values(self, node: fx.Node, values: Tensor) -> Tensor:
        if sizes_among(node):
            return torch.full_like(values, torch.nan)
        kwargs = {name: value for name, value in node.kwargs.items() if name not in ("device", "memory_format")}
        result = apply(node, values, *node.args[1:], **kwargs).double()
        return result.masked_fill(values.isnan(), torch.nan)  # some kernels lose a NaN


class FillRule(TransparentRule):
    """zeros_like and its kin: nothing of the operand but its shape."""

    fills = {"zeros_like": 0.0, "ones_like": 1.0}

    def values(self, node: fx.Node, values: Tensor) -> Tensor:
        return torch.full_like(values, self.fills[op_name(node)])


class DropoutRule(TransparentRule):
    """In eval mode nothing; the small network drops again when it trains."""

    layers = {
        "dropout": nn.Dropout,
        "feature_dropout": nn.Dropout2d,
        "alpha_dropout": nn.AlphaDropout,
    }

    needs_state = False  # a layer of the small network in any case

    def values(self, node: fx.Node, values: Tensor) -> Tensor:
        return zeros_only(values) if argument(node, 2) else values

    def backward(self, net: NetworkChannels, node: fx.Node) -> None:
        if net.tracked(node) is None:
            Rule.backward(self, net, node)
        else:
            super().backward(net, node)

    def emit(self, builder: Builder, node: fx.Node) -> fx.Node:
        if argument(node, 2):  # drops in eval mode too
            return super().emit(builder, node)
        layer = self.layers[op_name(node)](float(argument(node, 1)))
        where = builder.traced.module_of(node)
        is_own = type(builder.traced.modules.get(where)) is type(layer)
        return builder.layer(node, where if is_own else f"{where}.{node.name}".lstrip("."), layer, argument(node, 0))


class PoolRule(TransparentRule):
    """Pooling and resampling of planes; rounding and padding decide whether a constant stays what it is."""

    def __init__(self, constant: str) -> None:
        self.constant = constant  # "stays", or "zero": only zeros surely do, or "unpadded"

    def axis(self, node: fx.Node, x: Channels) -> int | None:
        return 1 if x.axis == 1 and len(sizes_of(argument(node, 0))) == 4 else None

    def values(self, node: fx.Node, values: Tensor) -> Tensor:
        stays = self.constant == "stays" or (self.constant == "unpadded" and len(node.args) <= 3)
        return values if stays else zeros_only(values)


class ReduceRule(TransparentRule):
    """Mean, sum, max over other dimensions than the channels."""

    def __init__(self, stays: bool) -> None:
        self.stays = stays

    def axis(self, node: fx.Node, x: Channels) -> int | None:
        ndim = len(sizes_of(argument(node, 0)))
        dims = argument(node, 1)
        if isinstance(dims, int):
            dims = [dims]
        reduced: list[int] = sorted(d % ndim for d in dims) if dims else []
        if not reduced or x.axis in reduced:
            return None
        keepdim = len(sizes_of(node)) == ndim
        return x.axis if keepdim else x.axis - sum(d < x.axis for d in reduced)

    def values(self, node: fx.Node, values: Tensor) -> Tensor:
        return values if self.stays else zeros_only(values)


def zeros_only(values: Tensor) -> Tensor:
    """Zeros stay; other constants count as live."""
    return torch.where(values == 0, values, torch.nan)


POINTWISE = (
    "relu relu6 hardtanh leaky_relu elu selu celu silu gelu hardswish hardsigmoid sigmoid tanh mish softplus softsign "
    "log_sigmoid hardshrink softshrink threshold abs neg square sqrt rsqrt exp log erf sin cos sign clamp clamp_min "
    "clamp_max pow clone contiguous detach alias to _to_copy"
)
POINTWISE_RULES: dict[str, Rule] = {
    **dict.fromkeys(POINTWISE.split(), PointwiseRule()),
    **dict.fromkeys(FillRule.fills, FillRule()),
    **dict.fromkeys(DropoutRule.layers, DropoutRule()),
    "max_pool2d": PoolRule("stays"),
    "adaptive_avg_pool2d": PoolRule("stays"),
    "avg_pool2d": PoolRule("unpadded"),
    "upsample_nearest2d": PoolRule("stays"),
    **dict.fromkeys(("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_nearest_exact2d"), PoolRule("zero")),
    **dict.fromkeys(("mean", "amax", "amin"), ReduceRule(stays=True)),
    "sum": ReduceRule(stays=False),
}
