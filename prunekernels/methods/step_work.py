"""StepWork: work around each step of an optimizer, and handles of hooks."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple


class StepWork(NamedTuple):
    """Work that is done around each step, while `when` says so."""

    work: Callable[[], None]
    when: Callable[[], bool]
    full_width: bool
    reads_weights: bool
    changes_gradients: bool

    def run(self, *_: object) -> None:
        """Works on the model's own tensors, around a step of its own optimizer."""
        if self.when():
            self.work()


class Registered:
    """The handle of work or of a hook, on both forms of a network."""

    def __init__(self, *removals: Callable[[], None]) -> None:
        self._removals = list(removals)

    def remove(self) -> None:
        """Ends it."""
        while self._removals:
            self._removals.pop()()


class IdleInCopies:
    """Calls a bound method as a hook, as long as its object is there. Copies and pickles of a network have it idle."""

    def __init__(self, method: Callable[[], None]) -> None:
        self._method = weakref.WeakMethod(method)

    def __call__(self, *_: object) -> None:
        if (method := self._method()) is not None:
            method()

    def __reduce__(self) -> Any:
        return _idle, ()


def _idle() -> Callable[..., None]:
    return _nothing


def _nothing(*_: object) -> None:
    """Does nothing."""


def always() -> bool:
    """A time that is always."""
    return True
