"""Tensors in a file of the safetensors format: the length of a header, the header in JSON, and the tensors' bytes."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .values import DTYPE_NAMES, DTYPES

_CODES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64",
}  # fmt: skip
_CODE_OF = {name: code for code, name in _CODES.items()}
MAX_HEADER = 100_000_000  # bytes, as the format has it
ALIGNMENT = 8
MAX_DIMENSIONS, MAX_SIZE = 64, 1 << 63  # those of torch
CHECKSUM = "prunekernels.crc32"  # in the metadata; files of other tools have none


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors, which are on the CPU, by name. metadata: more strings for the header."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries: dict[str, Any] = {}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        code = _CODE_OF[DTYPE_NAMES[tensor.dtype]]
        entries[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    sums = {CHECKSUM: f"{_checksum(entries, (_bytes_of(tensors[name]) for name in order)):08x}"}
    text = json.dumps({"__metadata__": {**metadata, **sums}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            file.write(_bytes_of(tensors[name]))


def _bytes_of(tensor: Tensor) -> Any:
    """The bytes of a tensor, without a copy where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def _checksum(entries: Mapping[str, Any], contents: Iterable[Any]) -> int:
    """Of a header's entries, and of the tensors' bytes in the order of the file."""
    value = zlib.crc32(json.dumps(entries, sort_keys=True).encode())
    for content in contents:
        value = zlib.crc32(content, value)
    return value


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, each with memory of its own, and its metadata.

    Raises ValueError, with what is wrong, for any other file; the header's claims are checked before memory is taken.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError(f"{path}: expected a header of at least 8 bytes, got {len(start)}: the file is truncated")
        length = int.from_bytes(start, "little")
        if length > MAX_HEADER or length > size - 8:
            raise ValueError(f"{path}: expected a header within the file's {size} bytes, got one of {length} bytes")
        header, metadata = _header(path, file.read(length))
        entries = _parsed(path, header)
        _check_offsets(path, entries, size - 8 - length)
        found = {}
        for name, (dtype, shape, begin, end) in entries.items():
            raw = _memory(path, name, end - begin)
            file.seek(8 + length + begin)
            if raw.numel() and file.readinto(raw.numpy()) != raw.numel():  # type: ignore[arg-type]
                raise ValueError(f"{path}: {name}: expected {raw.numel()} bytes, got fewer: the file is truncated")
            if dtype == torch.bool and bool((raw > 1).any()):
                raise ValueError(f"{path}: {name}: expected bytes 0 and 1 in a tensor of bool, got {int(raw.max())}")
            found[name] = raw.view(dtype).reshape(shape)
    if (expected := metadata.pop(CHECKSUM, None)) is not None:
        order = sorted(entries, key=lambda name: entries[name][2:])
        got = f"{_checksum(header, (_bytes_of(found[name]) for name in order)):08x}"
        if got != expected:
            raise ValueError(f"{path}: expected the checksum {expected[:20]}, got {got}: the file is damaged")
    return found, metadata


def _memory(path: Path, name: str, size: int) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8)
    except (RuntimeError, MemoryError) as error:  # the file is as long as it says
        raise ValueError(f"{path}: {name[:100]}: expected what fits into memory, got {size} bytes") from error


_Entry = tuple[torch.dtype, list[int], int, int]  # dtype, shape, first byte, behind the last byte


def _header(path: Path, text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """The entries of a header by name, as they are, and its metadata."""
    header = parse_json(path, text)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: __metadata__: expected strings by name")
    return header, metadata


def _parsed(path: Path, header: Mapping[str, Any]) -> dict[str, _Entry]:
    entries = {}
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = DTYPES[_CODES[entry["dtype"]]], entry["shape"], entry["data_offsets"]
            is_right = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
            is_right = is_right and all(type(n) is int and 0 <= n < MAX_SIZE for n in [*shape, begin, end])
        except (KeyError, TypeError, ValueError):
            is_right = False
        if not is_right:
            raise ValueError(f"{path}: {name[:100]}: expected dtype, shape and data_offsets, got {str(entry)[:100]}")
        wanted = math.prod(shape) * dtype.itemsize
        if end - begin != wanted:
            raise ValueError(f"{path}: {name[:100]}: expected {wanted} bytes for {shape}, got {end - begin}")
        entries[name] = (dtype, shape, begin, end)
    return entries


def _check_offsets(path: Path, entries: Mapping[str, _Entry], size: int) -> None:
    """Raises unless the tensors' bytes follow each other without gaps up to the file's end."""
    at = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda entry: entry[1][2:]):
        if begin != at:
            raise ValueError(f"{path}: {name[:100]}: expected its bytes at {at}, got {begin}")
        at = end
    if at != size:
        reason = "the file is truncated" if at > size else "more than the header tells"
        raise ValueError(f"{path}: expected {at} bytes of tensors, got {size}: {reason}")


def parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """A JSON object without repeated keys; raises ValueError with the file's name."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError, MemoryError) as error:
        reason = str(error)[:200] or type(error).__name__
        raise ValueError(f"{path}: expected JSON, got {reason}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key that is there twice")
    return result
