"""What goes wrong inside, before it becomes an error that names the network or the file."""

from __future__ import annotations


class Unsupported(Exception):
    """Something that no saved network may hold; says what: "the function math.gamma"."""
