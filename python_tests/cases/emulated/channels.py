"""gather_channels, scatter_channels and join: both layouts, every width of vector, every tail."""

from dataclasses import dataclass

import numpy as np

from . import arrays

BLOCK = 256 * 4  # kCopyThreads * kCopyInFlight: vectors of a block
ROUNDS = 2 * 4 * 1024 + 3  # pixels of 256 units from which on a block goes several rounds: kCopyBlocks
ELEMENTS = ("f32", "bf16", "f16")  # as enum Element has them


def _layout(x: np.ndarray, channels_last: bool) -> np.ndarray:
    """[N, C, pixels] as it lies in memory, guarded."""
    return arrays.guarded(np.ascontiguousarray(x.transpose(0, 2, 1)) if channels_last else x)


def _slots(index, channels: int) -> np.ndarray:
    """The inverse list; a channel that is not listed is dead (-1) or, every other one, constant (-2)."""
    slot = np.where(np.arange(channels) % 2, -1, -2).astype(np.int32)
    for j, c in enumerate(index):
        if c >= 0:
            slot[c] = j
    return slot


def _moved(source: np.ndarray, channel_map) -> np.ndarray:
    """result[n, o] = source[n, map[o]], 0 where map[o] < 0; the bits of it"""
    result = np.zeros((source.shape[0], len(channel_map), source.shape[2]), source.dtype)
    for o, c in enumerate(channel_map):
        if c >= 0:
            result[:, o] = source[:, c]
    return result


def _misaligned(x: np.ndarray, offset: int) -> np.ndarray:
    """The same array, its first element `offset` elements behind a multiple of 16 bytes."""
    if not offset:
        return x
    whole = arrays.guarded(np.concatenate([np.full(offset, 0x7F, x.dtype), x.ravel()]))
    return whole[offset:].reshape(x.shape)


@dataclass
class Copy:
    gather: bool
    bits: int
    images: int
    pixels: int
    full: int
    index: tuple
    channels_last: bool
    offset: int = 0  # elements by which either side is misaligned
    note: str = ""

    def __str__(self):
        layout = "nhwc" if self.channels_last else "nchw"
        listed = f"{len(self.index)}of{self.full}"
        return f"{layout}-n{self.images}-{listed}-p{self.pixels}-o{self.offset}{self.note and '-' + self.note}"

    def run(self, lib):
        rng = np.random.default_rng(0)
        live = len(self.index)
        index = np.asarray(self.index, np.int32)
        channel_map = index if self.gather else _slots(index, self.full)
        source_channels = self.full if self.gather else live
        dtype = f"uint{self.bits}"
        source = rng.integers(1, 1 << self.bits, (self.images, source_channels, self.pixels), dtype)
        granule = np.zeros(1, np.int64)
        lib.call("pk_channel_granule", index, live, self.full, granule)
        expected = _layout(_moved(source, channel_map), self.channels_last)
        result = _misaligned(arrays.poison(expected.shape, dtype), self.offset)
        lib.call(
            "pk_gather_channels" if self.gather else "pk_scatter_channels",
            _misaligned(_layout(source, self.channels_last), self.offset),
            arrays.guarded(channel_map),
            result,
            self.images,
            self.pixels,
            self.full,
            live,
            self.bits // 8,
            self.channels_last,
            int(granule[0]),
        )
        np.testing.assert_array_equal(result, expected)


@dataclass
class Join:
    element: str
    images: int
    pixels: int
    out: int
    channels_last: bool
    offset: int = 0
    alpha: float = 1.0

    def __str__(self):
        layout = "nhwc" if self.channels_last else "nchw"
        return f"{layout}-n{self.images}-c{self.out}-p{self.pixels}-o{self.offset}-x{self.alpha}"

    def run(self, lib):
        rng = np.random.default_rng(0)
        slots, sources, terms = [], [], []
        for part in range(2):
            alive = rng.random(self.out) < 0.6
            if part == 1 and self.out > 2:
                alive[:2] = False  # some in neither, some in both
            slot = np.where(alive, np.cumsum(alive) - 1, -1 - part).astype(np.int32)
            source = arrays.integers(rng, (self.images, int(alive.sum()), self.pixels))
            slots.append(arrays.guarded(slot))
            terms.append(_moved(source, slot))
            sources.append(_misaligned(_layout(arrays.narrow(source, self.element), self.channels_last), self.offset))
        expected = _layout(arrays.narrow(terms[0] + self.alpha * terms[1], self.element), self.channels_last)
        result = _misaligned(arrays.poison(expected.shape, self.element), self.offset)
        a, b = (len(np.flatnonzero(s >= 0)) for s in slots)
        lib.call(
            "pk_join",
            sources[0],
            slots[0],
            sources[1],
            slots[1],
            result,
            self.images,
            self.pixels,
            a,
            b,
            self.out,
            ELEMENTS.index(self.element),
            self.channels_last,
            self.alpha,
        )
        np.testing.assert_array_equal(result, expected)


class Refused:
    """Sizes that the kernels cannot index return cudaErrorInvalidValue."""

    def __str__(self):
        return "refused"

    def run(self, lib):
        one = arrays.guarded(np.zeros(1, np.int32))
        for pixels, bytes_, channels_last, channels in (
            ((1 << 32) + 1, 2, False, 2),  # an image of more vectors than 32 bits count
            (1, 3, False, 1),
            (1, 4, True, 256 * 65536 + 1),
        ):
            status, _ = lib.status(
                "pk_gather_channels", one, one, one, 1, pixels, channels, channels, bytes_, channels_last, 1
            )
            assert status == 1


def _every_third(channels: int) -> tuple:
    return tuple(range(0, channels, 3))


def _copies(gather: bool, bits: int) -> list:
    cases: list = []

    def add(images, pixels, full, index, layouts=(False, True), offset=0, note=""):
        for channels_last in layouts:
            cases.append(Copy(gather, bits, images, pixels, full, tuple(index), channels_last, offset, note))

    for pixels in (1, 2, 3, 4, 8, 12, 49):  # planes of odd, 2-, 4-, 8- and 16-byte sizes
        add(2, pixels, 7, (0, 2, 5, 6))
    for offset in (1, 2, 4):
        add(1, 16, 16, _every_third(16), offset=offset)
    for index in ((), (3,), range(5)):
        add(2, 6, 5, index)
    add(2, 6, 1, (0,))
    add(0, 6, 5, (1, 2))
    add(2, 0, 5, (1, 2))
    add(1, 5, 12, (1, -1, 4, 7, -1, -1), note="ragged")
    add(2, 6, 4, (-1, 0, -1, 1, 3, -1, -1), note="wider")
    add(2, 8, 8, [-1] * 8 + [*range(8)], note="wider-granule8")
    plane = 3 * 128 // bits
    for n in (-1, 0, 1):  # vectors about a block's; then pixels
        width = 1 if gather else 2
        add(1, BLOCK + n, 2, (1,) if gather else (0,), (False,), offset=1)
        add(1, BLOCK + n, width, (0,), (True,))
    add(3, plane, 11, (0, 1, 2, 5, 8, 9, 10), note="vectors")
    for units in (255, 256, 257, 300):  # about a block of threads
        full, index = (2 * units, range(1, 2 * units, 2)) if gather else (units, _every_third(units))
        add(1, 3, full, index, (True,))
    # granules of 2, 4 and 8 channels, alone and with padding
    for granule in (2, 4, 8):
        listed = [g * granule + i for g in (0, 2, 3, 6) for i in range(granule)]
        add(2, 5, 8 * granule, listed, (True,), note=f"granule{granule}")
        add(2, 5, 8 * granule, [*listed, *[-1] * granule], (True,), note=f"granule{granule}-ragged")
        add(1, 5, 8 * granule, listed, (True,), offset=1, note=f"granule{granule}")
        add(1, 3, 8 * granule, [c + 1 for c in listed], (True,), note=f"not-granule{granule}")
    add(1, 2, 24, range(24), (True,), note="identity")
    if bits == 16:
        add(1, ROUNDS, 1024 if gather else 2048, range(0, 1024, 2) if gather else (0,), (True,), note="rounds")
    return cases


def _joins(element: str) -> list:
    sizes = [(2, p, 9, o) for p in (1, 2, 3, 4, 8, 49) for o in (0,)]
    sizes += [(1, 16, 8, 1), (1, 16, 8, 2), (1, 5, 1, 0), (0, 4, 3, 0), (2, 0, 3, 0), (2, 4, 0, 0)]
    sizes += [(1, 2, c, 0) for c in (255, 256, 257, 511, 512, 513, 514)]
    sizes += [(1, BLOCK + n, 1, 0) for n in (-1, 0, 1)]
    if element == "f32":
        sizes.append((1, ROUNDS, 256, 0))
    cases = [Join(element, *sizes, channels_last, o) for *sizes, o in sizes for channels_last in (False, True)]
    scaled = [(2, 8, 9, 0.5), (2, 49, 8, -1.0), (1, 5, 6, 0.0)]
    return cases + [Join(element, *sizes, last, 0, alpha) for *sizes, alpha in scaled for last in (False, True)]


CASES: dict[str, list] = {
    **{f"gather_channels_b{bits}_sm80": [*_copies(True, bits), Refused()] for bits in (16, 32, 64)},
    **{f"scatter_channels_b{bits}_sm80": _copies(False, bits) for bits in (16, 32, 64)},
    **{f"join_{element}_sm80": _joins(element) for element in ELEMENTS},
}
