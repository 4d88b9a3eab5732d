"""Whether a method's state belongs to the method, and the weights, that it is loaded into."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.conv import MaskedConv2d
from ..nn.mask_buffers import MaskBuffers
from ..nn.saved_state import dead_values, put_dead_values


def check_identity(op: str, identity: dict[str, Any], state: object) -> None:
    """Raises ValueError unless all entries of identity are in state, naming the first difference."""
    for key, expected in identity.items():
        got = state.get(key) if isinstance(state, dict) else None
        if got != expected:
            expected, got = _first_difference(expected, got)
            raise ValueError(f"{op}.load_state_dict: {key}: expected {expected}, got {got}")


def _first_difference(a: Any, b: Any) -> tuple[Any, Any]:
    """The first entries in which two lists or dictionaries differ: as short as an error should be."""
    if type(a) is not type(b) or isinstance(a, str):
        return a, b
    a, b = (list(value.items()) if isinstance(value, dict) else value for value in (a, b))
    where = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    first, second = (value[where] if where < len(value) else f"{len(value)} of them" for value in (a, b))
    return first, second


def dead_values_of(model: nn.Module) -> dict[str, Any]:
    """By name of a masked layer, what its dead entries hold, where that is not zero: files may have zeros there."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, MaskBuffers))
    return {name: values for name, layer in layers if (values := dead_values(layer))}


def put_back_dead_values(model: nn.Module, layers: Mapping[str, MaskedConv2d], state: Mapping[str, Any]) -> None:
    """Writes what dead entries held into a network that was loaded from a file without it.

    It does so only if the network then has the weights that the state was saved with; any other stays as it is.
    """
    values = state.get("dead_values", {})
    saved = state.get("checksums", {}).get("weights")
    weights = {name: layer.weight.detach() for name, layer in layers.items()}
    if not values or saved is None or _checksum(weights.values()) == saved:
        return
    for name in weights.keys() & values.keys():
        if "weight" in values[name]:
            dead, entries = values[name]["weight"]
            weights[name] = weights[name].clone()
            weights[name][dead.to(weights[name].device).expand_as(weights[name])] = entries.to(weights[name])
    if _checksum(weights.values()) == saved:
        for name, of_layer in values.items():
            put_dead_values(model.get_submodule(name), of_layer)


def checksums(layers: Mapping[str, MaskedConv2d], optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """By part, a number that tells whether the layers' tensors are those that a state was saved with."""
    weights = [layer.weight for layer in layers.values()]
    states = [value for weight in weights for value in optimizer.state.get(weight, {}).values()]
    return {"weights": _checksum(weights), "momenta": _checksum(s for s in states if isinstance(s, Tensor))}


def _checksum(tensors: Iterable[Tensor]) -> int:
    value = 0
    for tensor in tensors:
        flat = tensor.detach().cpu().flatten().view(torch.uint8)
        value = zlib.crc32(memoryview(flat.numpy()), value)  # type: ignore[arg-type]
    return value
