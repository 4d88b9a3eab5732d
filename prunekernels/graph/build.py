"""Writes the small network: a torch.fx graph over small plain layers with the names of the original ones."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from .channels import Channels, Index, Kept, NetworkChannels, take
from .guards import holds
from .trace import Traced, argument, fixed_size, op_name, value_of

PACK = "_output_structure"
REMEDY = "; give it an example of this size, or form='module'"


class Builder:
    """The small network while it is written. Rules add its operators in their emit(), in the order of the original.

    In the small network a value has the channels that are kept, compact(node), or all of them, full(node).
    """

    def __init__(self, op: str, net: NetworkChannels, kept: Kept) -> None:
        self.op, self.net, self.kept, self.traced = op, net, kept, net.traced
        self.graph, self.root, self.has_folded = fx.Graph(), nn.Module(), False
        # Of each new parameter, by id: the name of the original one and what was kept of it (None: a new bias).
        self.origins: dict[int, tuple[str, Index | None]] = {}
        self.sources: dict[fx.Node, fx.Node] = {}  # new node -> original node
        self._compact: dict[fx.Node, fx.Node] = {}  # original node -> new node with the kept channels
        self._full: dict[fx.Node, fx.Node] = {}  # original node -> new node with all channels
        self._gathered: dict[str, nn.Parameter | Tensor] = {}  # by original name
        self._layers: dict[str, tuple[nn.Module, Any]] = {}  # by name: the layer and the arguments that define it

    def add(self, node: fx.Node, new: fx.Node) -> None:
        """Registers a new node, which computes the kept channels of an original one."""
        self._compact[node] = new

    # What rules ask for

    def axis(self, node: fx.Node) -> int:
        """The dimension of the channels."""
        return self._channels(node).axis

    def count(self, node: fx.Node) -> int:
        """The number of channels that the value has in the small network."""
        x = self.net.tracked(node)
        return 1 if x is None else self.kept.of(x).numel()

    def _channels(self, node: fx.Node) -> Channels:
        x = self.net.tracked(node)
        assert x is not None
        return x

    def compact(self, node: Any) -> fx.Node:
        """The value with the channels that are kept."""
        if node in self.traced.names:
            x = self.net.tracked(node)
            return self.parameter(node, {} if x is None else {x.axis: self.kept.of(x)})
        return self._compact[node]

    def full(self, node: fx.Node) -> fx.Node:
        """The value with all channels: those that are not kept are zero, or the constant that they hold."""
        if self.traced.is_parameter(node):
            return self.parameter(node, {})
        x = self.net.tracked(node)
        if x is None or self.kept.of(x).numel() == len(x):
            return self._compact[node]
        if node not in self._full:
            self._full[node] = self._to_full(node, x)
        return self._full[node]

    def _to_full(self, node: fx.Node, x: Channels) -> fx.Node:
        """Appends one channel of zeros, puts it wherever a channel is missing, and adds the constants."""
        kept, value, aten = self.kept.of(x), value_of(node), torch.ops.aten
        assert value is not None
        order = torch.full((len(x),), kept.numel())
        order[kept] = torch.arange(kept.numel())
        behind = [0, 0] * (value.dim() - 1 - x.axis)
        padded = self._node(aten.constant_pad_nd.default, (self._compact[node], [*behind, 0, 1]))
        order_node = self.constant(f"{node.name}_order", order.to(value.device))
        full = self._node(aten.index_select.default, (padded, x.axis, order_node))
        fill = torch.nan_to_num(x.values, nan=0.0)
        fill[kept] = 0
        if bool((fill != 0).any()):
            shape = [1] * value.dim()
            shape[x.axis] = len(x)
            fill_node = self.constant(f"{node.name}_constants", fill.to(value.device, value.dtype).view(shape))
            full = self._node(aten.add.Tensor, (full, fill_node))
        return full

    def select(self, node: fx.Node, x: fx.Node, axis: int, index: Tensor) -> fx.Node:
        """Some channels of x, by a sorted index: a slice if they are neighbours."""
        first, count = int(index[0]), index.numel()
        if int(index[-1]) - first + 1 == count:
            return self.call(node, torch.ops.aten.slice.Tensor, (x, axis, first, first + count))
        return self.gather_channels(node, x, axis, index)

    def gather_channels(self, node: fx.Node, x: fx.Node, axis: int, index: Tensor) -> fx.Node:
        """Channels of x in any order."""
        at = self.constant(f"{node.name}_channels", index.to(value_of(node).device))
        return self.call(node, torch.ops.aten.index_select.default, (x, axis, at))

    def part(self, node: fx.Node, axis: int, index: Tensor) -> fx.Node:
        """Some channels, by a sorted index, of a value whose channels are not followed."""
        at = self.constant(f"{node.name}_kept", index.to(value_of(node).device))
        return self._node(torch.ops.aten.index_select.default, (self._compact[node], axis, at))

    def size(self, size: Any) -> Any:
        """A size argument, which may be a node of the original graph."""
        return self._compact[size] if isinstance(size, fx.Node) else size

    def copy(self, node: fx.Node, compact: Any = (), args: Mapping[fx.Node, fx.Node] | None = None) -> fx.Node:
        """The same operator. Operands in compact have their kept channels, those in args are given, others are full."""
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
        """Calls a method: torch.jit.trace follows sizes through methods such as view, not through operators."""
        return self._new(node, "call_method", name, args, dict(kwargs or {}))

    def _new(self, node: fx.Node, kind: str, target: Any, args: Any, kwargs: Any = None) -> fx.Node:
        new = self.graph.create_node(kind, target, args, kwargs, node.name)
        self.sources[new] = node
        return new

    def layer(self, node: fx.Node, name: str, layer: nn.Module, x: Any) -> fx.Node:
        """Calls a small layer. A layer that the original calls twice stays one layer."""
        config = (node.target, str(node.args[3:]), node.args[1:3])
        clash = name not in self._layers and _holds(self.root, name, {*layer._parameters, *layer._buffers})
        if clash or (name in self._layers and self._layers[name][1] != config):
            name = f"{name}_{node.name}"
        if name not in self._layers:
            self._layers[name] = (layer, config)
            self._attach(name, layer)
        return self._new(node, "call_module", name, (self.compact(x),))

    def gather(self, node: Any, index: Index) -> nn.Parameter | Tensor:
        """The kept part of a parameter or buffer: the same object for every layer that uses it."""
        name = self.traced.names[node]
        if name not in self._gathered:
            full = self.traced.tensors[name]
            part = take(full.detach(), index).clone(memory_format=torch.preserve_format)
            if full.dim() == 4 and full.is_contiguous(memory_format=torch.channels_last) and not full.is_contiguous():
                part = part.contiguous(memory_format=torch.channels_last)
            self._gathered[name] = nn.Parameter(part, full.requires_grad) if isinstance(full, nn.Parameter) else part
            self.origins[id(self._gathered[name])] = (name, dict(index))
        return self._gathered[name]

    def folded_bias(self, weight: Any, bias: Any, rows: Tensor, extra: Tensor) -> nn.Parameter:
        """The bias of a layer, or a new one if it has none, with the share of constant inputs added."""
        old = self.traced.tensors[self.traced.names[weight if bias is None else bias]]
        values = extra if bias is None else old.detach().cpu().double()[rows] + extra
        new = nn.Parameter(values.to(old.device, old.dtype), old.requires_grad)
        name = self.traced.names[weight if bias is None else bias]
        self.origins[id(new)] = (name, None if bias is None else {0: rows})
        self.has_folded = True
        return new

    def parameter(self, node: fx.Node, index: Index) -> fx.Node:
        """The kept part of a parameter that is an operand itself."""
        name, value = self.traced.names[node], self.gather(node, index)
        owner, _, last = name.rpartition(".")
        if _holds(self.root, owner, {last}) and getattr(_attribute(self.root, owner), last) is not value:
            name = f"{name}_{node.name}"  # a layer has its name
        return self._get_attr(name, value)

    def constant(self, name: str, value: Tensor) -> fx.Node:
        return self._get_attr(name, value)

    # The ends of the graph

    def add_inputs(self) -> None:
        """Adds the inputs, and a check of every size and every number, string or None that is fixed."""
        for node in self.traced.placeholders:
            new = self.graph.placeholder(node.name)
            self._compact[node] = new
            self.sources[new] = node
        for node, leaf in zip(self.traced.placeholders, self.traced.inputs.leaves, strict=True):
            value = value_of(node)
            if value is None:
                self._check_constant(self._compact[node], leaf)
            for dim, size in enumerate(() if value is None else value.shape):
                if (fixed := fixed_size(size)) is not None:
                    self._check_size(self._compact[node], dim, fixed)
        self._check_guards()

    def _check_size(self, x: fx.Node, dim: int, size: int) -> None:
        """Raises for another size where the trace took this one for a constant: the result would be wrong."""
        same = self.graph.call_function(operator.eq, (self.graph.call_method("size", (x, dim)), size))
        message = f"{x.name}: expected size {size} in dimension {dim}, as in the example given to {self.op}{REMEDY}"
        self.graph.call_function(torch._assert, (same, message))

    def _check_constant(self, x: fx.Node, value: Any) -> None:
        """Raises for another argument than that of the example, which the trace took for a constant."""
        same = self.graph.call_function(operator.is_ if value is None else operator.eq, (x, value))
        message = f"{x.name}: expected {value!r}, as in the example given to {self.op}"
        self.graph.call_function(torch._assert, (same, message))

    def _check_guards(self) -> None:
        """Raises for sizes with which the forward of the original would have taken another path."""
        tracer = fx.proxy.GraphAppendingTracer(self.graph)
        inputs = [_Sized(self._compact[node], tracer) for node in self.traced.placeholders]
        example = self.traced.inputs.with_leaves(inputs)
        named = inspect.signature(self.traced.model.forward).bind(*example.args, **example.kwargs).arguments
        for guard in self.traced.guards:
            told = re.sub(r"L\['(\w+)'\]\.size\(\)", r"\1.shape", guard)
            message = f"expected sizes with {told}, as in the example given to {self.op}{REMEDY}"
            self.graph.call_function(torch._assert, (holds(guard, named).node, message))

    def finish(self) -> fx.GraphModule:
        """Adds the output and returns the network."""
        node = next(n for n in self.traced.graph.nodes if n.op == "output")
        leaves = [self.full(n) if isinstance(n, fx.Node) else n for n in argument(node, 0)]
        spec = self.traced.out_spec
        output = pytree.tree_unflatten(leaves, spec) if _is_plain(spec) else self._packed(leaves, spec)
        if self.traced.inputs.is_flat:
            self.graph.output(output)
        else:
            self.graph.output((output,))
            info = _PyTreeInfo(_argument_names(self.traced), self.traced.in_spec, pytree.tree_structure(0))
            self.graph.set_codegen(_PyTreeCodeGen(info))
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph, type(self.traced.model).__name__)

    def _packed(self, leaves: list[Any], spec: Any) -> fx.Node:
        """An output of another class. A module makes it: torch.save traces a graph anew, but no module inside."""
        pack = nn.Module()
        pack.forward = partial(pytree.tree_unflatten, treespec=spec)  # type: ignore[method-assign]
        self.root.add_module(PACK, pack)
        return self.graph.call_module(PACK, (leaves,))

    def _node(self, target: Any, args: tuple[Any, ...]) -> fx.Node:
        return self.graph.call_function(target, args)

    def _get_attr(self, name: str, value: Any) -> fx.Node:
        if not hasattr(_attribute(self.root, name.rpartition(".")[0], create=True), name.rpartition(".")[2]):
            self._attach(name, value)
        return self.graph.get_attr(name)

    def _attach(self, name: str, value: Any) -> None:
        parent, _, last = name.rpartition(".")
        owner = _attribute(self.root, parent, create=True)
        if isinstance(value, Tensor):
            _register(owner, last, value)
        else:
            held = getattr(owner, last, nn.Module())
            for child, module in held.named_children():
                value.add_module(child, module)
            for own, tensor in (*held.named_parameters(recurse=False), *held.named_buffers(recurse=False)):
                _register(value, own, tensor)
            setattr(owner, last, value)


def _argument_names(traced: Traced) -> list[str]:
    """The arguments of the small network, by the names that they have in the original."""
    parameters = inspect.signature(traced.model.forward).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    args, kwargs = traced.inputs.args, traced.inputs.kwargs
    return [*named[: len(args)], *(f"args_{i}" for i in range(len(named), len(args))), *kwargs]


class _Sized:
    """A tensor of which a guard asks the sizes, while they become nodes. torch.jit.trace takes them for numbers."""

    def __init__(self, node: fx.Node, tracer: fx.proxy.TracerBase) -> None:
        self._proxy = fx.Proxy(node, tracer)

    def size(self) -> _Sized:
        return self

    def __getitem__(self, dim: int) -> Any:
        return torch.ops.aten.sym_size.int(self._proxy, dim)


def _register(module: nn.Module, name: str, tensor: Tensor) -> None:
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(name, tensor)
    else:
        module.register_buffer(name, tensor)


def _holds(root: nn.Module, name: str, tensors: set[str]) -> bool:
    """Whether the module of this name is there and has a parameter or buffer, or a place for one, of these names."""
    module = dict(root.named_modules()).get(name)
    return module is not None and bool(tensors & {*module._parameters, *module._buffers})


def _is_plain(spec: Any) -> bool:
    """Whether an output consists of tuples, lists and dicts, which a graph can return without a pytree."""
    leaf = spec.is_leaf() if callable(getattr(spec, "is_leaf", None)) else False
    if leaf or spec.type not in (tuple, list, dict):
        return leaf
    children = spec.children() if hasattr(spec, "children") else spec.children_specs  # torch 2.8 has only the latter
    return all(map(_is_plain, children))


def _attribute(module: Any, name: str, create: bool = False) -> Any:
    for part in name.split(".") if name else []:
        if create and not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    return module
