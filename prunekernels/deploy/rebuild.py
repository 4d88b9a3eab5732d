"""A network from its description: a torch.fx.GraphModule over plain layers. Nothing is run or unpickled."""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from .describe import Description
from .errors import Unsupported
from .layers import build_layer
from .network import SHARED, ByMode
from .operations import check_attribute, check_method, function_of
from .values import decode

# Names become code of a torch.fx.GraphModule, so nothing else may be in them.
_PATH = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_RESERVED = frozenset(dir(nn.Module()))
_RESERVED_AT_ROOT = frozenset(dir(fx.GraphModule))


def rebuild(described: Description) -> nn.Module:
    """Builds a network in eval mode; raises Unsupported with what no network may hold."""
    root = _Tree()
    for name, layer in described.layers.items():
        if "as" in layer:
            root.put_again(name, layer["as"])
        else:
            root.put(name, nn.Module() if layer["type"] == "Module" else build_layer(layer))
    _put_tensors(root, described)
    graphs = {mode: _graph(root.module, graph) for mode, graph in described.graphs.items()}
    if set(graphs) == {"both"}:
        network: nn.Module = _graph_module(root.module, graphs["both"])
        for name in SHARED:  # in the order of the description
            network.__dict__[name] = root.module.__dict__[name]
    elif set(graphs) == {"train", "eval"}:
        modules = {mode: _graph_module(root.module, graph) for mode, graph in graphs.items()}
        network = ByMode(root.module, modules["train"], modules["eval"])
    else:
        raise Unsupported(f"the graphs {', '.join(sorted(graphs))[:100]}")
    return network.eval()


class _Tree:
    """Modules by their names."""

    def __init__(self) -> None:
        self.module = nn.Module()
        self.layers: dict[str, nn.Module] = {}  # those of torch.nn
        self.all: dict[str, nn.Module] = {}

    def put(self, name: str, layer: nn.Module) -> None:
        owner, last = self.owner_of(name)
        if last in owner._modules:
            raise Unsupported(f"the name {name!r} in two places")
        owner.add_module(last, layer)
        self.all[name] = layer
        if type(layer) is not nn.Module:
            self.layers[name] = layer

    def put_again(self, name: str, other: str) -> None:
        """Puts the module of another name in one more place."""
        owner, last = self.owner_of(name)
        layer = self.all.get(other)
        if layer is None or owner is layer or owner in layer.modules():
            raise Unsupported(f"the layer {str(other)[:100]!r} again as {name!r}")
        if owner._modules.get(last, layer) is not layer:
            raise Unsupported(f"the name {name!r} in two places")
        owner.add_module(last, layer)

    def owner_of(self, name: str) -> tuple[nn.Module, str]:
        """The module that holds what has this name, made if there is none, and the last part of the name."""
        if not isinstance(name, str) or not _PATH.fullmatch(name):
            raise Unsupported(f"the name {str(name)[:100]!r}")
        *path, last = name.split(".")
        module = self.module
        if not _RESERVED.isdisjoint([*path, last]) or [*path, last][0] in _RESERVED_AT_ROOT:
            raise Unsupported(f"the name {name!r}")
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]  # type: ignore[assignment]
        return module, last


def _put_tensors(root: _Tree, described: Description) -> None:
    made: dict[str, Tensor] = {}
    for name, entry in described.tensors.items():
        owner, last = root.owner_of(name)
        expected = owner._parameters.get(last, owner._buffers.get(last))
        is_layers = owner in root.layers.values()
        if is_layers and last not in owner._parameters and last not in owner._buffers:
            raise Unsupported(f"the tensor {name} of a {type(owner).__name__}")
        owner._parameters.pop(last, None)
        owner._buffers.pop(last, None)
        if entry is None:
            owner.register_parameter(last, None)
            continue
        tensor = made.get(entry["as"])
        if tensor is None:
            tensor = made[entry["as"]] = _tensor(described.values, name, entry)
        if isinstance(expected, Tensor) and expected.shape != tensor.shape:
            raise Unsupported(f"the tensor {name} of {list(tensor.shape)} in place of {list(expected.shape)}")
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(last, tensor)
        else:
            owner.register_buffer(last, tensor, persistent=entry["persistent"] is True)
    for name, layer in root.layers.items():
        for last, left in (layer._parameters | layer._buffers).items():
            if left is not None and left.is_meta:
                raise Unsupported(f"a layer without the tensor {name}.{last}")


def _tensor(values: Mapping[str, Tensor], name: str, entry: Mapping[str, Any]) -> Tensor:
    if entry["as"] not in values:
        raise Unsupported(f"a network without the tensor {str(entry['as'])[:100]!r}")
    tensor = values[entry["as"]].clone()
    if entry.get("channels_last") and tensor.dim() == 4:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    if not entry["parameter"]:
        return tensor
    trains = entry["requires_grad"] is True
    if trains and not (tensor.is_floating_point() or tensor.is_complex()):
        raise Unsupported(f"gradients of {name}, a tensor of {tensor.dtype}")
    return nn.Parameter(tensor, trains)


def _graph_module(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    return fx.GraphModule(root, graph, "SmallNetwork")


def _graph(root: nn.Module, described: Mapping[str, Any]) -> fx.Graph:
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def node_of(name: str) -> fx.Node:
        if name not in made:
            raise Unsupported(f"the node {name[:100]!r} before it is computed")
        return made[name]

    def training() -> fx.Node:
        return graph.get_attr("training", type_expr=bool)

    for entry in described["nodes"]:
        name, op = entry["name"], entry["op"]
        if not isinstance(name, str) or not name.isidentifier() or name in made:
            raise Unsupported(f"the name {str(name)[:100]!r} of a node")
        if op == "training":
            made[name] = training()
            continue
        args = tuple(decode(value, node_of, training) for value in entry.get("args", ()))
        kwargs = {_identifier(key): decode(value, node_of, training) for key, value in entry.get("kwargs", {}).items()}
        made[name] = graph.create_node(op, _target(root, op, entry["target"], args), args, kwargs, name)
    ops = [node.op for node in graph.nodes]
    if ops.count("output") != 1 or ops[-1] != "output":
        raise Unsupported("a graph without one output at its end")
    if "arguments" in described:
        graph.set_codegen(_PyTreeCodeGen(_structure(graph, described["arguments"])))
    graph.lint()
    return graph


def _identifier(name: Any) -> str:
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name) or not name.isascii():
        raise Unsupported(f"the name {str(name)[:100]!r} of an argument")
    return name


def _target(root: nn.Module, op: Any, target: Any, args: tuple[Any, ...]) -> Any:
    """What a node calls, from its name in the description."""
    if not isinstance(target, str):
        raise Unsupported(f"the target {str(target)[:100]}")
    if op == "call_function":
        check_attribute(target, args)
        return function_of(target)
    if op == "call_method":
        return check_method(target)
    if op == "placeholder":
        return _identifier(target)
    if op == "output":
        return "output"
    if op in ("call_module", "get_attr") and _PATH.fullmatch(target):
        owner: Any = root
        *path, last = target.split(".")
        for part in path:
            owner = owner._modules.get(part) if isinstance(owner, nn.Module) else None
        if isinstance(owner, nn.Module):
            held: dict[str, Any] = owner._modules if op == "call_module" else {**owner._parameters, **owner._buffers}
            if held.get(last) is not None:
                return target
    raise Unsupported(f"a node {str(op)[:100]} {target[:100]!r}")


def _structure(graph: fx.Graph, described: Mapping[str, Any]) -> _PyTreeInfo:
    """How the arguments of a call become the inputs of a graph."""
    args = tuple(decode(value) for value in described["args"])
    kwargs = {_identifier(name): decode(value) for name, value in described["kwargs"].items()}
    names = [_identifier(name) for name in described["names"]]
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    leaves, spec = pytree.tree_flatten((args, kwargs))
    if leaves != list(range(len(inputs))) or len(names) != len(args) + len(kwargs):
        raise Unsupported("arguments that do not fit the inputs of its graph")
    return _PyTreeInfo(names, spec, pytree.tree_structure(0))
