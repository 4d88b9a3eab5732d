"""Which runs a command line asks for, and in which order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainings.rows import TrainingRow
from trainings.spec import KINDS, METHODS, RATE, Spec


@dataclass(frozen=True)
class Asked:
    """The runs that a command line asks for. epochs: of all runs but those of scratch-time."""

    archs: Sequence[str]
    methods: Sequence[str]
    rates: Sequence[float]
    seeds: Sequence[int]
    epochs: int
    duty: float
    kinds: Sequence[str]
    sweep: Sequence[float] = ()
    swept: Sequence[str] = ()
    budgets: Sequence[str] = ()  # methods of the kinds budget and uniform
    uniform_rates: Mapping[str, float] | None = None  # by network: leaves the multiply-adds that a budget of RATE does

    def specs(self, rows: Sequence[TrainingRow]) -> list[Spec]:
        """All runs that are known now, in the order in which they are to be made, each once: seed by seed, so that an
        early stop leaves something useful. A run from scratch is known once the method's own run has its row."""
        found = [spec for seed in self.seeds for kind in KINDS for spec in self._of(kind, seed, rows)]
        return list(dict.fromkeys(found))

    def _of(self, kind: str, seed: int, rows: Sequence[TrainingRow]) -> Iterator[Spec]:
        if kind not in self.kinds:
            return
        for arch in self.archs:
            if kind == "dense":
                yield Spec(arch, kind, seed, self.epochs)
            elif kind in ("scratch", "scratch-time"):
                yield from self._scratch(kind, arch, seed, rows)
            elif kind in ("budget", "uniform", "sweep"):
                yield from getattr(self, f"_{kind}")(arch, seed)
            else:
                duty = self.duty if kind == "method" else 1.0
                yield from self._pruned(kind, arch, seed, self.methods, self.rates, [duty])

    def _pruned(
        self, kind: str, arch: str, seed: int, methods: Iterable[str], rates: Iterable[float], duties: Sequence[float],
        **options: Any,
    ) -> Iterator[Spec]:  # fmt: skip
        for method in methods:
            for rate in rates:
                for duty in duties:
                    yield Spec(arch, kind, seed, self.epochs, method, rate, duty, tuple(options.items()))

    def _sweep(self, arch: str, seed: int) -> Iterator[Spec]:
        if self.sweep:
            yield from self._pruned("sweep", arch, seed, self.swept, [RATE], self.sweep)
            yield from self._pruned("sweep", arch, seed, self.swept, [RATE], [self.duty], clip=False)

    def _budget(self, arch: str, seed: int) -> Iterator[Spec]:
        yield from self._pruned("budget", arch, seed, self.budgets, [RATE], [self.duty], budget="flops")

    def _uniform(self, arch: str, seed: int) -> Iterator[Spec]:
        if self.uniform_rates:
            yield from self._pruned("uniform", arch, seed, self.budgets, [self.uniform_rates[arch]], [self.duty])

    def _scratch(self, kind: str, arch: str, seed: int, rows: Sequence[TrainingRow]) -> Iterator[Spec]:
        """Architectures that several methods leave are trained once; so are those with as many epochs."""
        asked = {str(spec) for spec in self._of("method", seed, rows)}
        for row in sorted((row for row in rows if row.job in asked), key=lambda row: METHODS.index(row.method)):
            if row.arch == arch:
                epochs = row.epochs if kind == "scratch" else row.scratch_epochs
                yield Spec(arch, "scratch", seed, epochs, key=row.key)
