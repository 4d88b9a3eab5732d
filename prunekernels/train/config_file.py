"""config_file: settings of a run from a file, checked as the command line checks its options."""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from .optional_deps import need

NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
MOST_BYTES = 1 << 18  # a larger file is none of settings
MOST_VALUES = 10_000  # with those behind the aliases of YAML, of which a few lines make billions
MOST_BITS = 1023  # of an integer: those of the largest double
KINDS: dict[Any, str] = {int: "an integer", float: "a number", str: "text", bool: "true or false"}


def read_settings(path: Path, options: Mapping[str, Any], lists: Container[str] = ()) -> dict[str, Any]:
    """Reads a YAML, JSON or TOML file of settings.

    Args:
        path: The file; its suffix says which of them it is.
        options: By name with underscores, what a setting is: int, float, str, bool or dict. "-" in the
            keys of a file is "_".
        lists: Names of the settings that are lists of text; one text is a list of one.

    Returns:
        By name, the file's settings. One that is null counts as not given.
    """
    found = _parsed(path)
    if not isinstance(found, Mapping):
        raise ValueError(f"--config: {path}: expected names and values, got {type(found).__name__}")
    settings: dict[str, Any] = {}
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name not in options:
            near = _near(name, options)
            raise ValueError(f"--config: {path}: {key}: expected a setting of train, got an unknown one{near}")
        if name in settings:
            raise ValueError(f"--config: {path}: {key}: expected it once, got it twice")
        if value is not None:
            settings[name] = _read(f"--config: {path}: {key}", value, options[name], name in lists)
    return settings


def options_of(
    parser: argparse.ArgumentParser, kinds: Mapping[str, Any], without: Sequence[str]
) -> tuple[dict[str, Any], set[str]]:
    """By name, the kind of each option that a file may set, and which of them are lists.

    Args:
        parser: Of the command.
        kinds: Those of options that are not just a number, a text or a flag.
        without: Options that no file sets.
    """
    actions = [action for action in parser._actions if action.option_strings and action.help != argparse.SUPPRESS]
    actions = [action for action in actions if action.dest not in (*without, "help")]
    found: dict[str, Any] = {action.dest: bool if action.nargs == 0 else action.type for action in actions}
    return {**found, **kinds}, {action.dest for action in actions if action.nargs == "+"}


def _parsed(path: Path) -> Any:
    """What is in the file; an empty one has no settings."""
    kind = path.suffix.lower()
    if kind not in (".yaml", ".yml", ".json", ".toml"):
        raise ValueError(f"--config: expected a .yaml, .yml, .json or .toml file, got {path}")
    if not path.is_file():
        raise FileNotFoundError(f"--config: expected a file, got {path}")
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"--config: {path}: expected at most {MOST_BYTES:,} bytes of settings, got {size:,}")
    if kind == ".json":
        read: Any = json.loads
    elif kind == ".toml":
        read = _tomllib().loads
    else:
        read = need("yaml", "--config: a .yaml file (a .json file needs nothing)").safe_load
    try:
        found = read(path.read_text(encoding="utf-8")) or {}
        _check_size(found)
        return found
    except Exception as error:  # each reader has errors of its own
        where = " ".join(str(error).split())
        raise ValueError(f"--config: {path}: expected {kind[1:].upper()}, got an error: {where}") from error


def _check_size(found: Any) -> None:
    """Raises ValueError for more values, or for larger numbers, than settings have."""
    seen, left = 0, [found]
    while left:
        seen, value = seen + 1, left.pop()
        if isinstance(value, int) and value.bit_length() > MOST_BITS:
            raise ValueError(f"a number of {value.bit_length()} bits")
        if isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, (list, tuple, set)):
            left += value
        if seen + len(left) > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES:,} values")


def _tomllib() -> Any:
    try:
        return importlib.import_module("tomllib")
    except ImportError as error:
        raise ImportError(f"--config: a .toml file: expected Python 3.11 (or a .json file); got: {error}") from error


def _near(name: str, options: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, options, 1)
    return f"; do you mean {near[0]}?" if near else f"; there are {', '.join(sorted(options))}"


def _numbers(value: Any) -> Any:
    """The value with numbers such as 1e-3, which YAML 1.1 reads as text, as numbers."""
    if isinstance(value, Mapping):
        return {name: _numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


def _read(where: str, value: Any, kind: Any, is_list: bool) -> Any:
    """The value, as the option would have it."""
    if kind is dict:
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise ValueError(f"{where}: expected names and values, got {value!r}")
        return _numbers(value)
    if is_list:
        values = value if isinstance(value, list) else [value]
        return [_read(where, each, kind, False) for each in values]
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    value = _numbers(value) if kind is float else value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = is_number if kind is float else isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    if not fits:
        raise ValueError(f"{where}: expected {KINDS[kind]}, got {value!r}")
    return kind(value)
