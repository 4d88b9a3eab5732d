"""Writes the small network: a torch.fx graph over small plain layers that carry the original's names."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from .channels import Channels, Kept, NetworkChannels
from .trace import argument, op_name, value_of

Index = Mapping[int, Tensor]


class Builder:
    """Takes the small network's operators, one after the other, from the rules' emit().

    A value has full width, or the channels that are kept: compact(node) and full(node) give the one or the other.
    origins: for each parameter of the small network, by identity, the original's name and what was kept of it.
    """

    def __init__(self, op: str, net: NetworkChannels, kept: Kept) -> None:
        self.op, self.net, self.kept, self.traced = op, net, kept, net.traced
        self.graph, self.root, self.has_folded = fx.Graph(), nn.Module(), False
        self.origins: dict[int, tuple[str, Index | None]] = {}
        self.sources: dict[fx.Node, fx.Node] = {}  # new -> original
        self._small: dict[fx.Node, fx.Node] = {}
        self._wide: dict[fx.Node, fx.Node] = {}
        self._gathered: dict[str, nn.Parameter | Tensor] = {}
        self._layers: dict[str, tuple[nn.Module, Any]] = {}

    def add(self, node: fx.Node, small: fx.Node) -> None:
        """small: computes the kept channels of what node computes."""
        self._small[node] = small

    # What rules ask for

    def axis(self, node: fx.Node) -> int:
        return self._channels(node).axis

    def count(self, node: fx.Node) -> int:
        """How many channels the node's value has in the small network."""
        x = self.net.tracked(node)
        return 1 if x is None else self.kept.of(x).numel()

    def _channels(self, node: fx.Node) -> Channels:
        x = self.net.tracked(node)
        assert x is not None
        return x

    def compact(self, node: Any) -> fx.Node:
        return self._small[node]

    def full(self, node: fx.Node) -> fx.Node:
        """The value with all channels: dropped ones are zero, or the constant they hold."""
        if self.traced.is_parameter(node):
            return self.parameter(node, {})
        x = self.net.tracked(node)
        if x is None or self.kept.of(x).numel() == len(x):
            return self._small[node]
        if node not in self._wide:
            self._wide[node] = self._widen(node, x)
        return self._wide[node]

    def _widen(self, node: fx.Node, x: Channels) -> fx.Node:
        kept, value, aten = self.kept.of(x), value_of(node), torch.ops.aten
        assert value is not None
        order = torch.full((len(x),), kept.numel())
        order[kept] = torch.arange(kept.numel())
        behind = [0, 0] * (value.dim() - 1 - x.axis)
        padded = self._node(aten.constant_pad_nd.default, (self._small[node], [*behind, 0, 1]))
        order_node = self.constant(f"{node.name}_order", order.to(value.device))
        wide = self._node(aten.index_select.default, (padded, x.axis, order_node))
        fill = torch.nan_to_num(x.values, nan=0.0)
        fill[kept] = 0
        if bool((fill != 0).any()):
            shape = [1] * value.dim()
            shape[x.axis] = len(x)
            fill_node = self.constant(f"{node.name}_constants", fill.to(value.device, value.dtype).view(shape))
            wide = self._node(aten.add.Tensor, (wide, fill_node))
        return wide

    def select(self, node: fx.Node, x: fx.Node, axis: int, index: Tensor) -> fx.Node:
        """x's channels at index, sorted: a view where they are neighbours."""
        first, count = int(index[0]), index.numel()
        if int(index[-1]) - first + 1 == count:
            return self.call(node, torch.ops.aten.slice.Tensor, (x, axis, first, first + count))
        at = self.constant(f"{node.name}_channels", index.to(value_of(node).device))
        return self.call(node, torch.ops.aten.index_select.default, (x, axis, at))

    def size(self, size: Any) -> Any:
        return self._small[size] if isinstance(size, fx.Node) else size

    def copy(self, node: fx.Node, compact: Any = (), args: Mapping[fx.Node, fx.Node] | None = None) -> fx.Node:
        """The same operator; of its operands those in compact are so, those in args are given, the rest are full."""
        given = dict(args or {}) | {n: self.compact(n) for n in compact}
        if node.op == "get_attr":
            return self._get_attr(str(node.target), _attribute(self.traced.graph.owning_module, str(node.target)))

        def small(n: fx.Node) -> fx.Node:
            return given[n] if n in given else self.full(n)

        name, new_args = op_name(node), fx.map_arg(node.args, small)
        if name in ("view", "reshape", "expand", "repeat"):
            return self.call_method(node, name, new_args)
        return self._new(node, node.op, node.target, new_args, fx.map_arg(node.kwargs, small))

    def call(self, node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: Any = None) -> fx.Node:
        return self._new(node, "call_function", target, args, dict(kwargs or {}))

    def call_method(self, node: fx.Node, name: str, args: tuple[Any, ...], kwargs: Any = None) -> fx.Node:
        """For what takes sizes: torch.jit.trace follows them through methods, not through operators."""
        return self._new(node, "call_method", name, args, dict(kwargs or {}))

    def _new(self, node: fx.Node, kind: str, target: Any, args: Any, kwargs: Any = None) -> fx.Node:
        new = self.graph.create_node(kind, target, args, kwargs, node.name)
        self.sources[new] = node
        return new

    def layer(self, node: fx.Node, name: str, layer: nn.Module, x: Any) -> fx.Node:
        """Calls a small layer; a layer that was called twice stays one."""
        config = (node.target, str(node.args[3:]), node.args[1:3])
        if name in self._layers and self._layers[name][1] != config:
            name = f"{name}_{node.name}"
        if name not in self._layers:
            self._layers[name] = (layer, config)
            self._attach(name, layer)
        return self._new(node, "call_module", name, (self.compact(x),))

    def gather(self, node: Any, index: Index) -> nn.Parameter | Tensor:
        """The kept part of a parameter or buffer; the same object for all its users."""
        name = self.traced.names[node]
        if name not in self._gathered:
            full = self.traced.tensors[name]
            part = full.detach()
            for dim, rows in index.items():
                part = part.index_select(dim, rows.to(part.device))
            part = part.clone(memory_format=torch.preserve_format)
            if full.dim() == 4 and full.is_contiguous(memory_format=torch.channels_last) and not full.is_contiguous():
                part = part.contiguous(memory_format=torch.channels_last)
            self._gathered[name] = nn.Parameter(part, full.requires_grad) if isinstance(full, nn.Parameter) else part
            self.origins[id(self._gathered[name])] = (name, dict(index))
        return self._gathered[name]

    def folded_bias(self, weight: Any, bias: Any, rows: Tensor, extra: Tensor) -> nn.Parameter:
        """The layer's bias, new where it had none, and what constant inputs add to it."""
        old = self.traced.tensors[self.traced.names[weight if bias is None else bias]]
        values = extra if bias is None else old.detach().cpu().double()[rows] + extra
        new = nn.Parameter(values.to(old.device, old.dtype), old.requires_grad)
        name = self.traced.names[weight if bias is None else bias]
        self.origins[id(new)] = (name, None if bias is None else {0: rows})
        self.has_folded = True
        return new

    def parameter(self, node: fx.Node, index: Index) -> fx.Node:
        """A parameter that is an operand of its own."""
        return self._get_attr(self.traced.names[node], self.gather(node, index))

    def constant(self, name: str, value: Tensor) -> fx.Node:
        return self._get_attr(name, value)

    # The graph's ends

    def add_inputs(self) -> None:
        for node in self.traced.placeholders:
            new = self.graph.placeholder(node.name)
            self._small[node] = new
            self.sources[new] = node
        for node in self.traced.placeholders:
            value = value_of(node)
            for dim, size in enumerate(() if value is None else value.shape):
                if type(size) is int:
                    self._check_size(self._small[node], dim, size)

    def _check_size(self, x: fx.Node, dim: int, size: int) -> None:
        """Sizes that the trace took for constants: another one must not give wrong numbers."""
        same = self.graph.call_function(operator.eq, (self.graph.call_method("size", (x, dim)), size))
        message = f"{x.name}: expected size {size} in dimension {dim}, as in the example given to {self.op}"
        self.graph.call_function(torch._assert, (same, message))

    def finish(self) -> fx.GraphModule:
        """Adds the output; the network."""
        node = next(n for n in self.traced.graph.nodes if n.op == "output")
        leaves = [self.full(n) if isinstance(n, fx.Node) else n for n in argument(node, 0)]
        spec = self.traced.out_spec
        if _is_plain(spec):
            self.graph.output(pytree.tree_unflatten(leaves, spec))
        else:
            self.graph.output(tuple(leaves))
            names = [n.name for n in self.traced.placeholders]
            in_spec = pytree.tree_structure((tuple(range(len(names))), {}))
            self.graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(names, in_spec, spec)))
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph, type(self.traced.model).__name__)

    def _node(self, target: Any, args: tuple[Any, ...]) -> fx.Node:
        return self.graph.call_function(target, args)

    def _get_attr(self, name: str, value: Any) -> fx.Node:
        if not hasattr(_attribute(self.root, name.rpartition(".")[0], create=True), name.rpartition(".")[2]):
            self._attach(name, value)
        return self.graph.get_attr(name)

    def _attach(self, name: str, value: Any) -> None:
        parent, _, last = name.rpartition(".")
        owner = _attribute(self.root, parent, create=True)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            owner.register_buffer(last, value)
        else:
            for child, module in getattr(owner, last, nn.Module()).named_children():
                value.add_module(child, module)
            setattr(owner, last, value)


def _is_plain(spec: Any) -> bool:
    """Tensors in tuples, lists and dicts, which a graph returns by itself."""
    leaf = spec.is_leaf() if callable(getattr(spec, "is_leaf", None)) else False
    return leaf or (spec.type in (tuple, list, dict) and all(_is_plain(child) for child in spec.children()))


def _attribute(module: Any, name: str, create: bool = False) -> Any:
    for part in name.split(".") if name else []:
        if create and not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    return module
