"""PAPER: by method, the numbers of its paper."""

from __future__ import annotations

from typing import Any

from .arguments import expect

PRESETS = ("paper",)


def keywords(cls: type, preset: object) -> dict[str, Any]:
    """The keywords of a method's constructor under a preset, duty among them."""
    expect(cls.__name__, preset in PRESETS, "preset", f"{', '.join(PRESETS)} or None", repr(preset))
    return {"duty": 1.0, "clip": False}
