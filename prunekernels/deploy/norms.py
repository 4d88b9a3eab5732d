"""Norms of other classes, which compute F.batch_norm on tensors of their own: layers of torch.nn in a graph."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from .layers import is_layer

_NAMES = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_TENSORS = _NAMES[1:5]
_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def put_norms_back(network: nn.Module, graph: fx.Graph) -> None:
    """Replaces calls of F.batch_norm by the layers that they are, in place, where nothing else happens in them.

    What else the class does (timm's norms end in an activation) is in the graph anyway. Saved as layers of torch.nn,
    norms can be masked again.
    """
    for node in [node for node in graph.nodes if node.target is F.batch_norm]:
        given = dict(zip(_NAMES, node.args, strict=False)) | dict(node.kwargs)
        name = _owner(given)
        norm = None if name is None else network.get_submodule(name)
        if norm is None or not _is_forward_of(norm, given):
            continue
        counts = [n for n in graph.nodes if n.op == "get_attr" and n.target == f"{name}.num_batches_tracked"]
        added = [user for count in counts for user in count.users]
        if norm.training and not _counts_once(added):
            continue
        if not is_layer(norm):
            _replace(network, norm)
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_module(str(name), (given["input"],)))
        read = [given[tensor] for tensor in _TENSORS if isinstance(given.get(tensor), fx.Node)]
        for gone in (node, *(added if norm.training else ()), *(counts if norm.training else ()), *read):
            if not gone.users:
                graph.erase_node(gone)


def _owner(given: dict[str, Any]) -> str | None:
    """The module whose tensors a call reads, under their names; None if that is not so."""
    owners: set[str | None] = set()
    for name in _TENSORS:
        tensor = given.get(name)
        if isinstance(tensor, fx.Node):
            owner, _, last = str(tensor.target).rpartition(".")
            owners.add(owner if tensor.op == "get_attr" and last == name else None)
    return next(iter(owners)) or None if len(owners) == 1 else None


def _is_forward_of(norm: nn.Module, given: dict[str, Any]) -> bool:
    return (
        isinstance(norm, _PLAIN)
        and norm.track_running_stats
        and all((given.get(name) is None) == (getattr(norm, name) is None) for name in _TENSORS)
        and given.get("training", False) is norm.training
        and norm.momentum is not None
        and given.get("momentum", 0.1) == norm.momentum
        and given.get("eps", 1e-5) == norm.eps
    )


def _counts_once(added: list[fx.Node]) -> bool:
    return len(added) == 1 and added[0].target == "add_" and added[0].args[1:] == (1,) and not added[0].users


def _replace(network: nn.Module, norm: nn.Module) -> None:
    kind = next(plain for plain in _PLAIN if isinstance(norm, plain))
    layer = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, device="meta")  # type: ignore[arg-type]
    for attribute in ("_parameters", "_buffers", "_modules"):
        setattr(layer, attribute, getattr(norm, attribute))
    layer.train(norm.training)
    for parent in list(network.modules()):
        for last, child in parent._modules.items():
            if child is norm:
                parent._modules[last] = layer
