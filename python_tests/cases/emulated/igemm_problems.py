"""Problems for the cases of igemm.py and igemm_grad_weight.py, and the lists that host code makes of their masks."""

from dataclasses import dataclass, replace

import numpy as np

from . import arrays

ELEMENTS = ("f32", "bf16", "f16")  # as enum Element has them
ROWS = ("bf16", "f16", "tf32", "f32")
DEAD, CONSTANT = -1, -2


def vector_channels(element: str) -> int:
    """channels in 16 bytes"""
    return 8 if element in ("bf16", "f16") else 4


def packed_count(live: int) -> int:
    return -(-live // 8) * 8


@dataclass(frozen=True)
class Problem:
    n: int = 1
    c: int = 24
    h: int = 5
    w: int = 6
    k: int = 24
    r: int = 1
    s: int = 1
    stride: tuple = (1, 1)
    padding: tuple = (0, 0)
    dilation: tuple = (1, 1)
    filters: object = "some"  # live ones: some, all, none, runs (of 8), a number (spread), or a tuple of them
    inputs: object = "some"
    blocks: tuple = ()  # the kernel mask in tiles of (filters, channels), half of them live
    constants: tuple = ()  # live filters without a live kernel
    seed: int = 0

    def __str__(self):
        text = f"n{self.n}c{self.c}h{self.h}w{self.w}k{self.k}r{self.r}s{self.s}"
        for letter, value, usual in (("st", self.stride, 1), ("p", self.padding, 0), ("d", self.dilation, 1)):
            text += f"{letter}{value[0]}x{value[1]}" if value != (usual, usual) else ""
        for letter, live in (("k", self.filters), ("c", self.inputs)):
            text += f"-{letter}:{f'{live[0]}..{live[-1]}of{len(live)}' if isinstance(live, tuple) else live}"
        text += f"-blocks{self.blocks[0]}x{self.blocks[1]}" if self.blocks else ""
        return text + (f"-constants{len(self.constants)}" if self.constants else "")

    @property
    def geometry(self):
        return self.stride, self.padding, self.dilation

    def sizes(self) -> np.ndarray:
        P, Q = arrays.out_size((self.n, self.c, self.h, self.w), (self.k, self.c, self.r, self.s), *self.geometry)
        return np.array(
            [self.n, self.c, self.h, self.w, self.k, self.r, self.s, P, Q, 1]
            + [*self.stride, *self.padding, *self.dilation],
            np.int64,
        )

    def masks(self, rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """filters [K], kernels [K, C] and inputs [C]; kernels with those of dead filters and inputs taken out"""
        filters, inputs = live_ones(rng, self.filters, self.k), live_ones(rng, self.inputs, self.c)
        kernels = np.ones((self.k, self.c), bool)
        if self.blocks:
            rows, columns = self.blocks
            tiles = rng.random((-(-self.k // rows), -(-self.c // columns))) < 0.5
            kernels = np.repeat(np.repeat(tiles, rows, 0), columns, 1)[: self.k, : self.c]
        filters[list(self.constants)] = True
        kernels[list(self.constants)] = False
        return filters, kernels & filters[:, None] & inputs[None], inputs


def live_ones(rng, which, count: int) -> np.ndarray:
    live = np.zeros(count, bool)
    if which == "all":
        live[:] = True
    elif which == "some":
        live[:] = rng.random(count) < 0.6
    elif which == "runs":
        live[:] = np.repeat(rng.random(-(-count // 8)) < 0.6, 8)[:count]
        live[:8] = True
    elif isinstance(which, int):
        live[rng.permutation(count)[:which]] = True
    elif which != "none":
        live[list(which)] = True
    return live


def list_is_vectors(index: np.ndarray, channels: int, element: str) -> bool:
    size = vector_channels(element)
    if len(index) % size or channels % size:
        return False
    runs = index.reshape(-1, size)
    return bool((runs == runs[:, :1] // size * size + np.arange(size)).all())


class ChannelLists:
    """The lists of a mask table for the filters, or for the channels."""

    def __init__(self, live: np.ndarray, constant: np.ndarray, element: str):
        index = np.flatnonzero(live).astype(np.int32)
        slot = np.where(constant, CONSTANT, DEAD).astype(np.int32)
        slot[index] = np.arange(len(index))
        self.index, self.slot, self.live = arrays.guarded(index), arrays.guarded(slot), len(index)
        self.vectors = list_is_vectors(index, len(live), storage(element))


def sides(masks, element: str) -> tuple[ChannelLists, ChannelLists]:
    """filters, channels"""
    filters, kernels, _ = masks
    live_out, live_in = kernels.any(1), kernels.any(0)
    return ChannelLists(live_out, filters & ~live_out, element), ChannelLists(live_in, np.zeros_like(live_in), element)


def chunks_of_tiles(kernels: np.ndarray, of_filters: bool, tile: int, chunk: int) -> list[list[int]]:
    """What core/tile_lists.h computes, by searching the mask [K, C]: of each tile the chunks with a live kernel."""
    live = kernels[kernels.any(1)][:, kernels.any(0)]
    live = live if of_filters else live.T
    firsts = range(0, live.shape[1], chunk)
    tiles = [live[i : i + tile] for i in range(0, live.shape[0], tile)]
    return [[j // chunk for j in firsts if part[:, j : j + chunk].any()] for part in tiles] or [[]]


def device_lists(kernels: np.ndarray, of_filters: bool, tile: int, chunk: int) -> tuple[np.ndarray, np.ndarray, int]:
    """DeviceTileLists: first, chunks, longest"""
    lists = chunks_of_tiles(kernels, of_filters, tile, chunk)
    first = np.cumsum([0, *map(len, lists)])
    return arrays.guarded(first, np.int32), arrays.guarded(sum(lists, []), np.int32), max(map(len, lists))


def data(rng, shape, exact: bool) -> np.ndarray:
    return arrays.integers(rng, shape) if exact else rng.standard_normal(shape).astype(np.float32)


def held(values, element: str) -> np.ndarray:
    """The values as the kernel multiplies them: rounded to the element type."""
    if element == "tf32":
        return arrays.round_to_tf32(values)
    return arrays.widen(arrays.narrow(values, element), element)


def storage(element: str) -> str:
    return "f32" if element == "tf32" else element


def compare(result, expected, element: str, exact: bool):
    stored = arrays.widen(result, element)
    if exact:
        np.testing.assert_array_equal(stored, arrays.widen(arrays.narrow(expected, element), element))
    else:
        step = {"bf16": 2**-8, "f16": 2**-10}.get(element, 2**-20)
        np.testing.assert_allclose(stored, expected, rtol=step, atol=step * np.abs(expected).max(initial=1e-30))


def around(value: int) -> tuple[int, int, int]:
    return value - 1, value, value + 1


def convolutions() -> list[Problem]:
    """Every path through the reduction: taps, classes, numbers of channel vectors around a chunk."""
    taps = Problem(n=2, c=40, k=40, r=3, s=3, padding=(1, 1))
    return [
        taps,
        replace(taps, filters="all", inputs="all"),
        replace(taps, filters="runs", inputs="runs", constants=(9, 39)),
        replace(taps, stride=(2, 2), h=7, w=8),
        replace(taps, stride=(2, 3), h=9, w=8, c=8, inputs="all"),
        replace(taps, stride=(3, 2), r=2, s=1, padding=(0, 1), h=8, w=5),  # classes without a tap
        replace(taps, dilation=(2, 2), padding=(2, 1), h=7),
        replace(taps, stride=(2, 2), dilation=(2, 3), padding=(2, 3), h=9, w=9),  # every other class has no tap
        replace(taps, r=1, s=3, padding=(0, 1), k=17),
        replace(taps, padding=(3, 4), h=3, w=2),  # outputs that no pixel reaches
        replace(taps, padding=(0, 0), h=3, w=3, n=3),  # one pixel each
        replace(taps, r=7, s=7, padding=(3, 3), stride=(2, 2), c=3, k=8, inputs="all", h=9, w=9),
        replace(taps, stride=(8, 8), padding=(0, 0), r=3, s=3, h=12, w=11),
        replace(taps, r=15, s=15, padding=(7, 7), n=1, c=9, k=10),  # as many taps as a pixel has bits for
    ]
