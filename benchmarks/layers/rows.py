"""A row of conv.py's results: one problem, mask and direction, with its times and what follows from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from layers.problems import Problem

RATIOS = ("vs_dense", "noise", "vs_compaction", "vs_sparseprop", "of_limit", "of_dense_peak")
RATES = ("tflops", "gb_s")
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Row:
    """Times are medians in ms, None where a baseline did not run. The fields are the columns of results files."""

    problem: str
    name: str
    times: int
    mask: str
    side: str  # of filter masks; of block masks the size of a block, "64x16" filters and channels
    kept: float  # keep ratio
    live_k: int
    live_c: int
    live_kernels: int
    direction: str
    layout: str  # where ours was fastest
    plan: str
    ms: float
    dense_ms: float  # eager
    masked_dense_ms: float | None
    compaction_ms: float | None
    sparseprop_ms: float | None
    limit_ms: float | None  # the upper bound L
    dense_compile_ms: float | None = None
    dense_again_ms: float | None = None  # eager, a second contender
    ours_peak_mb: float | None = None
    dense_peak_mb: float | None = None
    quartiles: dict[str, list[float]] = field(default_factory=dict)  # "ours/nchw": [first, median, third]
    dtype: str = "float32"
    device: str = "cpu"
    clock: str = "wall"

    @property
    def best_dense_ms(self) -> float:
        return min(self.dense_ms, self.dense_compile_ms or self.dense_ms)

    @property
    def fastest_dense(self) -> str:
        """Which form of dense is the fastest: "eager" or "compiled"."""
        return "eager" if self.dense_ms == self.best_dense_ms else "compiled"

    @property
    def vs_dense(self) -> float:
        return self.best_dense_ms / self.ms

    @property
    def noise(self) -> float | None:
        """The slower of two dense contenders over the faster one: 1 is no noise."""
        if self.dense_again_ms is None:
            return None
        return max(self.dense_ms, self.dense_again_ms) / min(self.dense_ms, self.dense_again_ms)

    @property
    def label(self) -> str:
        return self.name or self.problem

    @property
    def which(self) -> str:
        """Mask and side, unless they are the usual ones."""
        if self.mask == "filter":
            return "" if self.side == "both" else f" {self.side}"
        return f" {self.mask}s"

    @property
    def job(self) -> str:
        return f"{self.label} {self.mask} {self.side} kept {self.kept:g}"

    @property
    def vs_compaction(self) -> float | None:
        return None if self.compaction_ms is None else self.compaction_ms / self.ms

    @property
    def vs_sparseprop(self) -> float | None:
        return None if self.sparseprop_ms is None else self.sparseprop_ms / self.ms

    @property
    def of_limit(self) -> float | None:
        return None if self.limit_ms is None else self.limit_ms / self.ms

    @property
    def of_dense_peak(self) -> float | None:
        return None if self.ours_peak_mb is None or not self.dense_peak_mb else self.ours_peak_mb / self.dense_peak_mb

    @property
    def density(self) -> float:
        """Live share of the kernels. With few filters or blocks it differs from `kept`, since live counts are whole."""
        filters, channels, *_ = Problem.parse(self.problem).weight_shape
        return self.live_kernels / (filters * channels)

    @property
    def tflops(self) -> float:
        return self._work()[0] / self.ms / 1e9

    @property
    def gb_s(self) -> float:
        return self._work()[1] / self.ms / 1e6

    def _work(self) -> tuple[float, float]:
        """Operations on live kernels, and the fewest bytes to move: each product of the direction reads its live
        operands and writes its result at full width."""
        p = Problem.parse(self.problem)
        x, y, w = p.batch * p.height * p.width, p.batch * p.out_height * p.out_width, p.taps**2  # a channel, a kernel
        live_x, live_y, live_w = x * self.live_c, y * self.live_k, w * self.live_kernels
        elements = {
            "fwd": live_x + live_w + y * p.filters,
            "grad_input": live_y + live_w + x * p.channels,
            "grad_weight": live_x + live_y + w * p.filters * (p.channels // p.groups),
        }
        wanted = set(elements) if self.direction == "fwd+bwd" else {self.direction}
        if p.image_input:
            wanted.discard("grad_input")
        bytes_each = ELEMENT_BYTES[self.dtype]
        return 2 * live_w * y * len(wanted), bytes_each * sum(elements[name] for name in wanted)

    def flat(self) -> dict[str, object]:
        derived = {name: getattr(self, name) for name in ("fastest_dense", *RATIOS, *RATES, "density")}
        return {k: v for k, v in asdict(self).items() if k != "quartiles"} | derived
