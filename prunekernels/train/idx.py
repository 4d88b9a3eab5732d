"""The file format of MNIST: big-endian sizes, then bytes, gzip or not.

images = read(find(folder, "train", "images"))  # uint8 [N, H, W] or [N, H, W, C]
labels = read(find(folder, "train", "labels"))  # uint8 [N]
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

PREFIXES = {"train": ("train",), "test": ("t10k", "test")}
DIMENSIONS = {"images": (3, 4), "labels": (1,)}
UBYTE = 8
TYPES = {8: "uint8", 9: "int8", 11: "int16", 12: "int32", 13: "float32", 14: "float64"}
CHUNK = 1 << 20


def find(folder: Path, part: str, what: str) -> Path:
    """The file of a part ("train" or "test") with its "images" or "labels"; FileNotFoundError where there is none."""
    names = [
        f"{prefix}-{what}{mark}idx{dimensions}-ubyte"
        for prefix in PREFIXES[part] for dimensions in DIMENSIONS[what] for mark in "-."
    ]  # fmt: skip
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise FileNotFoundError(f"data: {folder}: expected a file {names[0]} or {names[0]}.gz, got none")


def read(path: Path, what: str) -> np.ndarray:
    """Reads a file of unsigned bytes. The sizes that it claims are compared with its bytes before memory is taken.

    Args:
        path: The file.
        what: "images" or "labels", which have other numbers of dimensions.

    Returns:
        uint8 [N, H, W] or [N, H, W, C] of images, uint8 [N] of labels.
    """
    with _opened(path) as file:
        shape = _shape(path, file, what)
        expected = math.prod(shape)
        sizes = " x ".join(map(str, shape))
        got = _length(file, expected + 1)
        if got != expected:
            found = f"{got:,}" if got < expected else "more"
            raise ValueError(f"data: {path}: expected {expected:,} bytes after the sizes ({sizes}), got {found}")
    with _opened(path) as file:
        file.read(4 + 4 * len(shape))
        try:
            values = np.empty(shape, np.uint8)
        except (MemoryError, ValueError) as error:
            raise ValueError(f"data: {path}: expected what fits into memory, got {expected:,} bytes") from error
        whole, at = values.reshape(-1).data, 0
        while at < expected and (count := file.readinto(whole[at : at + CHUNK])):  # type: ignore[attr-defined]
            at += count
        if at != expected:
            raise ValueError(f"data: {path}: expected a file that stays as it is, got another while reading")
    return values


def _shape(path: Path, file: BinaryIO, what: str) -> tuple[int, ...]:
    """The sizes from the head of a file."""
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        got = f"bytes {magic.hex(' ')}" if magic else "an empty file"
        raise ValueError(f"data: {path}: expected an idx file, which begins with the bytes 00 00, got {got}")
    if magic[2] != UBYTE:
        got = f"{magic[2]} ({TYPES.get(magic[2], 'no type')})"
        raise ValueError(f"data: {path}: expected the type byte {UBYTE} ({TYPES[UBYTE]}), got {got}")
    known = DIMENSIONS[what]
    if magic[3] not in known:
        expected = f"{' or '.join(map(str, known))} dimension{'s' * (known != (1,))}, as {what} have"
        raise ValueError(f"data: {path}: expected {expected}, got {magic[3]}")
    sizes = file.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise ValueError(f"data: {path}: expected {magic[3]} sizes of 4 bytes, got {len(sizes)} bytes")
    shape = tuple(np.frombuffer(sizes, ">u4").tolist())
    if 0 in shape:
        raise ValueError(f"data: {path}: expected sizes of at least 1, got {' x '.join(map(str, shape))}")
    return shape


def _length(file: BinaryIO, most: int) -> int:
    """How many bytes are left in a file, counted up to most."""
    length = 0
    while length < most and (chunk := file.read(min(CHUNK, most - length))):
        length += len(chunk)
    return length


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked if it is a gzip file; ValueError where it is a broken one."""
    with open(path, "rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        if not packed:
            yield raw
            return
        try:
            with gzip.open(raw) as file:
                yield file  # type: ignore[misc]
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"data: {path}: expected a whole gzip file, got {error}") from error
