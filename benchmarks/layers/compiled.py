"""The dense convolution by torch.compile."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from harness.compiled import compiled
from harness.contender import Wrong
from layers.baselines import Dense
from layers.case import Case


@dataclass
class Compiling:
    """What a run has compiled, and whether it goes on: until so many seconds are spent, or something has failed."""

    limit: float = 0.0
    spent: float = 0.0
    error: str = ""
    functions: dict[tuple[object, ...], Callable[[Tensor, Tensor], Tensor]] = field(default_factory=dict)

    def begin(self, limit: float) -> None:
        self.limit, self.spent, self.error = limit, 0.0, ""
        self.functions.clear()

    def serves(self, case: Case, direction: str) -> bool:
        known = any(key[:-1] == self._key(case, direction) for key in self.functions)
        return not self.error and (known or self.spent < self.limit)

    def function(self, case: Case, direction: str, layout: str) -> Callable[[Tensor, Tensor], Tensor]:
        """The convolution of a problem, the same one under all masks."""
        key, args = (*self._key(case, direction), layout), case.problem.conv_args
        if key not in self.functions:
            self.functions[key] = compiled(lambda x, w: F.conv2d(x, w, **args))
        return self.functions[key]

    @staticmethod
    def _key(case: Case, direction: str) -> tuple[object, ...]:
        return case.problem.shape, case.x.dtype, direction

    def about(self) -> str:
        """What dense is in this run, for the header."""
        if not self.limit:
            return "eager"
        done = f"eager and compiled, {len(self.functions)} forms in {self.spent:.0f} s"
        if self.error:
            return f"{done}; then eager alone, since compiling failed: {self.error}"
        return done if self.spent < self.limit else f"{done}; then eager alone, since the time to compile was over"


compiling = Compiling()


class CompiledDense(Dense):
    """Compiled once for a problem, direction and layout, since it serves all masks."""

    family = "dense+compile"

    @classmethod
    def supports(cls, case: Case, direction: str) -> bool:
        # A compiled backward pass may free what it was given, so no graph of it is run twice.
        return not case.x.is_cuda and direction in ("fwd", "fwd+bwd") and compiling.serves(case, direction)

    def prepare(self) -> None:
        self.function = compiling.function(self.case, self.direction, self.layout)

    def forward(self) -> Tensor:
        return self.function(self.x, self.w)

    def check(self, results: Sequence[Tensor] | None = None) -> None:
        """The first run compiles."""
        began = time.monotonic()
        try:
            super().check(results)
        except Wrong:
            raise
        except Exception as error:
            compiling.error = f"{type(error).__name__}: {error}".splitlines()[0]
            raise
        finally:
            compiling.spent += time.monotonic() - began
