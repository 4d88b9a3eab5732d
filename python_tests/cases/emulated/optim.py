"""optim_sgd, optim_adamw: to the bit, against the same operations in numpy."""

import dataclasses

import numpy as np

from . import arrays
from .mask_grad import ELEMENTS, MASK, Mask, Shifted, stored

_POINTERS = ("weight", "grad", "momentum", "square_avg", "abs_update", "square_update")
PARAM = np.dtype(
    [(name, np.uintp) for name in _POINTERS]
    + [("rows", "i8"), ("row_elements", "i8"), ("mask", MASK), ("correction", "f4"), ("negative_step_size", "f4")],
    align=True,
)
f32 = np.float32


def fma(a, b, c) -> np.ndarray:
    """a b + c, rounded once to fp32: in long double the product is exact and the sum has bits to spare."""
    with np.errstate(invalid="ignore"):
        return (np.asarray(a, np.longdouble) * np.asarray(b, np.longdouble) + np.asarray(c, np.longdouble)).astype(f32)


# ---- the formulas of cuda/kernels/optim.h, written a second time: what the kernels must equal to the bit


def sgd(hyper: dict, t: int, w, g, states):
    d = fma(f32(hyper["weight_decay"]), w, g) if hyper["weight_decay"] else g
    if not hyper["momentum"]:
        return fma(-f32(hyper["lr"]), d, w), states
    v = d if hyper["first_step"] else fma(f32(1 - hyper["dampening"]), d, f32(hyper["momentum"]) * states[0])
    u = fma(f32(hyper["momentum"]), v, d) if hyper["nesterov"] else v
    return fma(-f32(hyper["lr"]), u, w), [v]


def adamw(hyper: dict, t: int, w, g, states):
    m, v = states
    share = f32(1 - hyper["beta1"])
    w = f32(1 - hyper["lr"] * hyper["weight_decay"]) * w
    gap = g - m
    m = fma(share, gap, m) if share < 0.5 else fma(-gap, f32(1) - share, g)
    v = fma(f32(1 - hyper["beta2"]), g * g, f32(hyper["beta2"]) * v)
    correction = f32(1) / f32(np.sqrt(1 - hyper["beta2"] ** t))
    root = np.sqrt(v) * correction + f32(hyper["eps"])
    return fma(f32(-(hyper["lr"] / (1 - hyper["beta1"] ** t))), m / root, w), [m, v]


RULES = {"optim_sgd": (sgd, 1), "optim_adamw": (adamw, 2)}
SGD = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 5e-4, "nesterov": False, "first_step": False}
ADAMW = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1e-2}


@dataclasses.dataclass(frozen=True)
class Param:
    filters: int
    channels: int
    taps: int = 1
    dead_filters: float | None = None  # share, by out_slot; None: no list
    dead_kernels: float | None = None  # share, by pairs
    last: bool = False  # channels_last
    sums: str = ""  # a: of |change|, s: of its square
    shift: int = 0  # elements that weight and states lie off a 16-byte boundary
    grad_shift: int = 0
    t: int = 3

    def __str__(self):
        marks = [f"k{self.filters}c{self.channels}t{self.taps}"]
        marks += [f"dead{self.dead_filters}"] * (self.dead_filters is not None)
        marks += [f"pairs{self.dead_kernels}"] * (self.dead_kernels is not None)
        marks += ["last"] * self.last + [f"sums-{self.sums}"] * bool(self.sums) + [f"step{self.t}"] * (self.t != 3)
        marks += [f"shift{self.shift},{self.grad_shift}"] * bool(self.shift or self.grad_shift)
        return "-".join(marks)


class Problem:
    """Dead elements hold NaN in the gradient, and numbers that must not change in the weight and the states."""

    def __init__(self, param: Param, element: str, operation: str, hyper: dict, rng: np.random.Generator, lib):
        self.param, self.element = param, element
        rule, count = RULES[operation]
        count = 0 if operation == "optim_sgd" and not hyper["momentum"] else count
        self.mask = Mask(param, rng)
        shape = (param.filters, param.channels, param.taps)
        live = stored(param, self.mask.live)

        def draw(change=lambda x: x):
            return change(stored(param, rng.standard_normal(shape))).astype(f32)

        self.weight = Shifted(draw(), element, param.shift)
        self.grad = Shifted(np.where(live, draw(), np.nan), element, param.grad_shift)
        states = [draw(np.abs) for _ in range(count)]
        before = [np.full_like(s, np.nan) if hyper.get("first_step") else s for s in states]
        self.states = [Shifted(s, element, param.shift) for s in before]
        self.sums = [arrays.poison(param.filters) for _ in "as"]
        self.age = arrays.poison(2)
        if operation == "optim_adamw":
            lib.call("pk_adamw_age", hyper["lr"], hyper["beta1"], hyper["beta2"], float(param.t), self.age)

        w, g, *old = (arrays.widen(t.array, element) for t in (self.weight, self.grad, *self.states))
        with np.errstate(over="ignore"):
            new, new_states = rule(hyper, param.t, w, g, old)
        pairs = zip((new, *new_states), (w, *old), strict=True)
        self.expected = [np.where(live, self._round(after), before) for after, before in pairs]
        change = (self.expected[0] - w).astype(np.float64)
        self.expected_sums = [np.abs(change).sum((1, 2)), (change * change).sum((1, 2))]

    def _round(self, values):
        return arrays.widen(arrays.narrow(values, self.element), self.element)

    def descriptor(self):
        param = self.param
        return (
            self.weight.address,
            self.grad.address,
            *[state.address for state in self.states],
            *[0] * (2 - len(self.states)),
            *[s.ctypes.data if mark in param.sums else 0 for mark, s in zip("as", self.sums, strict=True)],
            *(param.filters, param.channels * param.taps, self.mask.fields, *self.age),
        )

    def check(self):
        for i, (got, expected) in enumerate(zip((self.weight, *self.states), self.expected, strict=True)):
            name = ("weight", "first state", "second state")[i]
            np.testing.assert_array_equal(arrays.widen(got.array, self.element), expected, name)
            got.check_surroundings(name)
        for mark, got, expected in zip("as", self.sums, self.expected_sums, strict=True):
            if mark in self.param.sums:
                np.testing.assert_allclose(got, expected, rtol=1e-5, err_msg=f"sum {mark}")
                arrays.check_surroundings(f"sum {mark}", got)


@dataclasses.dataclass(frozen=True)
class Case:
    operation: str
    element: str
    params: tuple[Param, ...]
    name: str = ""
    changes: tuple = ()  # of SGD or ADAMW, as items

    def __str__(self):
        return self.name or "-".join([str(self.params[0])] + [f"{k}{v}" for k, v in self.changes])

    def run(self, lib):
        rng = np.random.default_rng(11)
        hyper = (SGD if self.operation == "optim_sgd" else ADAMW) | dict(self.changes)
        problems = [Problem(p, self.element, self.operation, hyper, rng, lib) for p in self.params]
        params = arrays.guarded(np.array([p.descriptor() for p in problems], PARAM))
        lib.call(f"pk_{self.operation}", ELEMENTS.index(self.element), params, len(problems), *hyper.values())
        for problem in problems:
            problem.check()


@dataclasses.dataclass(frozen=True)
class TooLongCase:
    operation: str
    element: str

    def __str__(self):
        return "row-too-long"

    def run(self, lib):
        mask = (16, 0, 1, 1 << 30, 2, False)  # the pairs are never read
        params = arrays.guarded(np.array([(*[0] * 6, 1, 1 << 31, mask, 0, 0)], PARAM))
        numbers = (SGD if self.operation == "optim_sgd" else ADAMW).values()
        assert lib.status(f"pk_{self.operation}", ELEMENTS.index(self.element), params, 1, *numbers)[0] == 1


ROOMS = [(size - 128 - 8) // (PARAM.itemsize + 16 + 4) for size in (4096, 32764)]  # parameters of a launch


def cases(operation: str, element: str) -> list:
    def case(*params, **more):
        return Case(operation, element, params, **more)

    some = dataclasses.replace
    span = 4 if element == "f32" else 8
    lengths = {
        1,
        3,
        4,
        5,
        *(n * span + d for n in (1, 32, 256) for d in (-1, 0, 1)),
        512 * span + 1,
    }  # lanes, team, block
    found = [case(Param(3, n, dead_filters=0.3, sums="as")) for n in sorted(lengths)]
    found += [case(Param(n, 1, dead_filters=0.5)) for n in (1, 255, 256, 257)]
    piece = 1024 * span
    found += [case(Param(1, n)) for n in (1, 5, piece - 1, piece, piece + 1)]
    found += [case(Param(n, piece // 4 - 1)) for n in (4, 5)]
    found += [case(Param(9, 10, dead_filters=share)) for share in (0.0, 0.5, 1.0)]
    for channels in (1, 31, 32, 33):
        for taps, last in ((1, False), (9, False), (9, True)):
            found.append(case(Param(4, channels, taps, dead_filters=0.3, dead_kernels=0.4, last=last, sums="as")))
    plain = Param(4, 9, 4, dead_kernels=0.5)
    found += [case(some(plain, dead_kernels=share)) for share in (0.0, 0.5, 1.0)]
    found += [case(some(plain, dead_filters=share, last=True)) for share in (0.0, 1.0)]
    found += [case(Param(4, 9, sums="a")), case(Param(4, 9, sums="s"))]
    shifts = ((1, 1), (3, 3), (0, 1), (2, 0))
    found += [case(Param(5, 37, dead_kernels=0.3, shift=s, grad_shift=g)) for s, g in shifts]
    found += [case(Param(3, 37, shift=1, grad_shift=1))]
    many = [
        Param(
            n % 7, n % 11, 1 + n % 2, 0.3 if n % 3 else None, 0.3 if n % 5 == 0 else None, sums="as" * (n % 2), t=1 + n
        )
        for n in range(100)
    ]
    for room in ROOMS:  # one launch, and two
        for count in (room, room + 1):
            found.append(case(*(Param(1 + n % 2, 3, t=1 + n) for n in range(count)), name=f"{count}-params"))
    found += [case(*many, name="many-params"), case(name="no-params"), TooLongCase(operation, element)]
    if operation == "optim_sgd":
        for first in (False, True):
            for changes in ({}, {"momentum": 0.0}, {"nesterov": True}, {"dampening": 0.1}, {"weight_decay": 0.0}):
                found.append(case(plain, changes=tuple((changes | {"first_step": first}).items())))
        found.append(case(Param(1, 37), changes=(("first_step", True),)))
    else:
        found += [case(some(plain, t=t)) for t in (1, 10**7)]
        for changes in ({"weight_decay": 0.0}, {"beta1": 0.3}, {"eps": 1.0}):
            found.append(case(plain, changes=tuple(changes.items())))
        found.append(case(some(plain, sums="as"), changes=(("eps", 0.0),)))  # 0 / 0 beside the row
    return found


CASES = {f"{operation}_{element}_sm80": cases(operation, element) for operation in RULES for element in ELEMENTS}
