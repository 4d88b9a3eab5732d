"""A small network as a program of torch.export, and as ONNX."""

from __future__ import annotations

import importlib.util
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.by_values import quiet
from ..graph.trace import Freedom, export_network, fixed_size, value_of
from ..graph.verify import compare, outcome, resized_inputs
from ..nn.example import Example

BATCH = 1  # of the inputs that are tried, the last of which the images have the example's size
CLOSE = 1e-3  # of the largest output: a program may round otherwise


def export_program(op: str, network: nn.Module, example: Example) -> Any:
    """Exports a network in eval mode: for any batch and image size, for any batch, or for the example's sizes alone.

    Returns:
        The torch.export.ExportedProgram, with an example of other numbers: the caller's may be private.
    """
    errors: list[Exception] = []
    tries: tuple[Freedom, ...] = ("images", "batch", "none")
    for free in tries:
        try:
            program, _ = export_network(op, network, example, free)
            if free == "none" or _runs_alike(network, program, example, free == "images"):
                other = example.map(_drawn)
                program.example_inputs = other.args, other.kwargs
                return program
        except Exception as error:
            errors.append(error)
    raise ValueError(f"{op}: expected a network that torch.export can trace, got: {errors[-1]}") from errors[-1]


def _drawn(x: Tensor) -> Tensor:
    return (
        torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x.dtype)
        if x.is_floating_point()
        else torch.zeros_like(x)
    )


def _runs_alike(network: nn.Module, program: Any, example: Example, images: bool) -> bool:
    """Whether a program takes the sizes that the network takes, where it leaves them free.

    images: sizes of images are free, so the network has to take others.
    """
    module, sizes = program.module(), 0
    trials = (example, *resized_inputs(example))
    for i, given in enumerate(trials if images else trials[: BATCH + 1]):
        want = outcome(network, given)
        if isinstance(want, Exception):
            continue
        got = outcome(module, given)
        if isinstance(got, Exception):
            return False
        difference, magnitude = compare(want, got)
        if not difference <= CLOSE * magnitude:
            return False
        sizes += i > BATCH
    return sizes > 0 or not images


def free_sizes(program: Any) -> list[tuple[str, list[int | None]]]:
    """Of each tensor that a program takes, its name and its sizes; None: any size."""
    own = set(program.graph_signature.user_inputs)
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in own]
    return [
        (node.name, [fixed_size(size) for size in value_of(node).shape]) for node in nodes if value_of(node) is not None
    ]


def write_program(path: Path, program: Any) -> None:
    """Writes model.pt2."""
    with quiet():
        torch.export.save(program, path)


def check_onnx(op: str) -> None:
    """Raises ImportError if what writes ONNX is missing."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'{op}: formats: onnx needs {" and ".join(missing)}: pip install "prunekernels[onnx]"')


def write_onnx(path: Path, program: Any) -> None:
    """Writes model.onnx, with the sizes free that the program leaves free."""
    with quiet(), redirect_stdout(StringIO()):
        torch.onnx.export(program, f=path, dynamo=True, external_data=False, verbose=False)
