"""The GPU that the model speaks of, and six rates. No run has calibrated them: each says where its guess is from.

After a run on a GPU, the ceilings that benchmarks/gpu.sh measures give dram and mma, and ncu the others.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Rates:
    """Of one multiprocessor and cycle, but for l2 and dram."""

    mma_flops: float  # by single warps
    warpgroup_flops: float
    instructions: float  # of warps
    shared_wavefronts: float  # of 128 bytes
    l2_gb_per_s: float
    dram_gb_per_s: float


@dataclasses.dataclass(frozen=True)
class Machine:
    name: str
    multiprocessors: int
    clock_ghz: float
    rates: Rates
    peak_mma_flops: float  # for floors: what the data sheet promises
    peak_dram_gb_per_s: float

    def us(self, cycles: float) -> float:
        """Microseconds that so many cycles take, of all multiprocessors together."""
        return cycles / self.multiprocessors / (self.clock_ghz * 1e3)

    def floor(self, flops: float, bytes_: float) -> float:
        """Microseconds of arithmetic or memory at the peaks of the data sheet, whichever takes longer."""
        return max(self.us(flops / self.peak_mma_flops), bytes_ / (self.peak_dram_gb_per_s * 1e3))


H100 = Machine(
    name="an H100 SXM",
    multiprocessors=132,
    clock_ghz=1.755,  # the boost clock of the data sheet's rates
    rates=Rates(
        mma_flops=2540,  # 62 % of the peak: what is published of mma.sync beside wgmma
        warpgroup_flops=3690,  # 90 % of the peak
        instructions=3.4,  # of 4 schedulers: 85 %, as well-tuned loops reach
        shared_wavefronts=1,
        l2_gb_per_s=5500,  # reads that hit, by public microbenchmarks
        dram_gb_per_s=3000,  # 90 % of the peak
    ),
    peak_mma_flops=4096,
    peak_dram_gb_per_s=3350,
)
