"""The model card: README.md beside a small network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..inspect.flops import count_flops
from ..nn.example import Example
from ..nn.masked_filters import MaskedFilters

_LOADED = {
    "safetensors": (
        "`config.json`, `model.safetensors`",
        'layers, graph and weights; `prunekernels.load_small("folder")` gives a network that trains, without pickle',
    ),
    "pt2": ("`model.pt2`", '`torch.export.load("model.pt2").module()` gives a network for inference'),
    "onnx": ("`model.onnx`", 'for ONNX Runtime and others: `onnxruntime.InferenceSession("model.onnx")`'),
}


@dataclass
class Facts:
    """What a card tells."""

    name: str  # of the network's class
    small: nn.Module
    example: Example
    model: nn.Module | None  # the masked one
    accuracy: float | Mapping[str, float] | None
    method: object
    notes: str
    sizes: Sequence[tuple[str, Sequence[int | None]]] | None  # of what a program takes, None: any


def write_card(path: Path, facts: Facts, formats: Iterable[str]) -> None:
    """Writes README.md."""
    parts = [f"# {facts.name}, small", _figures(facts)]
    if facts.method is not None:
        parts.append(f"Pruned by: {' '.join(str(facts.method).split())}")
    parts += [_sizes(facts), _files(formats)]
    if facts.model is not None:
        parts.append(_layers(facts.model, facts.small))
    if facts.notes:
        parts.append(facts.notes.strip())
    parts.append(f"Written by [prunekernels](https://pypi.org/project/prunekernels/) with torch {torch.__version__}.")
    path.write_text("\n\n".join(part for part in parts if part) + "\n")


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _figures(facts: Facts) -> str:
    networks = [facts.small] if facts.model is None else [facts.small, facts.model]
    one = facts.example.map(lambda x: x[:1] if x.dim() else x)
    rows = [["", "this network", "before pruning"][: len(networks) + 1]]
    parameters = [sum(p.numel() for p in net.parameters()) for net in networks]
    rows.append(["parameters", *(f"{number:,}" for number in parameters)])
    flops = [_multiply_adds(net, one) for net in networks]
    rows.append([f"multiply-adds, {_told(one.tensors)}", *("not counted" if n is None else f"{n:,}" for n in flops)])
    given = facts.accuracy
    named = given if isinstance(given, Mapping) else {} if given is None else {"accuracy": given}
    rows += [[name, f"{value:.4f}", *[""] * (len(networks) - 1)] for name, value in named.items()]
    return _table(rows)


def _multiply_adds(network: nn.Module, one: Example) -> int | None:
    tensor = next(network.parameters(), None)
    try:
        return count_flops(network, one if tensor is None else one.map(lambda x: x.to(tensor.device))).dense
    except Exception:  # no network of single images
        return None


def _told(tensors: Iterable[Tensor]) -> str:
    return ", ".join(str(list(x.shape)) for x in tensors)


def _sizes(facts: Facts) -> str:
    if facts.sizes is None:
        return f"Input: {_told(facts.example.tensors)} or another size that the layers take."
    rows = [f"`{name}`: {' x '.join('any' if n is None else str(n) for n in sizes)}" for name, sizes in facts.sizes]
    return f"Input of the exported forms: {'; '.join(rows)}."


def _files(formats: Iterable[str]) -> str:
    return _table([["files", "what they are"], *(list(_LOADED[name]) for name in _LOADED if name in set(formats))])


def _layers(model: nn.Module, small: nn.Module) -> str:
    """What the masks left of each layer."""
    after = dict(small.named_modules())
    rows = [["layer", "filters", "of", "live"]]
    for name, layer in model.named_modules():
        if isinstance(layer, MaskedFilters):
            of_small = after.get(name)
            left = getattr(of_small, "weight", None)
            count = str(left.shape[0]) if isinstance(left, Tensor) else "none"
            if isinstance(of_small, nn.ConvTranspose2d):
                count = str(of_small.out_channels)
            live = int((layer.filter_mask & layer.hard_mask).sum())
            rows.append([f"`{name}`", count, str(layer.out_channels), str(live)])
    return f"## Masks\n\nWhat is left of each masked convolution.\n\n{_table(rows)}" if len(rows) > 1 else ""
