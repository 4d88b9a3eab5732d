"""igemm_fwd, igemm_grad_input and both block_sparse_* against the convolutions of arrays.py, with NaN in everything
dead, read or written. As in igemm_grad_weight.py, operands are given as they were drawn, but weights are packed, and
so rounded already."""

import mmap
from dataclasses import dataclass, replace

import numpy as np

from . import arrays
from .igemm_choices import HostChoices, HostTileLists, HostVectors
from .igemm_problems import (
    ELEMENTS,
    ROWS,
    Problem,
    around,
    compare,
    convolutions,
    data,
    device_lists,
    held,
    packed_count,
    sides,
    storage,
    vector_channels,
)
from .mask_grad import Shifted

TILES = ((128, 128), (128, 64), (64, 32), (128, 128))  # as enum IgemmTile: pixels, channels; the last by warpgroups
WARPGROUPS = 3  # of TILES
NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux


@dataclass(frozen=True)
class Conv:
    """One call of igemm_fwd, igemm_grad_input or block_sparse_*."""

    problem: Problem
    element: str
    grad_input: bool
    tile: int
    bias: bool = False
    listed: bool = False
    exact: bool = True
    plain: str = ""  # identity: no lists at all; elements, whatever the lists are; shifted: off a 16-byte boundary

    def __str__(self):
        pixels, channels = TILES[self.tile]
        notes = [f"m{pixels}n{channels}", *(["bias"] if self.bias else []), *([] if self.exact else ["random"])]
        notes[0] = f"w{pixels}n{channels}" if self.tile == WARPGROUPS else notes[0]
        return "-".join([str(self.problem), *notes, *([self.plain] if self.plain else [])])

    def run(self, lib):
        p, store = self.problem, lambda values: arrays.narrow(values, self.element)
        rng = np.random.default_rng(p.seed)
        masks = filters, kernels, inputs = p.masks(rng)
        out, into = sides(masks, self.element)
        x_shape, w_shape = (p.n, p.c, p.h, p.w), (p.k, p.c, p.r, p.s)
        y_shape = (p.n, p.k, *arrays.out_size(x_shape, w_shape, *p.geometry))
        w = np.where(kernels[:, :, None, None], held(data(rng, w_shape, self.exact), self.element), 0)
        source, target = (out, into) if self.grad_input else (into, out)

        drawn = data(rng, y_shape if self.grad_input else x_shape, self.exact)
        alive = np.zeros(drawn.shape[1], bool)
        alive[source.index] = True
        given = np.where(alive[None, :, None, None], drawn, np.nan)
        operand = np.where(alive[None, :, None, None], held(drawn, self.element), 0)
        packed = w.transpose(1, 2, 3, 0) if self.grad_input else w.transpose(0, 2, 3, 1)
        packed = packed[target.index][..., source.index]
        packed = np.pad(packed, [(0, 0)] * 3 + [(0, packed_count(source.live) - source.live)])
        if self.plain == "elements":  # a row beyond the live ones is not read
            packed = np.concatenate([packed, np.full_like(packed[:1], np.nan)])
        if self.grad_input:
            expected = arrays.conv2d_grad_input(operand, w, x_shape, *p.geometry)
            bias = None
        else:
            bias = held(data(rng, p.k, self.exact), self.element) if self.bias else None
            expected = arrays.conv2d(operand, w, *p.geometry)
            if self.bias:
                expected += np.where(filters, bias, 0)[None, :, None, None]
                bias = store(np.where(filters, bias, np.nan))
        lists = (None, None, 0)
        if self.listed:
            lists = device_lists(kernels, not self.grad_input, TILES[self.tile][1], vector_channels(self.element))
        identity, shifted = self.plain == "identity", int(self.plain == "shifted")
        operand = Shifted(arrays.nhwc(given), self.element, shifted)
        result = Shifted(np.full(arrays.nhwc(expected).shape, np.nan), self.element, shifted)
        lib.call(
            "pk_igemm",
            self.grad_input,
            p.sizes(),
            ELEMENTS.index(storage(self.element)),
            self.element == "tf32",
            self.tile,
            operand.array,
            given.shape[1],
            source.live,
            None if identity else source.index,
            source.vectors and self.plain != "elements",
            store(packed),
            bias,
            result.array,
            expected.shape[1],
            target.live,
            None if identity else target.index,
            None if identity else target.slot,
            *lists,
        )
        result.check_surroundings(str(self))
        compare(result.array, arrays.nhwc(expected), self.element, self.exact)


def _channels(element: str) -> list[Problem]:
    chunk = 4 * vector_channels(element)
    counts = sorted({1, 2, *around(vector_channels(element)), *around(chunk), 3 * chunk, 5 * chunk + 1})
    problems = [Problem(c=count + 7, inputs=count, h=2, w=9) for count in counts]
    problems += [Problem(k=count + 7, filters=count, h=2, w=9) for count in counts]  # the input gradient's operand
    problems += [Problem(c=1, k=1, inputs="all", filters="all"), Problem(n=0), Problem(h=0), Problem(c=64, k=9)]
    problems += [Problem(filters=f, inputs=i) for f, i in (("none", "all"), ("all", "none"), ("all", "all"))]
    return problems + [Problem(filters="none", constants=(0, 5, 6, 23)), Problem(k=25, c=27), Problem(k=25, c=25)]


def _tile_edges(element: str, grad_input: bool, tiles) -> list[Conv]:
    """Numbers of pixels, result channels and full-width channels around the sizes of each tile."""
    cases = []
    for tile in tiles:
        pixels, channels = TILES[tile]
        for count in around(pixels):
            cases.append(Conv(Problem(h=1, w=count, c=9, k=9), element, grad_input, tile))
        for count in (*around(channels), 2 * channels + 1):
            wide = {"c" if grad_input else "k": 2 * count + 3, "inputs" if grad_input else "filters": count}
            cases.append(Conv(Problem(h=3, w=2, **wide), element, grad_input, tile))
        # few live in many: one block writes a wide range; ranges that begin and end inside a vector
        spread = (0, 1, 900, *range(1000, 1000 + channels))
        sides = {"c": 1200, "k": 8, "inputs": spread} if grad_input else {"k": 1200, "c": 8, "filters": spread}
        cases.append(Conv(Problem(h=1, w=3, **sides), element, grad_input, tile))
    return cases


def _of(element: str, grad_input: bool) -> list[Conv]:
    tiles = (0, 1, 2, WARPGROUPS) if vector_channels(element) == 8 else (0, 1, 2)
    cases = _tile_edges(element, grad_input, tiles)
    for i, problem in enumerate(convolutions()):
        cases.append(Conv(problem, element, grad_input, i % 3, bias=i % 2 == 0 and not grad_input))
    for tile in tiles[2:]:
        cases += [Conv(problem, element, grad_input, tile, bias=not grad_input) for problem in _channels(element)]
    if WARPGROUPS in tiles:
        cases += [Conv(problem, element, grad_input, WARPGROUPS, bias=not grad_input) for problem in convolutions()]
    everything = Problem(n=2, c=40, k=40, r=3, s=3, padding=(1, 1), filters="all", inputs="all")
    for tile in tiles:
        cases += [Conv(everything, element, grad_input, tile, plain=how) for how in ("identity", "elements", "shifted")]
        cases.append(Conv(replace(everything, filters="runs", inputs="runs"), element, grad_input, tile, exact=False))
    return cases


def _sparse(element: str, grad_input: bool) -> list[Conv]:
    cases = []
    for tile in (1, 2):
        channels = TILES[tile][1]
        for blocks in ((channels, 16), (8, 8), (channels, 1), (5, 3)):
            masked = Problem(c=2 * channels + 5, k=2 * channels + 9, h=2, w=5, blocks=blocks, filters="all")
            if grad_input:
                masked = replace(masked, blocks=blocks[::-1])
            cases += [
                Conv(masked, element, grad_input, tile),
                Conv(replace(masked, inputs="all"), element, grad_input, tile),
            ]
        for problem in convolutions()[:8]:
            problem = replace(problem, blocks=(16, 8), inputs="all", filters="all")
            cases.append(Conv(problem, element, grad_input, tile, bias=not grad_input))
    nothing = Problem(blocks=(8, 8), filters="none")
    return cases + [
        Conv(nothing, element, grad_input, 2),
        Conv(replace(nothing, filters="all", constants=(1,)), element, grad_input, 2),
    ]


class Huge:
    """An operand of more than 2^31 elements, so offsets need 64 bits; a large stride reads few of them."""

    def __str__(self):
        return "huge"

    def run(self, lib):
        channels, side = 1 << 16, 184  # 184^2 pixels; the stride makes 23^2 of them
        try:
            memory = mmap.mmap(-1, side * side * channels * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
        except OSError:
            return  # no address space for it
        x = np.frombuffer(memory, np.uint16).reshape(side, side, channels)
        problem = Problem(c=channels, k=1, h=side, w=side, stride=(8, 8))
        index, weight = arrays.guarded([0, channels - 1], np.int32), np.zeros((1, 8), np.float32)
        weight[0, :2] = 1, 2
        y = arrays.poison((23, 23), "bf16")
        x[176, 176, channels - 1] = x[0, 8, 0] = arrays.narrow([3], "bf16")[0]
        weight = arrays.narrow(weight, "bf16")
        for tile in range(3):
            y[...] = 0x7FFF
            shape = (False, problem.sizes(), ELEMENTS.index("bf16"), False, tile)
            lib.call("pk_igemm", *shape, x, channels, 2, index, False, weight, None, y, 1, 1, *[None] * 4, 0)
            expected = np.zeros((23, 23))
            expected[22, 22], expected[0, 1] = 6, 3
            compare(y, expected, "bf16", True)


class Refused:
    """cudaErrorInvalidValue for the large tile with lists, a misaligned weight, too large a stride."""

    def __str__(self):
        return "refused"

    def run(self, lib):
        one = arrays.guarded(np.zeros(64, np.int32))
        sizes = Problem().sizes()
        wide = replace(Problem(), stride=(9, 1), h=20).sizes()
        for tile, weight, lists, problem in (
            (0, one, one, sizes),
            (2, one[1:], None, sizes),
            (2, one, None, wide),
        ):
            status, _ = lib.status(
                "pk_igemm",
                False,
                problem,
                1,
                False,
                tile,
                one,
                24,
                1,
                one,
                False,
                weight,
                None,
                one,
                24,
                1,
                one,
                one,
                lists,
                one,
                1,
            )
            assert status == 1


CASES: dict[str, list] = {
    **{f"igemm_fwd_{e}_sm80": _of(e, False) for e in ROWS},
    **{f"igemm_grad_input_{e}_sm80": _of(e, True) for e in ROWS},
    **{f"block_sparse_fwd_{e}_sm80": _sparse(e, False) for e in ROWS},
    **{f"block_sparse_grad_input_{e}_sm80": _sparse(e, True) for e in ROWS},
}
CASES["igemm_fwd_bf16_sm80"] += [HostVectors(), HostChoices(), Refused(), Huge()]
CASES["block_sparse_fwd_bf16_sm80"].append(HostTileLists())
