"""Rules: how one ATen operator carries channels, who reads them, and how a small network computes it.

An operator without a rule takes and gives full width: everything that enters it is read, all that leaves it is live.
"""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from ..channels import Channels, Flow, State
from ..trace import apply, argument, sizes_of, value_of

if TYPE_CHECKING:
    from ..build import Build


class Rule:
    """The rule of operators that have none."""

    needs_state = True

    def forward(self, flow: Flow, node: fx.Node) -> State:
        """Channels of the result; None: not to be followed."""
        return None

    def backward(self, flow: Flow, node: fx.Node) -> None:
        """Marks what the node reads of its arguments."""
        for read in node.all_input_nodes:
            state = flow.tracked(read)
            if state is not None:
                state.read[:] = True
            if flow.traced.is_parameter(read):
                flow.pin_parameter(read)

    def operands(self, build: Build, node: fx.Node) -> list[fx.Node]:
        """Arguments that the small network has to compute."""
        return node.all_input_nodes

    def emit(self, build: Build, node: fx.Node) -> fx.Node:
        return build.copy(node)


UNKNOWN = Rule()


class SizeRule(Rule):
    """The size of a dimension, and arithmetic on sizes: reads no channel."""

    needs_state = False

    def backward(self, flow: Flow, node: fx.Node) -> None:
        pass

    def emit(self, build: Build, node: fx.Node) -> fx.Node:
        if node.target is torch.ops.aten.sym_size.int:
            return build.call_method(node, "size", (build.compact(argument(node, 0)), argument(node, 1)))
        return build.copy(node)


class TransparentRule(Rule):
    """One operand, every channel for itself. A subclass says where the axis goes and what becomes of a constant."""

    def axis(self, node: fx.Node, x: Channels) -> int | None:
        return x.axis

    def values(self, node: fx.Node, values: Tensor) -> Tensor:
        return values

    def forward(self, flow: Flow, node: fx.Node) -> State:
        x = flow.tracked(argument(node, 0))
        axis = None if x is None else self.axis(node, x)
        if x is None or axis is None or len(node.all_input_nodes) != 1 + len(_sizes_among(node)):
            return None
        return Channels.of(axis, self.values(node, x.values), x.ids)

    def backward(self, flow: Flow, node: fx.Node) -> None:
        x, out = flow.ends(node)
        x.read |= out.needed

    def emit(self, build: Build, node: fx.Node) -> fx.Node:
        return build.copy(node, compact=node.args[:1])


def _sizes_among(node: fx.Node) -> list[fx.Node]:
    """Arguments that are symbolic sizes."""
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.SymInt)]


class PointwiseRule(TransparentRule):
    """f(x) element by element: a constant becomes f of it."""

    def values(self, node: fx.Node, values: Tensor) -> Tensor:
        if _sizes_among(node):
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

    def backward(self, flow: Flow, node: fx.Node) -> None:
        if flow.tracked(node) is None:
            Rule.backward(self, flow, node)
        else:
            super().backward(flow, node)

    def emit(self, build: Build, node: fx.Node) -> fx.Node:
        if argument(node, 2):  # drops in eval mode too
            return super().emit(build, node)
        layer = self.layers[op_name(node)](float(argument(node, 1)))
        where = build.traced.module_of(node)
        is_own = type(build.traced.modules.get(where)) is type(layer)
        return build.layer(node, where if is_own else f"{where}.{node.name}".lstrip("."), layer, argument(node, 0))


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


class ReshapeRule(TransparentRule):
    """view, flatten, squeeze, ...: the channels stay a dimension, or become blocks of columns of one."""

    def axis(self, node: fx.Node, x: Channels) -> int | None:
        before, after = sizes_of(argument(node, 0)), sizes_of(node)
        left, right = math.prod(before[: x.axis]), math.prod(before[x.axis + 1 :])
        for axis, size in enumerate(after):
            block = size // len(x)
            same = block * math.prod(after[axis + 1 :]) == right and math.prod(after[:axis]) == left
            if size == block * len(x) and size > 1 and same:
                return axis
        return None

    def forward(self, flow: Flow, node: fx.Node) -> State:
        out = super().forward(flow, node)
        if isinstance(out, Channels):
            if type(value_of(node).shape[out.axis]) is not int:
                return None
            block = sizes_of(node)[out.axis] // len(out)
            out = Channels.of(out.axis, out.values.repeat_interleave(block), out.ids.repeat_interleave(block))
        return out

    def backward(self, flow: Flow, node: fx.Node) -> None:
        x, out = flow.ends(node)
        x.read |= out.needed.view(len(x), -1).any(1)

    def emit(self, build: Build, node: fx.Node) -> fx.Node:
        aten, name = torch.ops.aten, op_name(node)
        x = build.compact(argument(node, 0))
        if name in ("view", "reshape", "_unsafe_view"):
            sizes = list(argument(node, 1))
            axis = build.axis(node)
            sizes[axis] = -1 if sizes[axis] == -1 else build.count(node)
            return build.call_method(node, "reshape", (x, [build.size(size) for size in sizes]))
        if node.target is aten.squeeze.default:  # or it would squeeze a single channel that is left
            ones = [dim for dim, size in enumerate(sizes_of(argument(node, 0))) if size == 1]
            return build.call(node, aten.squeeze.dims, (x, ones))
        return build.copy(node, compact=node.args[:1])


class ExpandRule(TransparentRule):
    """expand to given sizes."""

    def axis(self, node: fx.Node, x: Channels) -> int | None:
        axis = x.axis + len(sizes_of(node)) - len(sizes_of(argument(node, 0)))
        return axis if sizes_of(node)[axis] == len(x) else None

    def emit(self, build: Build, node: fx.Node) -> fx.Node:
        sizes = list(argument(node, 1))
        sizes[build.axis(node)] = -1
        x = build.compact(argument(node, 0))
        return build.call_method(node, "expand", (x, [build.size(size) for size in sizes]))


class PermuteRule(TransparentRule):
    def axis(self, node: fx.Node, x: Channels) -> int | None:
        order = list(range(len(sizes_of(argument(node, 0)))))
        if op_name(node) == "permute":
            order = [order[d] for d in argument(node, 1)]
        else:
            i, j = argument(node, 1), argument(node, 2)
            order[i], order[j] = order[j], order[i]
        return order.index(x.axis)


def zeros_only(values: Tensor) -> Tensor:
    """Zeros stay; other constants count as live."""
    return torch.where(values == 0, values, torch.nan)


def op_name(node: fx.Node) -> str:
    """ "relu" for aten.relu.default and aten.relu_.default."""
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None or not schema.name.startswith("aten::") else schema.name.removeprefix("aten::")


def rule_for(node: fx.Node) -> Rule:
    from .elementwise import JOINS
    from .layers import LAYERS
    from .slicing import PIECES

    if node.op == "call_function" and (node.target is torch.ops.aten.sym_size.int or _is_size_arithmetic(node)):
        return SIZE
    if node.target is operator.getitem:
        return PIECES["getitem"]
    name = op_name(node)
    return next((rules[name] for rules in (TRANSPARENT, JOINS, PIECES, LAYERS) if name in rules), UNKNOWN)


def _is_size_arithmetic(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, int))


SIZE = SizeRule()
POINTWISE = (
    "relu relu6 hardtanh leaky_relu elu selu celu silu gelu hardswish hardsigmoid sigmoid tanh mish softplus softsign "
    "log_sigmoid hardshrink softshrink threshold abs neg square sqrt rsqrt exp log erf sin cos sign clamp clamp_min "
    "clamp_max pow clone contiguous detach alias to _to_copy"
)
TRANSPARENT: dict[str, Rule] = {
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
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "squeeze", "unsqueeze"), ReshapeRule()),
    "expand": ExpandRule(),
    **dict.fromkeys(("permute", "transpose"), PermuteRule()),
}
