"""The arguments of a graph's nodes as values for JSON, and back.

None, bool, int, str, finite float and list stand for themselves. Everything else is an object of one key, its kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from .errors import Unsupported

_DTYPES = (
    "bool uint8 int8 int16 uint16 int32 uint32 int64 uint64 float16 bfloat16 float32 float64 float8_e4m3fn "
    "float8_e5m2 complex64"
)
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _DTYPES.split() if hasattr(torch, name)}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
    "preserve": torch.preserve_format,
}
_FORMAT_NAMES = {value: name for name, value in FORMATS.items()}


def encode(value: Any) -> Any:
    """A value for JSON; raises Unsupported for what no graph may hold."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.Tensor) and value.dtype in DTYPE_NAMES:  # its kind alone
        return {"tensor": [DTYPE_NAMES[value.dtype], *value.shape]}
    if isinstance(value, torch.dtype) and value in DTYPE_NAMES:
        return {"dtype": DTYPE_NAMES[value]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch.memory_format):
        return {"memory_format": _FORMAT_NAMES[value]}
    if value is torch.strided:
        return {"layout": "strided"}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, slice):
        return {"slice": [encode(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, list):
        return [encode(part) for part in value]
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return {"tuple": [encode(part) for part in value]}
    if type(value) in (dict, fx.immutable_collections.immutable_dict):
        if all(type(key) is str for key in value):
            return {"dict": {key: encode(part) for key, part in value.items()}}
    raise Unsupported(f"a value of the class {type(value).__module__}.{type(value).__name__}")


def decode(value: Any, node: Callable[[str], Any] | None = None, training: Callable[[], Any] | None = None) -> Any:
    """What encode took; a tensor of the same kind on the meta device.

    Args:
        value: From JSON.
        node: Gives the node of a name.
        training: Gives the node that tells whether the network trains.
    """

    def each(values: Any) -> list[Any]:
        if not isinstance(values, list):
            raise Unsupported(f"{str(values)[:100]} in place of a list")
        return [decode(part, node, training) for part in values]

    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return each(value)
    if not isinstance(value, Mapping) or len(value) != 1:
        raise Unsupported(f"the value {str(value)[:100]}")
    ((kind, content),) = value.items()
    if kind == "node" and node is not None and isinstance(content, str):
        return node(content)
    if kind == "training" and training is not None:
        return training()
    if kind == "tuple":
        return tuple(each(content))
    if kind == "slice" and isinstance(content, list) and len(content) == 3:
        return slice(*each(content))
    if kind == "dict" and isinstance(content, Mapping):
        return {key: decode(part, node, training) for key, part in content.items()}
    if kind == "tensor" and node is None and isinstance(content, list) and content and content[0] in DTYPES:
        if all(type(size) is int and size >= 0 for size in content[1:]):
            return torch.empty(content[1:], dtype=DTYPES[content[0]], device="meta")
    if kind == "ellipsis":
        return Ellipsis
    if kind == "layout" and content == "strided":
        return torch.strided
    if isinstance(content, str):
        if kind == "float" and content in ("inf", "-inf", "nan"):
            return float(content)
        if kind == "dtype" and content in DTYPES:
            return DTYPES[content]
        if kind == "memory_format" and content in FORMATS:
            return FORMATS[content]
        if kind == "device" and len(content) < 20:
            return torch.device(content)
    raise Unsupported(f"the value {str(dict(value))[:100]}")
