"""channel_stats against means in double; NaN in one channel."""

import dataclasses

import numpy as np

from . import arrays
from .mask_grad import ELEMENTS, Shifted


@dataclasses.dataclass(frozen=True)
class Case:
    element: str
    N: int
    C: int
    pixels: int
    last: bool  # channels_last
    relu: bool = False
    shift: int = 0  # elements that x lies off a 16-byte boundary
    exact: bool = True

    def __str__(self):
        marks = [f"n{self.N}c{self.C}p{self.pixels}", "nhwc" if self.last else "nchw"]
        marks += ["relu"] * self.relu + [f"shift{self.shift}"] * bool(self.shift)
        return "-".join(marks + ["random"] * (not self.exact))

    def run(self, lib):
        rng = np.random.default_rng(5)
        shape = (self.N, self.C, self.pixels)
        values = arrays.integers(rng, shape) if self.exact else rng.standard_normal(shape)
        x = Shifted(values.transpose(0, 2, 1) if self.last else values, self.element, self.shift)
        stored = arrays.widen(x.array, self.element)
        wide = (stored.transpose(0, 2, 1) if self.last else stored).astype(np.float64)

        floats, mean = arrays.guarded([0], np.int64), arrays.poison(self.C)
        problem = (ELEMENTS.index(self.element), self.N, self.C, self.pixels, self.last)
        lib.call("pk_channel_stats_workspace", *problem, floats)
        workspace = arrays.poison(int(floats[0]))
        lib.call("pk_channel_stats", *problem, self.relu, x.array, mean, workspace)

        sums = (np.maximum(wide, 0) if self.relu else wide).sum((0, 2)).astype(np.float32)
        expected = sums / np.float32(max(self.N * self.pixels, 1))
        if self.exact:
            np.testing.assert_array_equal(mean, expected)
        else:
            np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-6)


@dataclasses.dataclass(frozen=True)
class NanCase:
    """A NaN shows in its channel's mean, relu or not, and in no other's."""

    element: str
    last: bool
    relu: bool

    def __str__(self):
        return "nan-" + ("nhwc" if self.last else "nchw") + "-relu" * self.relu

    def run(self, lib):
        x = np.ones((2, 18, 8) if self.last else (2, 8, 18), np.float32)
        x[(1, 17, 5) if self.last else (1, 5, 17)] = np.nan
        floats, mean = arrays.guarded([0], np.int64), arrays.poison(8)
        problem = (ELEMENTS.index(self.element), 2, 8, 18, self.last)
        lib.call("pk_channel_stats_workspace", *problem, floats)
        workspace = arrays.poison(int(floats[0]))
        lib.call("pk_channel_stats", *problem, self.relu, arrays.narrow(x, self.element), mean, workspace)
        np.testing.assert_array_equal(np.isnan(mean), np.arange(8) == 5)


def cases(element: str) -> list:
    span = 4 if element == "f32" else 8

    def nhwc(N, C, pixels, **more):
        return Case(element, N, C, pixels, True, **more)

    def nchw(N, C, pixels, **more):
        return Case(element, N, C, pixels, False, **more)

    found = [nhwc(2, C, 5) for C in (1, 2, span - 1, span, span + 1, 3 * span, 31, 32, 33)]
    found += [nhwc(1, C, 9) for C in (32 * span, 33 * span)]  # one and two blocks side by side
    found += [nhwc(1, 3, pixels) for pixels in (1, 63, 64, 65)]  # parts
    found += [nhwc(1, span, 64 * parts) for parts in (15, 16, 17)]
    found += [nhwc(2, span, 7, shift=1), nhwc(0, 3, 4), nhwc(2, 0, 4), nhwc(3, 9, 50, exact=False)]
    found += [nchw(3, 2, pixels) for pixels in (1, span - 1, span, span + 1, 31 * span, 32 * span, 33 * span, 49)]
    found += [nchw(1, C, 10) for C in (7, 8, 9, 31, 32, 33)]  # warps of a block, channels of a finishing block
    found += [nchw(N, 2, 3) for N in (31, 32, 33, 32 * 17)]  # parts of up to 32 images at once
    found += [nchw(N, 1, 16 * span) for N in (1023, 1024, 2050)]  # 512 parts of two images at once; more than once
    found += [nchw(1, 2, pixels) for pixels in (4095, 4096, 4097)]  # pieces
    found += [nchw(2, 3, 21, shift=1), nchw(0, 3, 4), nchw(2, 3, 0), nchw(3, 9, 50, exact=False)]
    both = (nhwc(2, 9, 12), nchw(2, 9, 12), nhwc(0, 9, 12))
    found += [dataclasses.replace(c, relu=True) for c in both]
    return found + [NanCase(element, last, relu) for last in (True, False) for relu in (False, True)]


CASES = {f"channel_stats_{element}_sm80": cases(element) for element in ELEMENTS}
