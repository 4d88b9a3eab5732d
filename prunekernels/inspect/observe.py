"""Runs a model once on an example and shows each layer's input and result to a callback; prints tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from ..nn.example import Example
from ..nn.flow import compiled_parts, guard_compiled
from ..nn.mask_buffers import MaskBuffers

Visit = Callable[[str, nn.Module, Any, Any], None]  # layer's name, layer, its first argument, its result


def observe(op: str, model: nn.Module, example_input: Any, visit: Visit, *, grad: bool = False) -> None:
    """Runs model once in eval mode and calls visit whenever one of its modules returns; leaves the model as it was.

    example_input: what the model takes (see Example). If the forward pass fails, the error names the module in which it
    failed.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    example = Example.of(op, example_input)
    entered: list[str] = []
    with _eval_mode(model), _hooks(model, entered, visit), torch.set_grad_enabled(grad):
        try:
            with torch.compiler.set_stance("force_eager"):  # compiled code would run past the hooks
                example.call(model)
        except Exception as error:
            where = f" in {entered[-1]}" if entered and entered[-1] else ""
            got = f"{type(error).__name__}{where}: {error}"
            raise ValueError(f"{op}: example_input: expected an input that the model runs on, got {got}") from error


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _hooks(model: nn.Module, entered: list[str], visit: Visit) -> Iterator[None]:
    """entered: names of the modules whose forward has begun and not ended, innermost last.

    The hooks are global ones, because a layer with a forward hook of its own leaves live mode.
    """
    names = {id(module): name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        if id(module) in names:
            entered.append(names[id(module)])

    def leave(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        name = names.get(id(module))
        if name is None:
            return
        while entered.pop() != name:  # left without a return: an exception that the model caught
            pass
        visit(name, module, args[0] if args else next(iter(kwargs.values()), None), result)

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, with_kwargs=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def masked_where_compiled(model: nn.Module) -> Iterator[list[str]]:
    """Masked mode inside the block for layers that torch.compile runs: they are, whatever flow() says.

    Gives the names of the compiled parts to which that makes a difference ("": the whole model).
    """
    found = {
        name: (part, [m for m in part.modules() if isinstance(m, MaskBuffers) and m._flow])
        for name, part in compiled_parts(model).items()
    }
    layers = [layer for _, inside in found.values() for layer in inside]
    handles = [guard_compiled(part) for part, _ in found.values()]
    try:
        for layer in layers:
            layer._flow = False
        yield [name for name, (_, inside) in found.items() if inside]
    finally:
        for layer in layers:
            layer._flow = True
        for handle in handles:
            handle.remove()


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: names to the left, numbers to the right."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    numbers = [all(not row[i] or row[i][0].isdigit() for row in rows) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(cells, widths, numbers, strict=True)]
        return "  ".join(padded).rstrip()

    return "\n".join(map(line, lines))
