"""repair: every kind of sentinel channel, of number and of place; what it computes where one has leaked, against
arrays.py, and that it writes nothing else."""

from dataclasses import dataclass

import numpy as np

from . import arrays

ELEMENTS = ("f32", "bf16", "f16")  # as enum Element has them
NAN, INF = float("nan"), float("inf")
ROUND = 256 * 256 * 4  # items that all threads of a launch read in one round


def _repair(
    lib, forward, element, channels_last, sizes, strides, operand, weight, bias, result, slot, pairs, sentinels
):
    words = np.array([2 * c + zero for c, zero in sentinels.items()], np.int32)
    lib.call(
        "pk_repair",
        np.array(sizes, np.int64),
        np.array(strides, np.int64),
        ELEMENTS.index(element),
        channels_last,
        forward,
        operand,
        weight,
        bias,
        result,
        arrays.guarded(slot, np.int32),
        arrays.guarded(pairs),
        arrays.guarded(words),
        len(words),
    )


@dataclass
class Leak:
    """A depthwise 1 x 1 convolution of 3 by 1. sentinels: channel -> whether it is dead; put: (image, channel, pixel,
    value) in its result; found: whether that is a leak, and so put right."""

    element: str
    forward: bool
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
        def store(t):
            return arrays.narrow(np.ascontiguousarray(t.transpose(0, 2, 1)) if self.channels_last else t, self.element)

        right = np.ones((self.images, self.channels, self.pixels), np.float32)
        for channel, zero in self.sentinels.items():
            right[:, channel] = 0 if zero else 3
        x = right.copy()
        if self.put:
            image, channel, pixel, value = self.put
            x[image, channel, pixel] = value
        live = np.ones(self.channels, bool)
        live[[c for c, zero in self.sentinels.items() if zero]] = False
        operand = np.where(live[:, None], np.float32(3), np.float32(NAN)) * np.ones_like(right)
        weight = np.where(live, np.float32(1), np.float32(NAN))
        result = store(x)
        sizes = (self.images, self.channels, 1, self.pixels, self.channels, 1, 1, 1, self.pixels, self.channels)
        _repair(
            lib,
            self.forward,
            self.element,
            self.channels_last,
            (*sizes, 1, 1, 0, 0, 1, 1),
            (1, 1, 1),
            store(operand),
            arrays.narrow(weight, self.element),
            None,
            result,
            np.where(live, 0, -1),
            live.astype(np.uint32),
            self.sentinels,
        )
        np.testing.assert_array_equal(result, store(right if self.found else x))


def _leaks(element, forward):
    tail = {"images": 3, "channels": 4, "pixels": 85}  # 255, 256 and 257 items of one sentinel; several blocks
    for last in (False, True):
        layout = {"channels_last": last}
        for zero in (False, True):
            one = {2: zero}
            yield Leak(element, forward, one, None, False, **layout)
            for value in (NAN, INF, -INF):
                yield Leak(element, forward, one, (1, 2, 6, value), True, **layout)
                yield Leak(element, forward, one, (1, 3, 6, value), False, **layout)  # in a channel that is no sentinel
            yield Leak(element, forward, one, (0, 2, 0, -0.0), zero, **layout)
            yield Leak(element, forward, one, (0, 2, 0, 1e-4), zero, **layout)
            yield Leak(element, forward, one, (0, 2, 3, 3e4), zero, **layout)  # large, yet finite in every type
            for pixels in (85, 86):
                place = (2, 2, pixels - 1, NAN)
                yield Leak(element, forward, one, place, True, **layout, **tail | {"pixels": pixels})
            yield Leak(element, forward, one, None, False, **layout, **tail)
        both = {0: True, 3: False}
        yield Leak(element, forward, both, (1, 0, 1, 5), True, **layout)
        yield Leak(element, forward, both, (1, 3, 1, 5), False, **layout)
        yield Leak(element, forward, both, (1, 3, 6, INF), True, **layout)
        yield Leak(element, forward, both, (0, 1, 0, NAN), False, **layout)
        yield Leak(element, forward, {}, (0, 0, 0, NAN), False, **layout)
        yield Leak(element, forward, {0: True}, None, False, images=0, **layout)
        for pixels in (ROUND - 1, ROUND, ROUND + 1):  # the last item of a round, and the first of the next
            if element != "bf16":
                large = {"images": 1, "channels": 1, "pixels": pixels} | layout
                yield Leak(element, forward, {0: True}, (0, 0, pixels - 1, 1), True, **large)


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
    leaks: float = 0.3  # share of the pixels

    def __str__(self):
        text = [str(v).replace(" ", "") for v in (self.size, self.taps, self.stride, self.padding, self.dilation)]
        layout = "nhwc" if self.channels_last else "nchw"
        return f"{layout}-n{self.n}c{self.c}k{self.k}g{self.groups}-{'-'.join(text)}-leaks{self.leaks}".replace(" ", "")

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
        sentinels = {}
        for group in range(self.groups):
            dead = slot.reshape(self.groups, -1)[group] == -1
            sentinels[group * dead.size + int(dead.argmax())] = bool(dead.any())
        other = np.full(want.shape, 77, np.float32)  # what is not to be computed again
        leaks = rng.random((self.n, self.groups, *want.shape[2:])) < self.leaks
        for group, (channel, zero) in enumerate(sentinels.items()):
            other[:, channel] = np.where(leaks[:, group], NAN, 0 if zero else 1)
        result = store(other)
        everywhere = np.repeat(leaks, want.shape[1] // self.groups, 1)
        packed = np.ascontiguousarray(pairs)
        parts = (store(operand), store(w), arrays.narrow(bias, self.element) if self.forward else None, result)
        _repair(lib, self.forward, self.element, self.channels_last, sizes, strides, *parts, slot, packed, sentinels)
        wanted = store(np.where(everywhere, want, other).astype(np.float32))
        np.testing.assert_array_equal(arrays.widen(result, self.element), arrays.widen(wanted, self.element))


def _repairs(element, forward):
    for last in (False, True):
        for leaks in (0.0, 0.02, 0.3, 1.0):
            yield Repaired(element, forward, last, leaks=leaks)
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


def _cases(element, forward):
    return [*_leaks(element, forward), *_repairs(element, forward)]


CASES = {
    **{f"repair_fwd_{e}_sm80": _cases(e, True) for e in ELEMENTS},
    **{f"repair_grad_input_{e}_sm80": _cases(e, False) for e in ELEMENTS},
}
