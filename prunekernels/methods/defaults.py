"""What a method's keywords are where the caller leaves them open: the paper's values, or those found by trial."""

from __future__ import annotations

import inspect
from abc import ABCMeta
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from . import presets
from .arguments import full_signature


class WithDefaults(ABCMeta):
    """The class of Method and its subclasses: fills in keywords before a constructor runs.

    A constructor's own defaults (None in most signatures) are the paper's. With preset="paper" those that the caller
    leaves open become what presets.PAPER has, duty 1 included. Otherwise, where duty is below 1, they become what the
    class's `tuned` returns. What the caller gives, and is not None, stays.
    """

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **more: Any) -> None:
        super().__init__(name, bases, namespace, **more)
        parent = next((c for c in cls.__mro__[1:] if isinstance(c, WithDefaults)), None)
        cls.__signature__ = full_signature(cls, parent)

    def __call__(cls, *args: Any, **given: Any) -> Any:
        return super().__call__(*args, **(given | filled_in(cls, args, given)))


def filled_in(cls: Any, args: Sequence[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords that a call of a method's class leaves open, and their values."""
    try:
        bound = inspect.signature(cls).bind_partial(*args, **given)
    except TypeError:
        return {}  # the constructor says what is wrong
    bound.apply_defaults()
    preset, duty, epochs = (bound.arguments.get(name) for name in ("preset", "duty", "epochs"))
    if preset is not None:
        found = presets.keywords(cls, preset)
    elif isinstance(duty, Real) and duty < 1 and isinstance(epochs, int) and epochs >= 1:
        found = cls.tuned(epochs)
    else:
        return {}
    return {name: value for name, value in found.items() if given.get(name) is None}
