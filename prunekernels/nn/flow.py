"""flow: switches live mode on or off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ..live import fallbacks
from ..live.frames import skip_frames
from ..live.tensor import LiveTensor, full_width, store_full_width
from .lost_masks import check_no_mask_lost
from .mask_buffers import MaskBuffers


def _result_to_dense(module: nn.Module, args: Any, result: Any) -> Any:
    return full_width(result)


def _inputs_to_dense(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """torch.compile would have to compile its code again for each list of live channels."""
    if torch.compiler.is_compiling() or not any(isinstance(x, LiveTensor) for x in tree_leaves((args, kwargs))):
        return None
    fallbacks.record("torch.compile")
    return store_full_width((args, kwargs))


skip_frames(_result_to_dense, _inputs_to_dense)  # as hooks of a compiled network, each would be a graph of its own


class _CompiledCall:
    """What module.compile() made, called with full-width tensors alone."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        self.module, self.call = module, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _inputs_to_dense(self.module, args, kwargs) or (args, kwargs)
        return self.call(*args, **kwargs)


def compiled_parts(model: nn.Module) -> dict[str, nn.Module]:
    """By name, the modules in a network that were given to torch.compile; of nested ones the outermost."""
    parts: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        compiled = "_orig_mod" in module._modules or module._compiled_call_impl is not None
        if compiled and not any(not outer or name.startswith(f"{outer}.") for outer in parts):
            parts[name] = module
    return parts


def guard_compiled(part: nn.Module) -> RemovableHandle:
    """Gives a compiled part full-width tensors in place of live ones."""
    return part.register_forward_pre_hook(_inputs_to_dense, with_kwargs=True)


def _guard_compiled_parts(model: nn.Module, enabled: bool) -> None:
    """Puts in front of every compiled part, or takes away, what gives it full-width tensors."""
    for part in model.modules():
        for key in [key for key, hook in part._forward_pre_hooks.items() if hook is _inputs_to_dense]:
            del part._forward_pre_hooks[key]
            part._forward_pre_hooks_with_kwargs.pop(key, None)
        if isinstance(part._compiled_call_impl, _CompiledCall):
            part._compiled_call_impl = part._compiled_call_impl.call
    for part in compiled_parts(model).values() if enabled else ():
        if part._compiled_call_impl is not None:
            part._compiled_call_impl = _CompiledCall(part, part._compiled_call_impl)
        else:
            guard_compiled(part)


def flow(model: nn.Module, enabled: bool = True, *, align: int | None = None) -> nn.Module:
    """Switches live mode on or off, in place. The numbers are the same either way.

    In live mode masked convolutions and norms pass on the live channels alone, as live tensors, so dead channels cost
    nothing between the layers either. An operation that has a rule computes the live channels alone; any other gets
    the full-width tensor (`prunekernels.explain` lists those), and so does the caller of `model`. Under
    `torch.compile` the layers stay in masked mode: full-width tensors between them, work skipped inside. Compile
    parts of the model first, then call `flow`: it gives those parts full-width tensors.

    Args:
        model: A network with masked layers (see `convert`).
        enabled: True for live mode, False for masked mode.
        align: Numbers of live channels are padded with channels of zeros to multiples of it, such as 16 or 64. None: 8
            on CUDA, without which convolutions in 16 bits leave the tensor cores, and 1 elsewhere.

    Returns:
        The same model.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
        >>> report = pk.convert(model)
        >>> model[0].set_masks(filter=torch.arange(8) > 3)
        >>> model[1].set_mask(torch.arange(8) > 3)
        >>> x = torch.randn(2, 3, 6, 6)
        >>> y = model(x)
        >>> torch.allclose(pk.flow(model)(x), y, atol=1e-6)
        True
    """
    if not isinstance(enabled, bool):
        raise ValueError(f"flow: enabled: expected True or False, got {enabled!r}")
    if align is not None and (type(align) is not int or align < 1):
        raise ValueError(f"flow: align: expected a positive number or None, got {align!r}")
    masked = [module for module in model.modules() if isinstance(module, MaskBuffers)]
    if enabled and not masked:
        raise ValueError(f"flow: model: expected masked layers, got none in {type(model).__name__}: see pk.convert")
    check_no_mask_lost("flow", model)
    for module in masked:
        module._flow, module._align = enabled, align
    for part in model.modules():  # a part that was switched on by itself no longer has a caller outside of this model
        for key in [key for key, hook in part._forward_hooks.items() if hook is _result_to_dense]:
            del part._forward_hooks[key]
    _guard_compiled_parts(model, enabled)
    if enabled:
        model.register_forward_hook(_result_to_dense)
    return model
