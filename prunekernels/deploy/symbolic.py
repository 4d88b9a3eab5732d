"""The forward of a network as a graph, by torch.fx, with layers of torch.nn as leaves."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from ..nn.example import Example
from ..nn.reparametrized import deep_copy
from .errors import Unsupported, first_line
from .layers import is_layer
from .norms import put_norms_back


class _Tracer(fx.Tracer):
    """Follows the forward of every module but layers of torch.nn."""

    proxy_buffer_attributes = True  # what the forward computes from a buffer is no constant

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_layer(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if type(m).__module__ == "torchvision.ops.stochastic_depth":
            return _drop_paths(m, *args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


def _drop_paths(module: Any, input: Any) -> Any:
    """What torchvision's StochasticDepth computes, which it keeps from torch.fx; with the same random numbers."""
    if not module.training or module.p == 0.0:
        return input
    share, rows = 1.0 - module.p, input.shape[0] if module.mode == "row" else 1
    noise = input.new_empty((rows,) + (1,) * (input.ndim - 1)).bernoulli_(share)
    return input * (noise.div_(share) if share > 0.0 else noise)


def trace_forward(network: nn.Module, example: Example, training: bool) -> tuple[nn.Module, fx.Graph]:
    """A copy of the network and the graph of its forward, for the arguments that the example gives."""
    own = deep_copy(network).train(training)
    bound = inspect.signature(own.forward).bind(*example.args, **example.kwargs).arguments
    left_out = {
        name: parameter.default
        for name, parameter in inspect.signature(own.forward).parameters.items()
        if name not in bound and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            graph = _Tracer().trace(own, left_out or None)
    except Exception as error:
        raise Unsupported(f"a forward that torch.fx cannot follow ({first_line(error)})") from error
    given = set(bound)
    for node in [node for node in graph.nodes if node.op == "placeholder" and str(node.target) not in given]:
        for user in reversed(_only_checked(node)):
            graph.erase_node(user)
        graph.erase_node(node)
    put_norms_back(own, graph)
    return own, graph


def _only_checked(node: fx.Node) -> list[fx.Node]:
    """What reads a placeholder that the tracer made a constant: it compares the argument with that."""
    found, waiting = [], [node]
    while waiting:
        users = list(waiting.pop().users)
        found += users
        waiting += users
    if any(user.op != "call_function" or user.users and user.target is torch._assert for user in found):
        raise Unsupported(f"the argument {node.target}")
    return found
