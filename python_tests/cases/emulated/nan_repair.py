"""find_leaks: every kind of sentinel channel, of number and of place. repair: its results against arrays.py."""

from dataclasses import dataclass

import numpy as np

from . import arrays

ELEMENTS = ("f32", "bf16", "f16")  # as enum Element has them
NAN, INF = float("nan"), float("inf")
ROUND = 256 * 256 * 4  # items that all threads of a launch read in one round


@dataclass
class Leak:
    """One call of find_leaks. sentinels: channel -> whether it must be +0; put: (image, channel, pixel, value) in x;
    found: whether that is a leak."""

    element: str
    sentinels: dict
    put: tuple | None
    found: bool
    images: int = 2
    channels: int = 5
    pixels: int = 7
    channels_last: bool = False

    def __str__(self):
        layout = "nhwc" if self.channels_last else "nchw"
        return f"{layout}-n{self.images}c{self.channels}p{self.pixels}-{self.sentinels}-{self.put}".replace(" ", "")

    def run(self, lib):
        x = np.ones((self.images, self.channels, self.pixels), np.float32)
        for channel, zero in self.sentinels.items():
            x[:, channel] = 0 if zero else 3
        if self.put:
            image, channel, pixel, value = self.put
            x[image, channel, pixel] = value
        x = np.ascontiguousarray(x.transpose(0, 2, 1)) if self.channels_last else x
        words = np.array([2 * c + zero for c, zero in self.sentinels.items()], np.int32)
        found, blocks = np.full(4096, 0x7F7F7F7F, np.int32), np.zeros(1, np.int32)
        sizes = (self.images, self.pixels, self.channels)
        flags = (ELEMENTS.index(self.element), self.channels_last)
        stored = arrays.narrow(x, self.element)
        lib.call("pk_find_leaks", stored, arrays.guarded(words), len(words), *sizes, *flags, found, blocks)
        n = int(blocks[0])
        assert set(found[:n]) <= {0, 1} and (found[n:] == 0x7F7F7F7F).all()
        assert bool(found[:n].any()) == self.found


def _leaks(element):
    tail = {"images": 3, "channels": 4, "pixels": 85}  # 255, 256 and 257 items of one sentinel; several blocks
    for last in (False, True):
        layout = {"channels_last": last}
        for zero in (False, True):
            one = {2: zero}
            yield Leak(element, one, None, False, **layout)
            for value in (NAN, INF, -INF):
                yield Leak(element, one, (1, 2, 6, value), True, **layout)
                yield Leak(element, one, (1, 3, 6, value), False, **layout)  # in a channel that is no sentinel
            yield Leak(element, one, (0, 2, 0, -0.0), zero, **layout)
            yield Leak(element, one, (0, 2, 0, 1e-4), zero, **layout)
            yield Leak(element, one, (0, 2, 3, 3e4), zero, **layout)  # large, yet finite in every type
            for pixels in (85, 86):
                place = (2, 2, pixels - 1, NAN)
                yield Leak(element, one, place, True, **layout, **tail | {"pixels": pixels})
            yield Leak(element, one, None, False, **layout, **tail)
        both = {0: True, 3: False}
        yield Leak(element, both, (1, 0, 1, 5), True, **layout)
        yield Leak(element, both, (1, 3, 1, 5), False, **layout)
        yield Leak(element, both, (1, 3, 6, INF), True, **layout)
        yield Leak(element, both, (0, 1, 0, NAN), False, **layout)
        yield Leak(element, {}, (0, 0, 0, NAN), False, **layout)
        yield Leak(element, {0: True}, None, False, images=0, **layout)
        for pixels in (ROUND - 1, ROUND, ROUND + 1):  # the last item of a round, and the first of the next
            if element != "bf16":
                large = {"images": 1, "channels": 1, "pixels": pixels} | layout
                yield Leak(element, {0: True}, (0, 0, pixels - 1, 1), True, **large)


@dataclass
class Repaired:
    element: str
    forward: bool
    channels_last: bool
    n: int = 2
    c: int = 4
    k: int = 6
    size: tuple = (5, 6)
    taps: tuple = (3, 3)
    stride: tuple = (1, 1)
    padding: tuple = (1, 1)
    dilation: tuple = (1, 1)
    groups: int = 1
    found: tuple | None = (0, 0, 1)

    def __str__(self):
        text = [str(v).replace(" ", "") for v in (self.size, self.taps, self.stride, self.padding, self.dilation)]
        layout = "nhwc" if self.channels_last else "nchw"
        return f"{layout}-n{self.n}c{self.c}k{self.k}g{self.groups}-{'-'.join(text)}-found{self.found}".replace(" ", "")

    def run(self, lib):
        rng = np.random.default_rng(1)
        per_group = self.c // self.groups
        filters, inputs = rng.random(self.k) < 0.7, rng.random(self.c) < 0.7
        kernels = rng.random((self.k, per_group)) < 0.7
        kernels[filters.argmax()] = False  # a live filter without live kernels: its bias
        by_kernel = inputs.reshape(self.groups, -1).repeat(self.k // self.groups, 0)
        live = filters[:, None] & kernels & by_kernel
        x = arrays.integers(rng, (self.n, self.c, *self.size))
        w, bias = arrays.integers(rng, (self.k, per_group, *self.taps)), arrays.integers(rng, self.k)
        geometry = (self.stride, self.padding, self.dilation)
        masked = np.where(live[:, :, None, None], w, 0)
        P, Q = arrays.out_size(x.shape, w.shape, *geometry)
        g = arrays.integers(rng, (self.n, self.k, P, Q))
        want = arrays.conv2d(x, masked, *geometry) + np.where(filters, bias, 0)[:, None, None]
        operand, read = x, inputs
        slot = np.where(filters, np.where(live.any(1), 0, -2), -1)
        if not self.forward:
            want = arrays.conv2d_grad_input(g, masked, x.shape, *geometry)
            operand, read = g, live.any(1)
            slot = np.where(live.reshape(self.groups, -1, per_group).any(1).ravel(), 0, -1)
        operand = np.where(read[:, None, None], operand, NAN)
        w, bias = np.where(live[:, :, None, None], w, NAN), np.where(filters, bias, NAN)

        def store(t):
            return arrays.narrow(arrays.nhwc(t) if self.channels_last else t, self.element)

        bits = np.zeros((self.k, -(-per_group // 32) * 32), bool)
        bits[:, :per_group] = live
        pairs = np.packbits(bits, axis=1, bitorder="little").view("<u4")
        taps = self.taps[0] * self.taps[1]
        strides = (taps * per_group, 1, per_group) if self.channels_last else (taps * per_group, taps, 1)
        sizes = (self.n, self.c, *self.size, self.k, *self.taps, P, Q, self.groups, *sum(geometry, ()))
        result = store(np.full(want.shape, NAN, np.float32))
        count = 0 if self.found is None else len(self.found)
        lib.call(
            "pk_repair",
            np.array(sizes, np.int64),
            np.array(strides, np.int64),
            ELEMENTS.index(self.element),
            self.channels_last,
            self.forward,
            store(operand),
            store(w),
            arrays.narrow(bias, self.element) if self.forward else None,
            result,
            arrays.guarded(slot, np.int32),
            arrays.guarded(np.ascontiguousarray(pairs)),
            None if self.found is None else arrays.guarded(self.found, np.int32),
            count,
        )
        if self.found is not None and not any(self.found):
            want = np.full(want.shape, NAN, np.float32)
        np.testing.assert_array_equal(arrays.widen(result, self.element), arrays.widen(store(want), self.element))


def _repairs(element, forward):
    for last in (False, True):
        for found in (None, (0, 0, 1), (0,) * 300, (0,) * 299 + (1,), ()):
            yield Repaired(element, forward, last, found=found)
        more = {"stride": (2, 3), "padding": (2, 0), "dilation": (1, 2), "size": (9, 8)}
        yield Repaired(element, forward, last, **more)
        yield Repaired(element, forward, last, c=6, k=9, groups=3, **more)
        yield Repaired(element, forward, last, c=6, k=6, groups=6)
        yield Repaired(
            element, forward, last, c=67, k=3, taps=(1, 1), padding=(0, 0), size=(2, 3)
        )  # three words of bits
        yield Repaired(element, forward, last, c=1, k=1, n=1)
        yield Repaired(element, forward, last, n=0)
    yield Repaired(element, forward, True, n=1, c=2, k=2, taps=(1, 1), padding=(0, 0), size=(370, 370))  # > all threads


CASES = {
    "find_leaks_b32": list(_leaks("f32")),
    "find_leaks_b16": [*_leaks("bf16"), *_leaks("f16")],
    **{f"repair_fwd_{e}": list(_repairs(e, True)) for e in ELEMENTS},
    **{f"repair_grad_input_{e}": list(_repairs(e, False)) for e in ELEMENTS},
}
CASES = {f"{name}_sm80": cases for name, cases in CASES.items()}
