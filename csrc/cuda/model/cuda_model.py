"""make cuda-model: what each kernel should take on a GPU that nobody has at hand. From machine code come the
instructions of main loops, from the emulator what they move, from machine.py the rates. Writes
prediction.md beside this file.

Launches, latency, tails of the grid and the kernels of cuDNN are not in it. Dense and compact convolutions are their
floors: arithmetic at the peak of the data sheet, or the bytes that have to move.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import loops
import traffic
from cases.emulated import build
from cases.emulated.igemm_problems import Problem
from machine import H100, Machine
from roofline import Times, times
from traffic import SECTOR, Traffic

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
MODELLED = (
    "igemm_fwd",
    "igemm_grad_input",
    "igemm_grad_weight",
    "gather_scatter",
    "join",
    "pack_weights",
    "batch_norm",
    "batch_norm_backward",
)
TILES = ("BlockTile<128, 128, 2, 4, 2>", "BlockTile<128, 64, 2, 2, 4>", "BlockTile<64, 32, 2, 2, 4>")
GRAD_TILES = ("BlockTile<128, 128, 2, 4, 2>", "BlockTile<64, 64, 2, 2, 4>")
DIRECTIONS = ("forward", "grad_input", "grad_weight")
NORM_PASSES = (("norm relu", True, False), ("norm sum relu", True, True), ("norm relu backward", False, False))
ELEMENT = 2  # bytes
IMAGE_CHANNELS = 4
CUT = 384  # pixels that are emulated, at least


@dataclasses.dataclass
class Launch:
    """One kernel of a plan."""

    kernel: str
    moved: Traffic
    times: Times
    floor: float  # microseconds that its least bytes and flops take at the peaks

    @property
    def share(self) -> float:
        return self.floor / self.times.total


@dataclasses.dataclass
class Row:
    layer: str
    direction: str
    loader: str  # of our kernels: vectors or elements
    direct: list[Launch]
    around: list[Launch]  # of the compact plan, beside the vendor's convolution
    small: float  # floors of the compact plan's convolution, and of dense
    dense: float

    @property
    def ours(self) -> float:
        return sum(launch.times.total for launch in self.direct)

    @property
    def compact(self) -> float:
        return self.small + sum(launch.times.total for launch in self.around)

    @property
    def best(self) -> tuple[str, float]:
        plans = {"direct": self.ours, "compact": self.compact, "dense": self.dense}
        return min(plans.items(), key=lambda plan: plan[1])


class Model:
    def __init__(self, machine: Machine, kernels: loops.Kernels, kept: float) -> None:
        self.machine, self.kernels, self.kept = machine, kernels, kept

    def of_layer(self, layer: str, full: Problem) -> list[Row]:
        return [*self._convolutions(layer, full), self._join(layer, full), *self._norms(layer, full)]

    def _convolutions(self, layer: str, full: Problem) -> Iterator[Row]:
        is_image = full.c <= IMAGE_CHANNELS  # of which every channel is read, and whose gradient nobody asks for
        for runs in (True, False) if not is_image else (False,):
            live = self._live(full.k, runs), self._live(full.c, runs)
            filters, inputs = traffic.spread(live[0], full.k, runs), traffic.spread(live[1], full.c, runs)
            for direction in DIRECTIONS if not is_image else ("forward", "grad_weight"):
                args = direction, full, filters, inputs
                yield Row(layer, direction, "vectors" if runs else "elements", self._direct(*args),
                          self._around(*args), self._floor(full, *live), self._floor(full, full.k, full.c))  # fmt: skip

    def _live(self, channels: int, runs: bool) -> int:
        live = channels if channels <= IMAGE_CHANNELS else round(channels * self.kept)
        return max(8, live // 8 * 8) if runs else live

    def _launch(self, kernel: str, moved: Traffic, flops: float, bytes_: float) -> Launch:
        return Launch(
            kernel, moved, times(self.machine, moved, self.kernels[kernel].loop), self.machine.floor(flops, bytes_)
        )

    # ---- plans

    def _direct(self, direction: str, full: Problem, filters, inputs) -> list[Launch]:
        flops = 2 * _pixels(full) * full.r * full.s * filters.live * inputs.live
        x, y = _bytes(full, full.c), _bytes(full, full.k, of_result=True)
        if direction == "grad_weight":
            return self._weight_gradient(full, filters, inputs, flops, x + y)
        grad_input = direction == "grad_input"
        target, source = (inputs, filters) if grad_input else (filters, inputs)
        results = full.n * full.h * full.w if grad_input else _pixels(full)
        tile = traffic.tile_of(results, target.live, bool(source.vectors), self.machine.multiprocessors)
        moved = _of_images(full, lambda cut: traffic.convolution(cut, filters, inputs, grad_input, tile))
        name = "igemm_grad_input" if grad_input else "igemm_fwd"
        vectors = str(bool(source.vectors)).lower()
        if tile < len(TILES):
            kernel = f"{name}_kernel<BFloat16, {TILES[tile]}, {vectors}>"
        else:
            kernel = f"{name}_warpgroup_kernel<BFloat16, {vectors}>"
        return [self._launch(kernel, moved, flops, x + y)]

    def _weight_gradient(self, full: Problem, filters, inputs, flops: float, bytes_: float) -> list[Launch]:
        tile, splits = traffic.grad_weight_plan(full, filters.live, inputs.live, self.machine.multiprocessors)
        moved = _of_images(full, lambda cut: traffic.weight_gradient(cut, filters, inputs, tile, 1))
        slice_ = filters.live * full.r * full.s * -(-inputs.live // 8) * 8 * 4
        more = (splits - 1) * slice_ / SECTOR  # the slices that were not counted
        moved = dataclasses.replace(
            moved, store_sectors=moved.store_sectors + more, distinct_sectors=moved.distinct_sectors + more
        )
        loaders = ", ".join(str(bool(side.vectors)).lower() for side in (filters, inputs))
        kernel = f"igemm_grad_weight_kernel<BFloat16, {GRAD_TILES[tile]}, {loaders}>"
        weight, unpacked = full.k * full.c * full.r * full.s * ELEMENT, _of_splits(full, filters, inputs, splits)
        return [
            self._launch(kernel, moved, flops, bytes_ + splits * slice_),
            self._launch("unpack_grad_weight_kernel<BFloat16>", unpacked, 0, splits * slice_ + weight),
        ]

    def _around(self, direction: str, full: Problem, filters, inputs) -> list[Launch]:
        """The gathers and the scatter of the compact plan; its weights are small."""
        x = (full.h * full.w, inputs), _bytes(full, full.c) + _bytes(full, inputs.live)
        sizes = full.sizes()
        y = (
            (int(sizes[7] * sizes[8]), filters),
            _bytes(full, full.k, of_result=True) + _bytes(full, filters.live, of_result=True),
        )
        gathered = {"forward": [x], "grad_input": [y], "grad_weight": [x, y]}[direction]
        written = {"forward": [y], "grad_input": [x], "grad_weight": []}[direction]
        return [self._copy(gather, full.n, pixels, lists, bytes_)
                for gather, sides in ((True, gathered), (False, written))
                for (pixels, lists), bytes_ in sides if lists.live < len(lists.slot)]  # fmt: skip

    def _copy(self, gather: bool, images: int, pixels: int, lists, bytes_: float) -> Launch:
        moved = _affine(images, pixels, lambda n: traffic.channel_copy(gather, n, pixels, lists))
        name = "gather_channels" if gather else "scatter_channels"
        unit = "<Pack<unsigned long, 2>, 1>" if lists.vectors else "<unsigned short, 2>"
        return self._launch(f"{name}_pixels_kernel{unit}", moved, 0, bytes_)

    def _join(self, layer: str, full: Problem) -> Row:
        """The addition of two results of a layer in the live mode."""
        sizes, live = full.sizes(), self._live(full.k, False)
        pixels, lists = int(sizes[7] * sizes[8]), traffic.spread(live, full.k, False)
        moved = _affine(full.n, pixels, lambda n: traffic.join(n, pixels, lists, lists))
        bytes_ = 2 * _bytes(full, live, of_result=True) + _bytes(full, full.k, of_result=True)
        return Row(layer, "join", "elements", [self._launch("join_pixels_kernel<BFloat16, 2>", moved, 0, bytes_)],
                   [], math.inf, math.inf)  # fmt: skip

    def _norms(self, layer: str, full: Problem) -> Iterator[Row]:
        """The norm of a layer's result in the live mode, with a relu, or a sum and a relu, behind it."""
        for runs in (True, False):
            live = self._live(full.k, runs)
            if runs == bool(live % 8):
                continue  # vectors of a width that has none, or elements of one that has vectors
            for name, forward, adds in NORM_PASSES:
                yield Row(layer, name, "vectors" if runs else "elements",
                          self._norm(full, live, forward, adds), [], math.inf, math.inf)  # fmt: skip

    def _norm(self, full: Problem, live: int, forward: bool, adds: bool) -> list[Launch]:
        def moved(images: int) -> tuple[Traffic, Traffic]:
            if forward:
                return traffic.norm_forward(images * pixels, live, adds)
            return traffic.norm_backward(images * pixels, live)

        pixels, span = _pixels(dataclasses.replace(full, n=1)), 1 if live % 8 else 8
        first, second = ("sums", "apply") if forward else ("grad_sums", "grad_apply")
        flags = (f", {str(adds).lower()}, true" if forward else ", true"), ("" if forward else ", true")
        tensor, read = _bytes(full, live, of_result=True), 1 if forward else 2
        kernels = ((f"batch_norm_{first}_kernel<BFloat16, {span}{flags[1]}>", read),
                   (f"batch_norm_{second}_kernel<BFloat16, {span}{flags[0]}>", read + 1 + adds))  # fmt: skip
        return [
            self._launch(name, _affine(full.n, pixels, lambda n, i=i: moved(n)[i]), 0, passes * tensor)
            for i, (name, passes) in enumerate(kernels)
        ]

    def _floor(self, full: Problem, filters: int, channels: int) -> float:
        flops = 2 * _pixels(full) * full.r * full.s * filters * channels
        bytes_ = _bytes(full, channels) + _bytes(full, filters, of_result=True)
        return self.machine.floor(flops, bytes_ + filters * channels * full.r * full.s * ELEMENT)


def _pixels(problem: Problem) -> int:
    sizes = problem.sizes()
    return int(problem.n * sizes[7] * sizes[8])


def _bytes(problem: Problem, channels: int, of_result: bool = False) -> int:
    return (_pixels(problem) if of_result else problem.n * problem.h * problem.w) * channels * ELEMENT


def _affine(full: int, pixels: int, count: Callable[[int], Traffic]) -> Traffic:
    """What `full` images move, from what few move and what twice as many do."""
    few = min(full, -(-CUT // pixels))
    once = dataclasses.astuple(count(few))
    if few == full:
        return Traffic(*once)
    twice = dataclasses.astuple(count(2 * few))
    return Traffic(*(a + (b - a) * (full - few) / few for a, b in zip(once, twice, strict=True)))


def _of_images(full: Problem, count: Callable[[Problem], Traffic]) -> Traffic:
    return _affine(full.n, _pixels(dataclasses.replace(full, n=1)), lambda n: count(dataclasses.replace(full, n=n)))


def _of_splits(full: Problem, filters, inputs, splits: int) -> Traffic:
    if splits <= 4:
        return traffic.unpacked(full, filters, inputs, splits)
    two, four = (dataclasses.astuple(traffic.unpacked(full, filters, inputs, count)) for count in (2, 4))
    return Traffic(*(a + (b - a) * (splits - 2) / 2 for a, b in zip(two, four, strict=True)))


# ---- the report

NAME = re.compile(r'n\d+c(\d+)h(\d+)k(\d+)r(\d+)s(\d+)p(\d+)g(\d+) "(.+?)(?:\*\d+)?"')


def problems(suite: str, batch: int) -> Iterator[tuple[str, Problem]]:
    """The layers of a suite without groups; each size once."""
    seen = set()
    for line in (ROOT / "benchmarks" / "shapes" / f"{suite}.txt").read_text().splitlines():
        if match := NAME.match(line):
            c, h, k, r, stride, padding, groups = map(int, match.groups()[:7])
            problem = Problem(batch, c, h, h, k, r, r, (stride, stride), (padding, padding))
            if groups == 1 and problem not in seen:
                seen.add(problem)
                yield match[8], problem


def table(rows: list[Row]) -> list[str]:
    head = ["layer", "direction", "loader", "kernel", "mma", "issue", "shared", "L2", "DRAM", "us", "bound", "of floor",
            "plan", "compact", "dense floor", "best"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * 4 + "---:|" * 6 + "---|---:|---:|---:|---:|---|"]
    for row in rows:
        for i, launch in enumerate(row.direct + row.around):
            ours = i < len(row.direct)
            each = [f"{value:.1f}" for value in dataclasses.astuple(launch.times)]
            name = _short(launch.kernel) + ("" if ours else " (compact)")
            whole = [f"{row.ours:.1f}", _us(row.compact), _us(row.dense), row.best[0]] if i == 0 else [""] * 4
            cells = [row.layer, row.direction, row.loader] if i == 0 else [""] * 3
            cells += [name, *each, f"{launch.times.total:.1f}", launch.times.bound, f"{launch.share:.2f}", *whole]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _short(kernel: str) -> str:
    tile = re.search(r"BlockTile<(\d+), (\d+)", kernel)
    if "_warpgroup" in kernel:
        return kernel.split("_warpgroup")[0] + " w128x128"
    return kernel.split("_kernel")[0].removesuffix("_pixels") + (f" {tile[1]}x{tile[2]}" if tile else "")


def _us(value: float) -> str:
    return "" if math.isinf(value) else f"{value:.1f}"


def goals(rows: list[Row]) -> list[str]:
    """The goals that the model can speak of, over 3x3 layers."""
    layers = [row for row in rows if ".3x3" in row.layer and row.direction in DIRECTIONS]
    lines = []
    for loader in ("vectors", "elements"):
        its = [row for row in layers if row.loader == loader]
        if its:
            over_compact = [row.best[1] / row.compact for row in its]
            over_dense = [row.best[1] / row.dense for row in its]
            lines.append(
                f"- {loader}: over {len(its)} cases of 3x3 layers the best plan takes {_mean(over_compact):.2f} of "
                f"compact's time in the mean, {max(over_compact):.2f} at most, and {max(over_dense):.2f} of the dense "
                "floor at most"
            )
    shares: dict[str, list[float]] = {}
    for row in rows:
        for launch in row.direct + row.around:
            if not launch.kernel.startswith("igemm"):
                shares.setdefault(_short(launch.kernel), []).append(launch.share)
    lines += [f"- {name}: {_mean(each):.2f} of its memory floor in the mean, at least {min(each):.2f}"
              for name, each in sorted(shares.items())]  # fmt: skip
    return lines


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def report(machine: Machine, suites: list[str], batch: int, kept: float, rows: list[Row]) -> str:
    head = f"""# What the CUDA kernels should take

A prediction for {machine.name}, bfloat16, channels_last, batch {batch}, kept {kept:g} of filters and channels, in
microseconds: no GPU has run it. Suites: {", ".join(suites)}. Written by `make cuda-model`; the rates are in
`machine.py`. Each kernel takes the longest of five times: products of tensor cores, issued instructions, wavefronts
of shared memory, sectors from L2, bytes from DRAM. Launches, latency, tails of the grid and the vendor's kernels are
unknown to it: dense is its floor (flops and bytes at the peaks of the data sheet), compact is the floor of its small
convolution and our copies around it. *Of floor*: what a kernel's own flops and bytes take at the peaks, over its
time.

"""
    return head + "\n".join([*goals(rows), "", *table(rows)]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--suite", nargs="+", default=["resnet50"], help="files of benchmarks/shapes")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--kept", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=HERE / "prediction.md")
    asked = parser.parse_args()
    tools = loops.tools()
    if isinstance(tools, str):
        sys.exit(f"cuda-model: {tools} cannot be found")
    model, rows = Model(H100, loops.compiled(*tools, MODELLED), asked.kept), []
    for family in ("igemm", "igemm_grad_weight", "channels", "pack_weights", "batch_norm"):
        build.load(family, counted=True)
    layers = [each for suite in asked.suite for each in problems(suite, asked.batch)]
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        for (layer, _), found in zip(layers, pool.map(model.of_layer, *zip(*layers, strict=True)), strict=True):
            rows += found
            print(
                f"{layer}: {', '.join(f'{row.direction} {row.loader} {row.ours:.0f} us' for row in found)}", flush=True
            )
    asked.out.write_text(report(model.machine, asked.suite, asked.batch, asked.kept, rows))
    print(*goals(rows), f"{asked.out.relative_to(ROOT)} is written", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
