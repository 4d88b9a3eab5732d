"""The folder of a saved network: config.json and model.safetensors, written and read."""

from __future__ import annotations

import json
import uuid
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..nn.example import Example
from .describe import Description
from .errors import Unsupported
from .rebuild import rebuild
from .tensor_file import parse_json, read_tensors, write_tensors
from .values import decode, encode

CONFIG, TENSORS, PROGRAM, ONNX, CARD = "config.json", "model.safetensors", "model.pt2", "model.onnx", "README.md"
FORMAT = "prunekernels small network"
VERSION = 1
MAX_CONFIG = 16 << 20  # bytes, which become some thirty times as many in memory
CHECKSUM = "checksum"
_KEYS = ("class", "example", "layers", "tensors", "graphs", "id")


def write_network(folder: Path, described: Description, example: Example, name: str, package: str) -> None:
    """Writes config.json and model.safetensors. name: of the network's class. package: the version of this package."""
    number = uuid.uuid4().hex  # in both files, so that files of two networks do not make one
    config = {
        "format": FORMAT, "version": VERSION, "prunekernels": package, "torch": torch.__version__, "class": name,
        "id": number, "example": {"args": [encode(a) for a in example.args], "kwargs": encode(example.kwargs)},
        "layers": described.layers, "tensors": described.tensors, "graphs": described.graphs,
    }  # fmt: skip
    (folder / CONFIG).write_text(_lines(config | {CHECKSUM: _checksum(config)}))
    write_tensors(folder / TENSORS, described.values, {"format": "pt", "id": number})


def _checksum(config: dict[str, Any]) -> str:
    """Of a description's values, however the file lays them out."""
    values = {name: value for name, value in config.items() if name != CHECKSUM}
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"


def _lines(config: dict[str, Any]) -> str:
    """JSON with one line for each layer, tensor and node."""

    def lines(value: Any, depth: int) -> str:
        inner, end = " " * (depth + 1), " " * depth
        if isinstance(value, dict) and value and depth < 4 and not (depth > 1 and _is_small(value)):
            rows = [f"{inner}{json.dumps(key)}: {lines(part, depth + 1)}" for key, part in value.items()]
            return "{\n" + ",\n".join(rows) + f"\n{end}}}"
        if isinstance(value, list) and value and depth < 4 and any(isinstance(part, dict) for part in value):
            return "[\n" + ",\n".join(f"{inner}{json.dumps(part)}" for part in value) + f"\n{end}]"
        return json.dumps(value)

    return lines(config, 0) + "\n"


def _is_small(value: dict[str, Any]) -> bool:
    return "nodes" not in value


def read_network(op: str, folder: Path) -> tuple[nn.Module, Example, str]:
    """The network of a folder in eval mode, an example of its arguments on the meta device, and its class's name.

    Any other folder raises ValueError or FileNotFoundError with the file and what is wrong with it. op: the caller.
    """
    for path in (folder / CONFIG, folder / TENSORS):
        if not path.is_file():
            raise FileNotFoundError(f"{op}: {path}: expected a file that save_small wrote, got none")
    path = folder / CONFIG
    if path.stat().st_size > MAX_CONFIG:
        raise ValueError(f"{op}: {path}: expected at most {MAX_CONFIG} bytes, got {path.stat().st_size}")
    try:
        config = parse_json(path, path.read_bytes())
        _check_format(path, config)
        tensors, metadata = read_tensors(folder / TENSORS)
    except ValueError as error:
        raise ValueError(f"{op}: {error}") from error
    if metadata.get("id", config["id"]) != config["id"]:  # none where another tool wrote the tensors
        raise ValueError(f"{op}: {folder / TENSORS}: expected the tensors of {path}, got those of another network")
    try:
        network = rebuild(Description(config["layers"], config["tensors"], config["graphs"], tensors))
        given = config["example"]
        example = Example(*(decode(a) for a in given["args"]), **decode(given["kwargs"]))
    except Unsupported as error:
        raise ValueError(f"{op}: {path}: expected what a saved network may hold, got {error}") from error
    except Exception as error:  # torch raises a dozen kinds for arguments that make no layer or graph
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(f"{op}: {path}: expected the description of a network, got {reason}") from error
    got = _checksum(config)
    if config.get(CHECKSUM, got) != got:
        raise ValueError(f"{op}: {path}: expected the checksum {str(config[CHECKSUM])[:20]}, got {got}: it was changed")
    return network, example, str(config["class"])


def _check_format(path: Path, config: dict[str, Any]) -> None:
    if config.get("format") != FORMAT:
        raise ValueError(f"{path}: expected the format {FORMAT!r}, got {str(config.get('format'))[:100]!r}")
    version = config.get("version")
    if type(version) is not int or version > VERSION or version < 1:
        wrote = f"; prunekernels {str(config.get('prunekernels'))[:20]} wrote it" if type(version) is int else ""
        raise ValueError(f"{path}: expected version {VERSION} at most, got {str(version)[:20]}{wrote}")
    missing = [key for key in _KEYS if key not in config]
    if missing:
        raise ValueError(f"{path}: expected a description of a network, got one without {', '.join(missing)}")
