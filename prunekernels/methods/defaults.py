"""What a method's keywords are where the caller leaves them open: the paper's values, or those found by trial."""

from __future__ import annotations

import inspect
from abc import ABCMeta
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from .arguments import expect, full_signature
from .presets import PAPER, PRESETS

TIMES = ("warm_up", "start", "end")  # keywords that are epochs, before those of fine_tune


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
        signature = inspect.signature(cls)
        bound = signature.bind_partial(*args, **given)
    except TypeError:
        return {}  # the constructor says what is wrong
    bound.apply_defaults()
    preset, duty, epochs = (bound.arguments.get(name) for name in ("preset", "duty", "epochs"))
    if preset is not None:
        found = keywords(cls, preset)
    elif isinstance(duty, Real) and duty < 1 and isinstance(epochs, int) and epochs >= 1:
        found = _in_time(cls.tuned(epochs), epochs, given.get("fine_tune"))
    else:
        return {}
    return {name: value for name, value in found.items() if given.get(name) is None and name in signature.parameters}


def _in_time(found: dict[str, Any], epochs: int, fine_tune: object) -> dict[str, Any]:
    """Tuned keywords of which none starts after the last epoch that prunes. fine_tune: what the caller gives."""
    fine_tune = found.get("fine_tune", 0) if fine_tune is None else fine_tune
    if isinstance(fine_tune, int):
        found = found | {name: min(found[name], epochs - fine_tune - 1) for name in TIMES if name in found}
    return found


def keywords(cls: type, preset: object) -> dict[str, Any]:
    """The keywords of a method's constructor under a preset; that of a subclass is its parent's."""
    op = cls.__name__
    expect(op, preset in PRESETS, "preset", f"{', '.join(PRESETS)} or None", repr(preset))
    found = next((PAPER[c.__name__] for c in cls.__mro__ if c.__name__ in PAPER), None)
    if found is None:
        raise ValueError(f"{op}: preset: expected None, as only {', '.join(PAPER)} have papers, got {preset!r}")
    return {"duty": 1.0, "clip": False, **found.method}


def training_of(method: str) -> Mapping[str, Any]:
    """The settings of the training command that a method's preset has; none where the method is not known.

    method: Its name on the command line, as in prune-while-training.
    """
    by_name = {name.lower(): preset.training for name, preset in PAPER.items()}
    return by_name.get(method.replace("-", ""), {})
