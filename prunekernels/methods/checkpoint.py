"""Whether a method's state belongs to the method that it is loaded into."""

from __future__ import annotations

from typing import Any


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
