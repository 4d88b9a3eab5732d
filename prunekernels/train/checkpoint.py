"""Checkpoints: written whole or not at all, and read without unpickling code."""

from __future__ import annotations

import contextlib
import os
import random
import re
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

FORMAT = "prunekernels training checkpoint 1"
REMAINS_AGE = 3600.0  # seconds after which no process still writes to a temporary file
KEYS = ("config", "epoch", "model", "optimizer", "method", "random", "history", "states", "layers", "data", "modes")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file whole or not at all: calls write with a temporary path beside it, then renames that to path."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")  # matplotlib goes by the suffix
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _remove_remains(path)


def _remove_remains(path: Path) -> None:
    """Removes the temporary files of processes that were killed while they wrote, an hour ago or earlier."""
    named = re.compile(rf"\.{re.escape(path.name)}\.\d+{re.escape(path.suffix)}")
    with contextlib.suppress(OSError):  # they harm nothing but space
        for left in path.parent.iterdir():
            if named.fullmatch(left.name) and time.time() - left.stat().st_mtime > REMAINS_AGE:
                left.unlink()


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint. state: tensors and plain values under KEYS."""
    write_atomically(path, lambda temporary: torch.save({"format": FORMAT, **state}, temporary))


def load(path: Path) -> dict[str, Any]:
    """Reads what save wrote. Any other file raises ValueError, with what it is instead."""
    expected = f"checkpoint: {path}: expected what `prunekernels train` wrote"
    if not path.is_file():
        raise FileNotFoundError(f"{expected}, got no such file")
    state = read_plain(path, expected)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        got = f"format {state['format']!r}" if isinstance(state, dict) and "format" in state else "something else"
        raise ValueError(f"{expected}, got {got}")
    state.setdefault("modes", {})  # checkpoints written before there was a choice have none
    missing = [key for key in KEYS if key not in state]
    if missing:
        raise ValueError(f"{expected}, got a file without {', '.join(missing)}")
    return state


def read_plain(path: Path, expected: str) -> Any:
    """Reads tensors and plain values that torch.save wrote; any other file raises ValueError.

    Args:
        path: The file.
        expected: How the error begins: the file, and what it should be.
    """
    try:
        _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise a dozen kinds for a broken file
        reason = str(error).strip().splitlines()[:1]
        raise ValueError(f"{expected}, got a truncated or foreign file ({''.join(reason)[:120]})") from error


def _check_archive(path: Path) -> None:
    """Raises unless a file is an archive as torch.save writes it. torch itself checks no sums, and unpacks any size."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("an archive with packed entries")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("an archive that claims more bytes than it has")
        wrong = archive.testzip()
        if wrong is not None:
            raise ValueError(f"a wrong checksum of {wrong[:60]}")


def random_state() -> dict[str, Any]:
    """The states of the random generators of torch, CUDA, Python and numpy, as plain values and tensors."""
    numpy: Any = np.random.get_state(legacy=False)
    key = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": {**numpy, "state": {**numpy["state"], "key": key}},
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restores what random_state returned; CUDA's only on a machine with as many devices."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    inner = state["numpy"]["state"]
    np.random.set_state({**state["numpy"], "state": {**inner, "key": inner["key"].numpy().astype(np.uint32)}})
