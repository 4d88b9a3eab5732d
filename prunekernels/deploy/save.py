"""save_small: a small network as a folder of files."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from ..graph.known_example import recall_example
from ..graph.shrink import shrink
from ..graph.trace import check_forward, read_example
from ..nn.example import Example
from ..nn.mask_buffers import MaskBuffers
from ..nn.reparametrized import deep_copy
from .card import Facts, write_card
from .check import Different, check_same
from .describe import describe
from .errors import Unsupported
from .folder import CARD, CONFIG, ONNX, PROGRAM, TENSORS, read_network, write_network
from .formats import check_onnx, export_program, free_sizes, write_onnx, write_program

FORMATS = ("safetensors", "pt2", "onnx")
OP = "save_small"


def save_small(
    small: nn.Module,
    folder: str | os.PathLike[str],
    example_input: Any = None,
    *,
    formats: Sequence[str] = ("safetensors", "pt2"),
    model: nn.Module | None = None,
    accuracy: float | Mapping[str, float] | None = None,
    method: object = None,
    notes: str = "",
    overwrite: bool = False,
) -> list[Path]:
    """Writes a small network as files that need neither its class nor, but for load_small, this package.

    | format | files | what they are |
    |---|---|---|
    | "safetensors" | config.json, model.safetensors | layers, graph and tensors, for load_small |
    | "pt2" | model.pt2 | a program of torch.export in eval mode, for any batch and size where that allows it |
    | "onnx" | model.onnx | the same as ONNX; needs onnx and onnxscript |
    | always | README.md | a model card |

    The network is saved as torch.fx sees it: the forward is followed once in each mode, so a path that depends on
    values or on other arguments than the example's is not in the files. What is saved is read back and compared with
    small before it gets its place: outputs in eval mode at several sizes, outputs and gradients in training. Files are
    written beside the folder and moved when all of them are there. small itself does not change.

    Args:
        small: A network of plain layers, such as shrink returns.
        folder: Where the files go; made if it is not there.
        example_input: What small takes (see Example). None: arguments of the sizes and kinds that shrink or load_small
            had for it.
        formats: Any of "safetensors", "pt2" and "onnx".
        model: The masked network, for the model card: parameters, multiply-adds, what is left of each layer.
        accuracy: For the model card: a number, or several by name.
        method: For the model card: how the network was pruned, a method of pk.methods or any text.
        notes: For the model card: more text, in Markdown.
        overwrite: Whether to replace the files of another small network.

    Returns:
        The files written.

    Examples:
        >>> import tempfile
        >>> model = torch.nn.Sequential(pk.MaskedConv2d(3, 8, 3), torch.nn.ReLU(), pk.MaskedConv2d(8, 4, 1))
        >>> model[0].set_masks(filter=torch.arange(8) < 5)
        >>> small = pk.shrink(model, torch.randn(2, 3, 16, 16))  # doctest: +ELLIPSIS
        shrink: module form, 260 -> 164 parameters; max abs difference ...
        >>> folder = tempfile.mkdtemp()
        >>> [path.name for path in pk.save_small(small, folder, model=model, accuracy=0.93)]
        ['config.json', 'model.safetensors', 'model.pt2', 'README.md']
        >>> loaded = pk.load_small(folder)
        >>> x = torch.randn(1, 3, 20, 20)
        >>> torch.equal(loaded(x), small.eval()(x))
        True
    """
    place = Path(folder)
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats or isinstance(formats, str):
        raise ValueError(f"{OP}: formats: expected some of {', '.join(FORMATS)}, got {formats!r}")
    masked = [name or "the network" for name, module in small.named_modules() if isinstance(module, MaskBuffers)]
    if masked:
        raise ValueError(f"{OP}: small: expected plain layers, as of pk.shrink, got masks in {masked[0]}")
    if "onnx" in formats:
        check_onnx(OP)
    _check_place(place, overwrite)
    example = recall_example(small) if example_input is None else read_example(OP, example_input)
    if example is None:
        raise ValueError(
            f"{OP}: example_input: expected what the network takes, which only networks of shrink and load_small tell; "
            "got None"
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    with _beside(place) as made:
        rebuilt = _write(small, example.map(lambda x: x.cpu()), made)
        sizes = None
        if "pt2" in formats or "onnx" in formats:
            program = export_program(OP, rebuilt, example.map(lambda x: x.cpu()))
            sizes = free_sizes(program)
            write_program(made / PROGRAM, program) if "pt2" in formats else None
            write_onnx(made / ONNX, program) if "onnx" in formats else None
        if "safetensors" not in formats:
            (made / CONFIG).unlink()
            (made / TENSORS).unlink()
        facts = Facts(type(small).__name__, rebuilt, example, model, accuracy, method, notes, sizes)
        write_card(made / CARD, facts, formats)
        return _move(made, place)


def _write(small: nn.Module, example: Example, folder: Path) -> nn.Module:
    """Writes the network in the first form that computes as it does when it is read back, and returns what was read.

    Either as the forward is, or as shrink writes it in its graph form.
    """
    plain = deep_copy(small).cpu()
    check_forward(OP, deep_copy(plain).eval(), example)
    reasons = []
    for form in ("forward", "graph"):
        try:
            network = plain if form == "forward" else _graph_form(plain, example)
            write_network(folder, describe(network, example), example, type(small).__name__, _version())
            rebuilt, _, _ = read_network(OP, folder)
            check_same(plain, rebuilt, example)
            return rebuilt
        except (Unsupported, Different, ValueError, RuntimeError) as error:
            reason = error.__cause__ if isinstance(error.__cause__, Unsupported) else error  # without a temporary path
            reasons.append(f"{'as it is' if form == 'forward' else 'in the graph form'}: {reason}")
    raise ValueError(f"{OP}: small: expected a network that a graph can describe; {'; '.join(reasons)}")


def _graph_form(plain: nn.Module, example: Example) -> nn.Module:
    with contextlib.redirect_stdout(io.StringIO()):
        return shrink(plain, example, form="graph")


def _version() -> str:
    try:
        return version("prunekernels")
    except PackageNotFoundError:  # a checkout that is not installed
        return "unknown"


# ---- the folder

_FILES = (TENSORS, PROGRAM, ONNX, CARD, CONFIG)  # in the order in which they are replaced


def _check_place(place: Path, overwrite: bool) -> None:
    if place.exists() and not place.is_dir():
        raise NotADirectoryError(f"{OP}: folder: expected a folder, got the file {place}")
    there = [name for name in _FILES if (place / name).exists()]
    if there and not overwrite:
        names = ", ".join(there)
        raise FileExistsError(f"{OP}: folder: expected one without {names}, or overwrite=True, got {place}")


@contextlib.contextmanager
def _beside(place: Path) -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _move(made: Path, place: Path) -> list[Path]:
    """Moves files to their place, the description last; files of a network that was there before go."""
    names = [name for name in _FILES if (made / name).exists()]
    for name in names:
        with open(made / name, "rb+") as file:
            os.fsync(file.fileno())
    place.mkdir(exist_ok=True)
    for name in names:
        os.replace(made / name, place / name)
    for name in set(_FILES) - set(names):
        (place / name).unlink(missing_ok=True)
    order = (CONFIG, TENSORS, PROGRAM, ONNX, CARD)
    return [place / name for name in order if name in names]
