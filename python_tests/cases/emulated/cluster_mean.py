"""cluster_mean: to the bit where means are exact, else against means in double."""

import dataclasses

import numpy as np

from . import arrays
from .mask_grad import ELEMENTS, Shifted, same

_POINTERS = ("grad", "weight", "first", "members")
LAYER = np.dtype([(name, np.uintp) for name in _POINTERS] + [("clusters", "i8"), ("elements", "i8")], align=True)


@dataclasses.dataclass(frozen=True)
class Layer:
    sizes: tuple[int, ...]  # of clusters
    elements: int
    alone: int = 0  # rows of no cluster
    pulls: bool = False
    shift: int = 0  # elements that the gradient lies off a 16-byte boundary
    weight_shift: int = 0

    def __str__(self):
        sizes = "+".join(map(str, self.sizes)) if len(self.sizes) < 9 else f"{len(self.sizes)}clusters"
        marks = [f"{sizes or 'none'}x{self.elements}"] + [f"alone{self.alone}"] * bool(self.alone)
        marks += ["pulls"] * self.pulls
        return "-".join(marks + [f"shift{self.shift},{self.weight_shift}"] * bool(self.shift or self.weight_shift))


class Problem:
    """Rows of no cluster are NaN."""

    def __init__(self, layer: Layer, element: str, strength: float, exact: bool, rng: np.random.Generator):
        self.layer, self.element, self.tolerance = layer, element, 0.0 if exact else 1e-5
        rows = sum(layer.sizes) + layer.alone
        order = rng.permutation(rows)
        self.first = arrays.guarded(np.cumsum([0, *layer.sizes]), np.int32)
        self.members = arrays.guarded(order[: sum(layer.sizes)], np.int32)
        shape = (rows, layer.elements)
        grad, weight = (arrays.integers(rng, shape) if exact else rng.standard_normal(shape) for _ in "gw")
        for values in (grad, weight):
            values[order[sum(layer.sizes) :]] = np.nan
        self.grad = Shifted(grad, element, layer.shift)
        self.weight = Shifted(weight, element, layer.weight_shift)

        wide, self.expected = arrays.widen(self.weight.array, element), arrays.widen(self.grad.array, element)
        for begin, end in zip(self.first[:-1], self.first[1:], strict=True):
            members = self.members[begin:end]
            new = self._mean(self.expected[members])
            if layer.pulls:
                new = new + np.float32(strength) * (wide[members] - self._mean(wide[members]))
            self.expected[members] = arrays.widen(arrays.narrow(new, element), element)

    @staticmethod
    def _mean(rows):
        return rows.sum(0, dtype=np.float32) / np.float32(len(rows))

    def descriptor(self):
        weight = self.weight.address if self.layer.pulls else 0
        lists = self.first.ctypes.data, self.members.ctypes.data
        return (self.grad.address, weight, *lists, len(self.layer.sizes), self.layer.elements)

    def check(self):
        tolerance = self.tolerance and (self.tolerance if self.element == "f32" else 1e-2)
        same("grad", arrays.widen(self.grad.array, self.element), self.expected, tolerance)
        self.grad.check_surroundings("grad")


@dataclasses.dataclass(frozen=True)
class Case:
    element: str
    layers: tuple[Layer, ...]
    name: str = ""
    strength: float = 0.5
    exact: bool = True

    def __str__(self):
        return self.name or str(self.layers[0]) + f"-strength{self.strength}" * (self.strength != 0.5)

    def run(self, lib):
        rng = np.random.default_rng(13)
        problems = [Problem(layer, self.element, self.strength, self.exact, rng) for layer in self.layers]
        layers = arrays.guarded(np.array([p.descriptor() for p in problems], LAYER))
        lib.call("pk_cluster_mean", ELEMENTS.index(self.element), layers, len(problems), self.strength)
        for problem in problems:
            problem.check()


@dataclasses.dataclass(frozen=True)
class TooLargeCase:
    element: str

    def __str__(self):
        return "too-large"

    def run(self, lib):
        layers = arrays.guarded(np.array([(0, 0, 0, 0, 1 << 16, 1 << 15)], LAYER))
        assert lib.status("pk_cluster_mean", ELEMENTS.index(self.element), layers, 1, 0.0)[0] == 1


def cases(element: str) -> list:
    def case(*layers, **more):
        return Case(element, layers, **more)

    span = 4 if element == "f32" else 8
    # Clusters of 2, 4 and 8: halves, quarters and eighths of small integers are exact in every element.
    found = [case(Layer((4, 2), n, alone=1, pulls=p)) for n in (1, span - 1, span, span + 1, 9 * span) for p in (0, 1)]
    found += [
        case(Layer((2,), n * width, pulls=True)) for width in (1, span) for n in (255, 256, 257) if width > 1 or n % 2
    ]
    found += [case(Layer((2,) * n, width)) for width in (1, span) for n in (255, 256, 257)]  # many a block
    found += [case(Layer((n,), 2 * span + d, pulls=True)) for n in (1, 2, 4, 8) for d in (0, 1)]
    found += [case(Layer((), 5, alone=3)), case(Layer((2, 2), 0)), case(Layer((1, 1), 3, pulls=True))]
    shifts = ((1, 0), (0, 1), (1, 1))
    found += [case(Layer((4, 2), 2 * span, alone=1, pulls=True, shift=s, weight_shift=w)) for s, w in shifts]
    found += [case(Layer((4, 2), 2 * span, shift=1)), case(Layer((4, 2), 2 * span, weight_shift=1))]
    found += [case(Layer((4, 2), 9, pulls=True), strength=s) for s in (0.0, -2.0)]
    found += [case(Layer((3, 5, 7), n, alone=2, pulls=True), name=f"random{n}", exact=False) for n in (36, 37)]
    many = [Layer((2,) * (n % 4), 1 + n % 9, alone=n % 2, pulls=n % 3 == 0) for n in range(200)]
    return found + [case(*many, name="many-layers"), case(name="no-layers"), TooLargeCase(element)]


CASES = {f"cluster_mean_{element}_sm80": cases(element) for element in ELEMENTS}
