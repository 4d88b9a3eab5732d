"""Rules of operators with one operand in which channels do not meet: f(x), pooling, reductions over space."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from ...op_facts import FACTS, operators
from ..build import Builder
from ..channels import Channels, NetworkChannels
from ..trace import apply, argument, op_name, sizes_of
from .base import Rule, TransparentRule, sizes_among


class PointwiseRule(TransparentRule):
    """y = f(x) for every element alone: a constant c becomes f(c)."""

    def values(self, node: fx.Node, values: Tensor) -> Tensor:
        if sizes_among(node):
            return torch.full_like(values, torch.nan)
        kwargs = {name: value for name, value in node.kwargs.items() if name not in ("device", "memory_format")}
        result = apply(node, values, *node.args[1:], **kwargs).double()
        return result.masked_fill(values.isnan(), torch.nan)  # some operators turn NaN into a number


class FillRule(TransparentRule):
    """zeros_like, ones_like: only the shape of the operand matters."""

    fills = {"zeros_like": 0.0, "ones_like": 1.0}

    def values(self, node: fx.Node, values: Tensor) -> Tensor:
        return torch.full_like(values, self.fills[op_name(node)])


def zeros_only(values: Tensor) -> Tensor:
    """Constants of which only zeros are sure to stay: the others count as live."""
    return torch.where(values == 0, values, torch.nan)


class DropoutRule(TransparentRule):
    """Identity in eval mode; becomes a layer of the small network, which drops again when it trains."""

    layers = {
        "dropout": nn.Dropout,
        "feature_dropout": nn.Dropout2d,
        "alpha_dropout": nn.AlphaDropout,
    }

    needs_state = False  # becomes a layer whether its channels are followed or not

    def values(self, node: fx.Node, values: Tensor) -> Tensor:
        if FACTS[op_name(node)].keeps == "nothing":  # in training not even zeros stay
            return torch.full_like(values, torch.nan)
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


class SpatialRule(TransparentRule):
    """Combines the pixels of a channel; op_facts says whether a constant stays what it is."""

    def values(self, node: fx.Node, values: Tensor) -> Tensor:
        keeps = FACTS[op_name(node)].keeps
        stays = keeps == "constant" or (keeps == "unpadded" and len(node.args) <= 3)
        return values if stays else zeros_only(values)


class PoolRule(SpatialRule):
    """Pooling and resampling of planes."""

    def axis(self, node: fx.Node, x: Channels) -> int | None:
        return 1 if x.axis == 1 and len(sizes_of(argument(node, 0))) == 4 else None


class ReduceRule(SpatialRule):
    """Mean, sum, max over other dimensions than the channels."""

    @staticmethod
    def dims(node: fx.Node) -> list[int]:
        """The dimensions that it reduces, sorted."""
        ndim, dims = len(sizes_of(argument(node, 0))), argument(node, 1)
        return sorted(d % ndim for d in ([dims] if isinstance(dims, int) else dims or []))

    def axis(self, node: fx.Node, x: Channels) -> int | None:
        reduced = self.dims(node)
        if not reduced or x.axis in reduced:
            return None
        keepdim = len(sizes_of(node)) == len(sizes_of(argument(node, 0)))
        return x.axis if keepdim else x.axis - sum(d < x.axis for d in reduced)


class SoftmaxRule(TransparentRule):
    """softmax over another dimension than the channels."""

    @staticmethod
    def dims(node: fx.Node) -> list[int]:
        return [argument(node, 1) % len(sizes_of(argument(node, 0)))]

    def axis(self, node: fx.Node, x: Channels) -> int | None:
        return None if x.axis in self.dims(node) else x.axis

    def values(self, node: fx.Node, values: Tensor) -> Tensor:
        return torch.full_like(values, torch.nan)


class SelectRule(TransparentRule):
    """select: one entry of another dimension than the channels."""

    def axis(self, node: fx.Node, x: Channels) -> int | None:
        dim = argument(node, 1) % len(sizes_of(argument(node, 0)))
        return None if dim == x.axis else x.axis - (dim < x.axis)


POOLS = (
    "max_pool2d adaptive_avg_pool2d avg_pool2d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d "
    "_upsample_nearest_exact2d"
)
POINTWISE_RULES: dict[str, Rule] = {
    **dict.fromkeys(operators("pointwise", "copy"), PointwiseRule()),
    **dict.fromkeys(FillRule.fills, FillRule()),
    **dict.fromkeys(DropoutRule.layers, DropoutRule()),
    **dict.fromkeys(POOLS.split(), PoolRule()),
    **dict.fromkeys(("mean", "amax", "amin", "sum"), ReduceRule()),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax"), SoftmaxRule()),
    "select": SelectRule(),
}
