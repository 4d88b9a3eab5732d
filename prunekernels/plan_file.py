"""The file of plans that PRUNEKERNELS_CACHE names: what one process found out, the next ones need not try again."""

from __future__ import annotations

import atexit
import json
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from .ops import extension

VARIABLE = "PRUNEKERNELS_CACHE"
FORMAT, VERSION = "prunekernels plans", 1
MOST_BYTES = 64 << 20  # a larger file is none of ours
DAMAGED = (OSError, ValueError, TypeError, RecursionError)  # what a file may raise that is not as written here


def start() -> None:
    """Reads the file that the environment names, and writes it when the process ends. Called once, on import."""
    name = os.environ.get(VARIABLE)
    if not name or extension._C is None:
        return
    path = Path(name).expanduser()
    try:
        known = _plans_of(_read(path))
        extension._C.restore_plans(known)
    except DAMAGED as error:
        told = str(error).splitlines()[0]
        warnings.warn(f"{VARIABLE}: {path}: {told}; plans are neither read from it nor written", stacklevel=2)
        return
    atexit.register(_write_at_exit, path, {tuple(key) for key, *_ in known})


def known(path: Path) -> tuple[int, int]:
    """How many plans a file holds for this machine, and how many machines it knows; ValueError for another file."""
    machines = _read(path)
    return len(_plans_of(machines)), len(machines)


def machine() -> str:
    """What plans depend on beside the problem: the processor, the extension and torch."""
    build = extension._C.build_info() if extension._C else {}
    about = (_processor(), os.cpu_count(), torch.__version__, *(f"{name} {build[name]}" for name in sorted(build)))
    return ", ".join(map(str, about))


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read(path: Path) -> dict[str, Any]:
    """The file's machines; empty where there is no file. ValueError if it is not of this kind."""
    if not path.exists():
        return {}
    if not path.is_file():  # a pipe or a device may never end
        raise ValueError("expected a file of plans, got no regular file")
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"expected a file of plans, got {size:,} bytes")
    try:
        body = json.loads(path.read_text())
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"expected a file of plans, got {error or type(error).__name__}") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ValueError("expected a file of plans, got another one")
    if body.get("version") != VERSION:
        raise ValueError(f"expected version {VERSION} of the file of plans, got {body.get('version')!r}")
    machines = body.get("machines")
    if not isinstance(machines, dict):
        raise ValueError(f"expected plans by machine, got {type(machines).__name__}")
    for name, entries in machines.items():  # those of others are written again
        if not isinstance(entries, list):
            raise ValueError(f"expected a list of plans for {name[:60]!r}, got {type(entries).__name__}")
    return machines


def _plans_of(machines: dict[str, Any]) -> list[Any]:
    """This machine's plans: [key, plan, [[tried plan, ms, runs], ...]] each."""
    found: Any = machines.get(machine(), [])
    words = int(extension._C.plan_key_words) if extension._C else 0
    entries: list[Any] = found if isinstance(found, list) else [None]
    for entry in entries:
        right = isinstance(entry, list) and len(entry) == 3 and isinstance(entry[0], list) and len(entry[0]) == words
        if not right or not all(isinstance(word, int) for word in entry[0]):
            raise ValueError(f"expected entries [key, plan, trials], got {str(entry)[:60]}")
    return list(found)


def _write_at_exit(path: Path, known: set[tuple[int, ...]]) -> None:
    entries: list[Any] = extension._C.settled_plans() if extension._C else []
    if all(tuple(key) in known for key, *_ in entries):
        return
    try:
        with _locked(path):
            machines = _read(path)  # others may have written since
            here = {tuple(key): [key, *rest] for key, *rest in _plans_of(machines)}
            here |= {tuple(key): [key, *rest] for key, *rest in entries}
            _replace(path, machines | {machine(): list(here.values())})
    except DAMAGED as error:
        warnings.warn(f"{VARIABLE}: {path}: {error}; plans are not written", stacklevel=1)


def _replace(path: Path, machines: dict[str, Any]) -> None:
    """Writes beside the file and renames, so that no reader ever sees half of it."""
    blocks = []
    for name, entries in machines.items():
        rows = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
        blocks.append(f" {json.dumps(name)}: [\n{rows}\n ]")
    head = f'"format": {json.dumps(FORMAT)}, "version": {VERSION}'
    text = f'{{{head}, "machines": {{\n' + ",\n".join(blocks) + "\n}}\n"
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time, where the system has such locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # no POSIX system
        yield
        return
    with open(path.with_name(path.name + ".lock"), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
