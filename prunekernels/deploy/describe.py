"""A network as plain values and tensors: its layers of torch.nn, and the graph of what happens between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from ..nn.example import Example
from .errors import Unsupported
from .layers import describe_layer, is_layer
from .network import ByMode
from .operations import check_attribute, check_method, name_of
from .symbolic import trace_forward
from .values import DTYPE_NAMES, encode

Nodes = list[dict[str, Any]]
TRAINING = {"training": True}  # in a graph: whether the network trains


@dataclass
class Description:
    """What rebuilds a network: values for JSON, and tensors by name."""

    layers: dict[str, Any]  # by name: see describe_layer; or "as", the name of the same layer in another place
    tensors: dict[str, Any]  # by name: "as" (the name in the file), "parameter", ...; None where a layer has none
    graphs: dict[str, Any]  # "both", or "train" and "eval": see _describe_graph
    values: dict[str, Tensor]


def describe(network: nn.Module, example: Example) -> Description:
    """Describes a network; raises Unsupported with what of it cannot be described.

    A torch.fx.GraphModule is described as it is. Any other network is traced symbolically, in both modes, with layers
    of torch.nn as leaves.
    """
    if isinstance(network, ByMode):
        by_mode = {"train": network.graph_of(True), "eval": network.graph_of(False)}
        graphs = {mode: _describe_graph(module, module.graph) for mode, module in by_mode.items()}
        used = [module.graph for module in by_mode.values()]
    elif isinstance(network, fx.GraphModule):
        graphs, used = {"both": _describe_graph(network, network.graph)}, [network.graph]
    else:
        traced = {mode: trace_forward(network, example, mode == "train") for mode in ("train", "eval")}
        graphs = {mode: _describe_graph(module, graph) for mode, (module, graph) in traced.items()}
        with suppress(_Differ):
            graphs = {"both": _merge(graphs["train"], graphs["eval"])}
        network = traced["eval"][0]
        _take_constants(traced["train"][0], network)
        used = [graph for _, graph in traced.values()]
    return _with_tensors(network, used, graphs)


# ---- the graph


def _describe_graph(module: nn.Module, graph: fx.Graph) -> dict[str, Any]:
    nodes = [_describe_node(module, node) for node in graph.nodes]
    described: dict[str, Any] = {"nodes": nodes}
    codegen = graph._codegen
    if isinstance(codegen, _PyTreeCodeGen):
        info = codegen.pytree_info
        count = info.in_spec.num_leaves
        args, kwargs = pytree.tree_unflatten(list(range(count)), info.in_spec)
        described["arguments"] = {
            "names": list(info.orig_args), "args": [encode(a) for a in args], "kwargs": encode(dict(kwargs))["dict"]
        }  # fmt: skip
        if info.out_spec is None or not _is_one_leaf(info.out_spec):
            raise Unsupported("an output that a pytree packs")
    elif type(codegen) is not fx.graph.CodeGen:
        raise Unsupported(f"a graph with code of {type(codegen).__name__}")
    return described


def _is_one_leaf(spec: Any) -> bool:
    return bool(spec.num_leaves == 1 and spec.num_nodes == 1)


def _describe_node(module: nn.Module, node: fx.Node) -> dict[str, Any]:
    target = str(node.target)
    if node.op == "call_function":
        target = name_of(node.target)
        check_attribute(target, node.args)
    elif node.op == "call_method":
        check_method(target)
    elif node.op == "placeholder" and target.startswith("*"):
        raise Unsupported(f"any number of arguments ({target})")
    elif node.op == "get_attr" and target == "training":
        return {"name": node.name, "op": "training"}
    described = {"name": node.name, "op": node.op, "target": target}
    if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((node.args, node.kwargs))):
        raise Unsupported(f"a tensor as an argument of {target}")
    try:
        args, kwargs = [encode(value) for value in node.args], encode(dict(node.kwargs))["dict"]
    except Unsupported as error:
        raise Unsupported(f"{error} as an argument of {node.op} {target}") from None
    return described | ({"args": args} if args else {}) | ({"kwargs": kwargs} if kwargs else {})


class _Differ(Exception):
    pass


def _merge(train: Any, evaluating: Any) -> Any:
    """One graph for both modes, if they differ in nothing but flags that are True when the network trains."""
    if train is True and evaluating is False:
        return TRAINING
    if type(train) is type(evaluating) is dict and train.keys() == evaluating.keys():
        return {key: _merge(value, evaluating[key]) for key, value in train.items()}
    if type(train) is type(evaluating) is list and len(train) == len(evaluating):
        return [_merge(a, b) for a, b in zip(train, evaluating, strict=True)]
    if type(train) is not type(evaluating) or train != evaluating:
        raise _Differ
    return train


# ---- layers and tensors


def _take_constants(one: nn.Module, other: nn.Module) -> None:
    """Gives a network the tensors that the tracer made of constants in the other one."""
    for name, value in vars(one).items():
        if isinstance(value, Tensor):
            there = vars(other).setdefault(name, value)
            if not (there.dtype == value.dtype and torch.equal(there, value)):
                raise Unsupported("a forward with other constants when it trains")


def _with_tensors(network: nn.Module, graphs: Iterable[fx.Graph], described: dict[str, Any]) -> Description:
    modules = dict(network.named_modules(remove_duplicate=False))
    layers: set[str] = set()
    attributes: set[str] = set()
    for graph in graphs:
        for node in graph.nodes:
            if node.op == "call_module":
                layers.add(str(node.target))
            elif node.op == "get_attr" and node.target != "training":
                attributes.add(str(node.target))
                owner = str(node.target).rpartition(".")[0]
                layers |= {owner} if owner and is_layer(modules.get(owner, network)) else set()
    order = {name: place for place, name in enumerate(modules)}
    own: dict[str, Any] = {}
    held: dict[str, Tensor | None] = {}
    for name in sorted(layers | ({name.rpartition(".")[0] for name in attributes} - {""}), key=order.__getitem__):
        if name not in layers:
            own[name] = {"type": "Module", "arguments": {}}
            continue
        try:
            own[name] = describe_layer(modules[name])
        except Unsupported as error:
            raise Unsupported(f"{error} ({name})") from None
        held |= {f"{name}.{last}": t for last, t in (modules[name]._parameters | modules[name]._buffers).items()}
    for name in attributes - held.keys():
        held[name] = _attribute(modules, name)
    first = {id(modules[name]): name for name in own}
    for name, module in modules.items():  # a layer in several places stays one
        if name not in own and id(module) in first:
            own[name] = {"as": first[id(module)]}
    tensors, values = _describe_tensors(network, modules, held)
    return Description(own, tensors, described, values)


def _attribute(modules: Mapping[str, nn.Module], name: str) -> Tensor:
    owner, _, last = name.rpartition(".")
    value = getattr(modules.get(owner), last, None)
    if not isinstance(value, Tensor):
        raise Unsupported(f"the attribute {name}, which is no tensor")
    return value


def _describe_tensors(
    network: nn.Module, modules: Mapping[str, nn.Module], held: Mapping[str, Tensor | None]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """In the order of the network's own parameters, which optimizers number."""
    named = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
    order = {name: place for place, (name, _) in enumerate(named)}
    described: dict[str, Any] = {}
    values: dict[str, Tensor] = {}
    names: dict[int, str] = {}  # by id of a tensor: a tensor in several places stays one
    for name in sorted(held, key=lambda name: (order.get(name, len(order)), name)):
        tensor = held[name]
        if tensor is None:
            described[name] = None
            continue
        if tensor.dtype not in DTYPE_NAMES or tensor.layout is not torch.strided or type(tensor) not in (
            Tensor, nn.Parameter
        ):  # fmt: skip
            raise Unsupported(f"the tensor {name}, a {type(tensor).__name__} of {tensor.dtype}, {tensor.layout}")
        first = names.setdefault(id(tensor), name)
        described[name] = _describe_tensor(modules, name, tensor) | {"as": first}
        values.setdefault(first, tensor.detach().cpu())
    return described, values


def _describe_tensor(modules: Mapping[str, nn.Module], name: str, tensor: Tensor) -> dict[str, Any]:
    if isinstance(tensor, nn.Parameter):
        described: dict[str, Any] = {"parameter": True, "requires_grad": tensor.requires_grad}
    else:
        owner, _, last = name.rpartition(".")
        module = modules[owner]
        described = {
            "parameter": False,
            "persistent": last in module._buffers.keys() - module._non_persistent_buffers_set,
        }
    if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        described["channels_last"] = True
    return described
