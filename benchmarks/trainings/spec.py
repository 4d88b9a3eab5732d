"""What is trained: the setting that all runs of a command share, one run, and which runs are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prunekernels.methods.arguments import keyword_options
from prunekernels.train import setup
from prunekernels.train.config import Config

if TYPE_CHECKING:
    from trainings.rows import TrainingRow

# dense: the plain network. method: at its defaults. scratch: the small network that a method leaves, from new weights.
# literal: the method to its paper's letter. budget: a share of the multiply-adds is pruned; uniform: the rate of all
# layers that leaves as many. sweep: another duty, or without clipping.
KINDS = ("dense", "method", "scratch", "scratch-time", "literal", "budget", "uniform", "sweep")
METHODS = [name for name in setup.known_methods() if name != "none"]
RATE = 0.5  # of the goals, the sweep and the budgets


@dataclass(frozen=True)
class Setting:
    """What all runs of a command share, so that their rows compare."""

    data: str
    train_images: int | None
    size: int | None
    width: float
    mode: str
    threads: int

    def __str__(self) -> str:
        images = "all" if self.train_images is None else f"{self.train_images:,}"
        size = "" if self.size is None else f", size {self.size}"
        return f"{self.data}, {images} training images{size}, width {self.width:g}, {self.mode} mode"


@dataclass(frozen=True)
class Spec:
    """One run. key: the architecture of a scratch run; options: other keywords of the method, as (name, value)."""

    arch: str
    kind: str
    seed: int
    epochs: int
    method: str = "none"
    rate: float = 0.0
    duty: float = 1.0
    options: tuple[tuple[str, Any], ...] = ()
    key: str = ""

    def __str__(self) -> str:
        words = [self.arch, f"seed {self.seed}", self.kind, self.key, f"{self.epochs} epochs"]
        if self.method != "none":
            words += [self.method, f"{self.rate:g}", f"duty {self.duty:g}"]
        return " ".join(filter(None, (*words, *(f"{name}={value}" for name, value in self.options))))

    def config(self, setting: Setting) -> Config:
        """The settings of the training command for this run."""
        common: dict[str, Any] = {
            "out": "unused", "arch": self.arch, "width": setting.width, "data": setting.data, "size": setting.size,
            "epochs": self.epochs, "seed": self.seed, "quiet": True, "report": False,
        }  # fmt: skip
        if self.method == "none":
            return Config(**common)
        pruning = {"method": self.method, "rate": self.rate, "duty": self.duty, "options": self._options()}
        mode = "dense" if self.kind == "literal" else setting.mode
        return Config(**common, **pruning, mode=mode)

    def _options(self) -> dict[str, Any]:
        cls = setup.known_methods()[self.method]
        assert cls is not None
        is_joint = self.kind != "literal" and "coupling" in keyword_options(cls)
        return ({"coupling": "joint"} if is_joint else {}) | dict(self.options)


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
        if self.uniform_rates is not None:
            yield from self._pruned("uniform", arch, seed, self.budgets, [self.uniform_rates[arch]], [self.duty])

    def _scratch(self, kind: str, arch: str, seed: int, rows: Sequence[TrainingRow]) -> Iterator[Spec]:
        """Architectures that several methods leave are trained once; so are those with as many epochs."""
        asked = {str(spec) for spec in self._of("method", seed, rows)}
        for row in sorted((row for row in rows if row.job in asked), key=lambda row: METHODS.index(row.method)):
            if row.arch == arch:
                epochs = row.epochs if kind == "scratch" else row.scratch_epochs
                yield Spec(arch, "scratch", seed, epochs, key=row.key)
