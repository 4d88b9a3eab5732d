"""How long a launch takes at least: the longest of five times, each what it moves over a rate of machine.py.

Latency, tails of a grid that does not fill the multiprocessors evenly, and the time of a launch are not in it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import sass
from machine import Machine
from traffic import SECTOR, Traffic

FLOPS_OF_PRODUCT = 2 * 16 * 8 * 16  # m16n8k16


@dataclasses.dataclass(frozen=True)
class Times:
    """In microseconds."""

    mma: float
    issue: float
    shared: float
    l2: float
    dram: float

    @property
    def total(self) -> float:
        return max(dataclasses.astuple(self))

    @property
    def bound(self) -> str:
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


def instructions(moved: Traffic, loop: Counter[str]) -> float:
    """Of all warps, as if all were in the main loop."""
    if products := sass.products(loop):
        return moved.products * loop.total() / products
    accesses = loop["global load"] + loop["global store"] + loop["async copy"]
    return (moved.load_requests + moved.store_requests) * loop.total() / max(accesses, 1)


def times(machine: Machine, moved: Traffic, loop: Counter[str]) -> Times:
    """loop: the kernel's main loop, its instructions by kind."""
    rates = machine.rates
    flops = rates.warpgroup_flops if loop["warpgroup mma"] else rates.mma_flops
    return Times(
        mma=machine.us(moved.products * FLOPS_OF_PRODUCT / flops),
        issue=machine.us(instructions(moved, loop) / rates.instructions),
        shared=machine.us(moved.shared_wavefronts / rates.shared_wavefronts),
        l2=(moved.loaded_sectors + moved.store_sectors) * SECTOR / (rates.l2_gb_per_s * 1e3),
        dram=moved.distinct_sectors * SECTOR / (rates.dram_gb_per_s * 1e3),
    )
