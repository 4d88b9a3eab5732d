"""mask_grad, filter_norms and kernel_norms, with NaN in dead weights."""

import dataclasses

import numpy as np

from . import arrays

ELEMENTS = ["f32", "bf16", "f16"]
_POINTER = np.uintp
MASK = np.dtype(
    [("out_slot", _POINTER), ("pairs", _POINTER), ("filters", "i4"), ("channels", "i4"), ("taps", "i4"), ("last", "?")],
    align=True,
)
GRAD_LAYER = np.dtype(
    [("mask", MASK)]
    + [(n, _POINTER) for n in ("grad", "grad_scale", "weight", "accumulated", "abs_sum", "square_sum", "product_sum")],
    align=True,
)
NORM_LAYER = np.dtype([("mask", MASK)] + [(n, _POINTER) for n in ("weight", "abs_sum", "square_sum")], align=True)


class Shifted:
    """A guarded copy, `array`, whose first element lies `elements` behind a 16-byte boundary."""

    def __init__(self, values, element: str, elements: int):
        self._room = arrays.narrow(np.zeros(elements + np.size(values)), element)
        self._before = self._room[:elements]
        self.array = self._room[elements:].reshape(np.shape(values))
        self.array[...] = arrays.narrow(values, element)
        self.address = self.array.ctypes.data

    def check_surroundings(self, name: str) -> None:
        assert (self._before == 0).all(), f"{name}: writes before the first element"
        arrays.check_surroundings(name, self._room)


@dataclasses.dataclass(frozen=True)
class Layer:
    filters: int
    channels: int
    taps: int = 1
    dead_filters: float | None = None  # share, by out_slot; None: no list
    dead_kernels: float | None = None  # share, by pairs
    last: bool = False  # channels_last
    scaled: bool = False
    sums: str = "asp"  # of |g|, of squares, of products
    accumulates: bool = False
    shift: int = 0  # elements that grad (or a norm's weight) lies off a 16-byte boundary
    other_shift: int = 0  # likewise weight and accumulated

    def __str__(self):
        marks = [f"k{self.filters}c{self.channels}t{self.taps}"]
        marks += [f"dead{self.dead_filters}"] * (self.dead_filters is not None)
        marks += [f"pairs{self.dead_kernels}"] * (self.dead_kernels is not None)
        marks += ["last"] * self.last + ["scaled"] * self.scaled + ["accumulates"] * self.accumulates
        marks += [self.sums or "nosums"] * (self.sums != "asp")
        marks += [f"shift{self.shift},{self.other_shift}"] * bool(self.shift or self.other_shift)
        return "-".join(marks)


class Mask:
    """A layer's mask, as the kernel takes it and as bool [filters, channels, taps]."""

    def __init__(self, layer: Layer, rng: np.random.Generator):
        K, C = layer.filters, layer.channels
        filters = rng.random(K) >= (layer.dead_filters or 0.0)
        kernels = rng.random((K, C)) >= (layer.dead_kernels or 0.0)
        dead_slots = rng.choice([-1, -2], K)
        self.out_slot = arrays.guarded(np.where(filters, np.arange(K), dead_slots), np.int32)
        pair_words = -(-C // 32)
        bits = np.zeros((K, pair_words * 32), np.uint32)
        bits[:, :C] = kernels
        words = (bits.reshape(K, pair_words, 32) << np.arange(32, dtype=np.uint32)).sum(-1, dtype=np.uint32)
        self.pairs = arrays.guarded(words)
        self.live = np.broadcast_to((filters[:, None] & kernels)[..., None], (K, C, layer.taps))
        out_slot = self.out_slot.ctypes.data if layer.dead_filters is not None else 0
        pairs = self.pairs.ctypes.data if layer.dead_kernels is not None else 0
        self.fields = (out_slot, pairs, K, C, layer.taps, layer.last)


def stored(layer: Layer, values: np.ndarray) -> np.ndarray:
    """[K, channels, taps] -> rows as they lie in memory"""
    return np.ascontiguousarray(values.transpose(0, 2, 1) if layer.last else values)


def same(name: str, got: np.ndarray, expected: np.ndarray, tolerance: float = 0.0) -> None:
    expected = np.asarray(expected, np.float32).reshape(got.shape)
    if tolerance:
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance, err_msg=name)
    else:
        np.testing.assert_array_equal(got, expected, err_msg=name)


class MaskGradProblem:
    def __init__(self, layer: Layer, element: str, add: bool, exact: bool, rng: np.random.Generator):
        self.layer, self.element, self.add, self.tolerance = layer, element, add, 0.0 if exact else 1e-5
        shape = (layer.filters, layer.channels, layer.taps)
        self.mask = Mask(layer, rng)
        scale = rng.choice([0.0, 1.0, 0.5, 2.0], layer.filters).astype(np.float32)
        kept = scale if layer.scaled else np.ones(layer.filters, np.float32)
        live = self.mask.live & (kept != 0)[:, None, None]
        make = (lambda: arrays.integers(rng, shape)) if exact else (lambda: rng.standard_normal(shape))
        grad, weight, before = (np.where(live, make(), np.nan).astype(np.float32) for _ in range(3))
        start = arrays.integers(rng, layer.filters)

        self.scale = arrays.guarded(scale)
        self.grad = Shifted(stored(layer, grad), element, layer.shift)
        self.weight = Shifted(stored(layer, weight), element, layer.other_shift)
        self.accumulated = Shifted(stored(layer, before), "f32", layer.other_shift)
        self.sums = [arrays.guarded(start) if add else arrays.poison(layer.filters) for _ in range(3)]

        wide = arrays.widen(arrays.narrow(grad, element), element)
        scaled = wide if not layer.scaled else wide * kept[:, None, None]
        g = np.where(live, arrays.widen(arrays.narrow(scaled, element), element), 0).astype(np.float64)
        w = np.where(live, arrays.widen(arrays.narrow(weight, element), element), 0).astype(np.float64)
        self.expected = g.astype(np.float32)
        self.expected_accumulated = np.where(live, before.astype(np.float64) + g, np.nan)
        self.expected_sums = [x.sum((1, 2)) + (start if add else 0) for x in (np.abs(g), g * g, w * g)]

    def descriptor(self):
        layer = self.layer
        asked = [s.ctypes.data if mark in layer.sums else 0 for mark, s in zip("asp", self.sums, strict=True)]
        return (
            self.mask.fields,
            self.grad.address,
            self.scale.ctypes.data if layer.scaled else 0,
            self.weight.address if "p" in layer.sums else 0,
            self.accumulated.address if layer.accumulates else 0,
            *asked,
        )

    def check(self):
        layer = self.layer
        same("grad", arrays.widen(self.grad.array, self.element), stored(layer, self.expected))
        if layer.accumulates:
            same("accumulated", self.accumulated.array, stored(layer, self.expected_accumulated), self.tolerance / 10)
        for mark, got, expected in zip("asp", self.sums, self.expected_sums, strict=True):
            if mark in layer.sums:
                same(f"sum {mark}", got, expected, self.tolerance * 100)
                arrays.check_surroundings(f"sum {mark}", got)
        self.grad.check_surroundings("grad")
        self.accumulated.check_surroundings("accumulated")


@dataclasses.dataclass(frozen=True)
class MaskGradCase:
    element: str
    layers: tuple[Layer, ...]
    name: str = ""
    add: bool = False
    exact: bool = True

    def __str__(self):
        return self.name or str(self.layers[0]) + "-add" * self.add

    def run(self, lib):
        rng = np.random.default_rng(7)
        problems = [MaskGradProblem(layer, self.element, self.add, self.exact, rng) for layer in self.layers]
        layers = arrays.guarded(np.array([p.descriptor() for p in problems], GRAD_LAYER))
        lib.call("pk_mask_grad", ELEMENTS.index(self.element), layers, len(problems), self.add)
        for problem in problems:
            problem.check()


@dataclasses.dataclass(frozen=True)
class UntouchedCase:
    """Without scale, sums and accumulation live weights are neither read nor written, whatever they hold."""

    element: str

    def __str__(self):
        return "untouched"

    def run(self, lib):
        layer = Layer(5, 6, 3, dead_filters=0.4, sums="")
        rng = np.random.default_rng(1)
        mask = Mask(layer, rng)
        grad = arrays.poison((5, 6, 3), self.element)
        before = grad.copy()
        layers = arrays.guarded(np.array([(mask.fields, grad.ctypes.data, 0, 0, 0, 0, 0, 0)], GRAD_LAYER))
        lib.call("pk_mask_grad", ELEMENTS.index(self.element), layers, 1, False)
        np.testing.assert_array_equal(grad[mask.live].view(np.uint8), before[mask.live].view(np.uint8))
        assert (grad[~mask.live] == 0).all()


@dataclasses.dataclass(frozen=True)
class NormCase:
    operation: str  # filter_norms or kernel_norms
    element: str
    layers: tuple[Layer, ...]
    name: str = ""

    def __str__(self):
        return self.name or str(self.layers[0])

    def run(self, lib):
        rng = np.random.default_rng(3)
        per_kernel = self.operation == "kernel_norms"
        kept, rows, results = [], [], []
        for layer in self.layers:
            mask = Mask(layer, rng)
            values = arrays.integers(rng, mask.live.shape)
            weight = Shifted(stored(layer, np.where(mask.live, values, np.nan)), self.element, layer.shift)
            live = np.where(mask.live, values, 0)
            norms = [x.sum(2) if per_kernel else x.sum((1, 2)) for x in (np.abs(live), live * live)]
            got = [arrays.poison(n.shape) for n in norms]
            asked = [g.ctypes.data if mark in layer.sums else 0 for mark, g in zip("as", got, strict=True)]
            rows.append((mask.fields, weight.address, *asked))
            kept.append((mask, weight))
            results += [(mark, *both) for mark, *both in zip("as", got, norms, strict=True) if mark in layer.sums]
        descriptors = arrays.guarded(np.array(rows, NORM_LAYER))
        lib.call(f"pk_{self.operation}", ELEMENTS.index(self.element), descriptors, len(rows))
        for mark, got, expected in results:
            same(f"norm {mark}", got, expected)
            arrays.check_surroundings(f"norm {mark}", got)


@dataclasses.dataclass(frozen=True)
class TooLargeCase:
    operation: str
    element: str
    layer: Layer

    def __str__(self):
        return f"too-large-{self.layer}"

    def run(self, lib):
        fields = (0, 0, self.layer.filters, self.layer.channels, self.layer.taps, False)
        dtype = GRAD_LAYER if self.operation == "mask_grad" else NORM_LAYER
        layers = arrays.guarded(np.array([(fields, *[0] * (len(dtype.names) - 1))], dtype))
        arguments = (ELEMENTS.index(self.element), layers, 1) + (False,) * (self.operation == "mask_grad")
        assert lib.status(f"pk_{self.operation}", *arguments)[0] == 1  # cudaErrorInvalidValue


def row_lengths(element: str) -> list[int]:
    """Row lengths around a span, around the threads that share a row (1, 2, 32, the block) and their second round."""
    span = 4 if element == "f32" else 8
    spans = [1, 2, 3, 32, 8 * 32, 8 * 32 + 1, 2 * 256]
    return sorted({max(n * span + d, 1) for n in spans for d in (-1, 0, 1)})


def mask_grad_cases(element: str) -> list:
    def case(*layers, **more):
        return MaskGradCase(element, layers, **more)

    everything = {"dead_filters": 0.3, "dead_kernels": 0.3, "scaled": True, "accumulates": True}
    cases = [case(Layer(3, n, **everything)) for n in row_lengths(element)]
    cases += [case(Layer(n, 1, dead_filters=0.5, accumulates=True)) for n in (1, 255, 256, 257)]
    for channels in (1, 31, 32, 33):
        for taps, last in ((1, False), (9, False), (9, True)):
            cases.append(case(Layer(4, channels, taps, last=last, **everything)))
    plain = Layer(4, 9, 9)
    some = dataclasses.replace
    cases += [case(some(plain, dead_filters=share)) for share in (None, 0.0, 1.0)]
    cases += [case(some(plain, dead_kernels=share)) for share in (0.0, 0.5, 1.0)]
    cases += [case(some(plain, dead_kernels=0.5, sums=sums)) for sums in ("", "a", "s", "p", "ap")]
    cases += [case(some(plain, scaled=True, sums="")), case(some(plain, accumulates=True, sums=""))]
    cases += [case(some(plain, shift=s, other_shift=o, **everything)) for s, o in ((1, 1), (3, 3), (0, 1), (2, 0))]
    cases += [case(some(plain, other_shift=1)), case(some(plain, other_shift=1, sums="", accumulates=True))]
    cases += [case(some(plain, **everything), add=True)]
    random = Layer(3, 40, 9, **everything)
    cases += [case(random, name="random", exact=False)]
    many = [Layer(n % 4, n % 5, 1 + n % 3, dead_filters=0.3, accumulates=n % 2 == 0) for n in range(100)]
    cases += [case(*many, name="many-layers"), case(name="no-layers"), UntouchedCase(element)]
    cases += [TooLargeCase("mask_grad", element, Layer(1, 1 << 20, 1 << 11))]
    return cases


def norm_cases(operation: str, element: str) -> list:
    def case(*layers, **more):
        return NormCase(operation, element, layers, **more)

    masked = {"dead_filters": 0.3, "dead_kernels": 0.3}
    lengths = row_lengths(element) if operation == "filter_norms" else (1, 84, 85, 86)
    cases = [case(Layer(3, n, **masked)) for n in lengths]
    cases += [case(Layer(3, 33, 9, last=last, **more)) for last in (False, True) for more in (masked, {})]
    cases += [case(Layer(3, 5, 3, shift=1, **masked)), case(Layer(3, 5, 3, dead_filters=1.0))]
    cases += [case(Layer(3, 5, 3, sums=sums, **masked)) for sums in ("a", "s")]
    many = [Layer(n % 4, n % 5, 1 + n % 3, dead_filters=0.3) for n in range(120)]
    cases += [case(*many, name="many-layers"), case(name="no-layers")]
    cases += [TooLargeCase(operation, element, Layer(1 << 12, 1 << 20, 1))]
    return cases


CASES = {f"mask_grad_{element}_sm80": mask_grad_cases(element) for element in ELEMENTS}
for _operation in ("filter_norms", "kernel_norms"):
    CASES |= {f"{_operation}_{element}_sm80": norm_cases(_operation, element) for element in ELEMENTS}
