"""What goes wrong inside, before it becomes an error that names the network or the file."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


class Unsupported(Exception):
    """Something that no saved network may hold; says what: "the function math.gamma"."""
