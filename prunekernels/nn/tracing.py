"""Tracers of torch and masked layers: exporters get plain operators, torch.fx gets one call of the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn


def is_exported() -> bool:
    """Whether torch.export or torch.jit.trace, and so an ONNX exporter, records what runs now.

    What they write is read where this package is not, so it must be made of torch's own operators.
    """
    # The flag behind is_exporting(), which Dynamo of torch 2.8 folds to True under torch.compile, too.
    return torch.compiler._is_exporting_flag or (not torch.compiler.is_compiling() and torch._C._is_tracing())


def is_traced_by_fx(x: Any) -> bool:
    """Whether x stands for a tensor in a graph that torch.fx.symbolic_trace records."""
    return isinstance(x, fx.Proxy)


def as_leaf(layer: nn.Module, x: Any, forward: Callable[..., Any], *rest: Any) -> Any:
    """Records the layer as one call of a module, as torch.fx does with the layers of torch.nn.

    x: fx.Proxy. rest: further arguments. forward: of the masked class. A subclass that calls it is recorded step by
    step, so there it becomes a call of that function, with the layer.
    """
    path = x.tracer.path_of_module(layer)
    if type(layer).forward is forward:
        return x.tracer.create_proxy("call_module", path, (x, *rest), {})
    itself = x.tracer.create_proxy("get_attr", path, (), {})
    return x.tracer.create_proxy("call_function", forward, (itself, x, *rest), {})


def zeroed(live: Tensor, parameter: Tensor) -> Tensor:
    """The parameter where live, which broadcasts to it, is true; 0 elsewhere."""
    return torch.where(live, parameter, torch.zeros((), dtype=parameter.dtype, device=parameter.device))
