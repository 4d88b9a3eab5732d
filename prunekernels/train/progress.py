"""progress: a bar with the time that is left, on a terminal's stderr; where that is no terminal, nothing."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

EVERY = 0.1  # seconds between two drawings
BAR = 20  # characters


class Progress:
    """A line that is drawn anew as work goes on, and is gone when the `with` block ends.

    Lines that `say` prints meanwhile stand above it. One bar is drawn at a time: one inside another is not.

    Args:
        total: How many steps the work has.
        text: What it is.
        more: How many such steps follow after these: the time that is left to the end of those is told, too.
        enabled: False draws nothing.
        stream: Where to. None: stderr.
        clock: Returns seconds.

    Examples:
        with Progress(len(batches), "epoch 1/3", more=2 * len(batches)) as bar:
            for step, batch in enumerate(batches):
                ...
                bar.update(step + 1, f"loss {loss:.3f}")
    """

    _drawn: Progress | None = None

    def __init__(
        self,
        total: int,
        text: str,
        *,
        more: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.text, self.more, self.done, self.note = total, text, more, 0, ""
        self._stream, self._clock = stream or sys.stderr, clock
        self._enabled = enabled and self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._begun = self._last = 0.0

    def __enter__(self) -> Progress:
        self._begun = self._clock()
        self._enabled = self._enabled and Progress._drawn is None
        if self._enabled:
            Progress._drawn = self
            self._draw()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._enabled:
            self._erase()
            Progress._drawn = None

    def update(self, done: int, note: str = "", *, total: int | None = None) -> None:
        """Tells how many steps are done, a few words about them, and, if it is known by now only, of how many."""
        self.done, self.note, self.total = done, note, self.total if total is None else total
        if self._enabled and (self._clock() - self._last >= EVERY or done >= self.total):
            self._draw()

    def line(self, columns: int) -> str:
        """The line as it is drawn, cut to a number of columns."""
        share = min(1.0, self.done / self.total) if self.total else 1.0
        filled = int(share * BAR)
        parts = [f"{self.text} [{'#' * filled}{'-' * (BAR - filled)}] {self.done}/{self.total}"]
        if self.done:
            pace = (self._clock() - self._begun) / self.done
            parts.append(f"{clock_text(pace * (self.total - self.done))} left")
            if self.more:
                parts[-1] += f", {clock_text(pace * (self.total - self.done + self.more))} in all"
        return "  ".join([*parts, *([self.note] if self.note else [])])[: max(0, columns - 1)]

    def _draw(self) -> None:
        self._last = self._clock()
        self._stream.write(f"\r\x1b[K{self.line(shutil.get_terminal_size().columns)}")
        self._stream.flush()

    def _erase(self) -> None:
        self._stream.write("\r\x1b[K")
        self._stream.flush()


def say(line: str) -> None:
    """Prints a line to stdout, above a bar that is drawn."""
    bar = Progress._drawn
    if bar is None:
        print(line, flush=True)
        return
    bar._erase()
    print(line, flush=True)
    bar._draw()


def clock_text(seconds: float) -> str:
    """4:05 or 1:04:05."""
    whole = round(max(0.0, seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
