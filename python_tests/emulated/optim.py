"""optim_sgd, optim_adamw: to the bit, against the same operations in numpy."""

import dataclasses

import numpy as np

from . import arrays
from .mask_grad import ELEMENTS, Shifted

_POINTERS = ("weight", "grad", "momentum", "square_avg", "out_slot", "live", "abs_update", "square_update")
PARAM = np.dtype(
    [(name, np.uintp) for name in _POINTERS]
    + [("rows", "i8"), ("row_elements", "i8"), ("constant_is_dead", "?"), ("first_step", "?")],
    align=True,
)
DEAD, CONSTANT = -1, -2
f32 = np.float32


def fma(a, b, c) -> np.ndarray:
    """One rounding: the product is exact in long double, and its sum is long before fp32 rounds it."""
    with np.errstate(invalid="ignore"):
        return (np.asarray(a, np.longdouble) * np.asarray(b, np.longdouble) + np.asarray(c, np.longdouble)).astype(f32)


# ---- the formulas of optim.h


def sgd(hyper: dict, first_step: bool, w, g, states):
    d = fma(f32(hyper["weight_decay"]), w, g) if hyper["weight_decay"] else g
    if not hyper["momentum"]:
        return fma(-f32(hyper["lr"]), d, w), states
    v = d if first_step else fma(f32(1 - hyper["dampening"]), d, f32(hyper["momentum"]) * states[0])
    u = fma(f32(hyper["momentum"]), v, d) if hyper["nesterov"] else v
    return fma(-f32(hyper["lr"]), u, w), [v]


def adamw(hyper: dict, first_step: bool, w, g, states):
    m, v = states
    share, t = f32(1 - hyper["beta1"]), hyper["t"]
    w = f32(1 - hyper["lr"] * hyper["weight_decay"]) * w
    gap = g - m
    m = fma(share, gap, m) if share < 0.5 else fma(-gap, f32(1) - share, g)
    v = fma(f32(1 - hyper["beta2"]), g * g, f32(hyper["beta2"]) * v)
    correction = f32(1) / f32(np.sqrt(1 - hyper["beta2"] ** t))
    root = np.sqrt(v) * correction + f32(hyper["eps"])
    return fma(f32(-(hyper["lr"] / (1 - hyper["beta1"] ** t))), m / root, w), [m, v]


RULES = {"optim_sgd": (sgd, 1), "optim_adamw": (adamw, 2)}
SGD = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 5e-4, "nesterov": False}
ADAMW = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1e-2, "t": 3}


@dataclasses.dataclass(frozen=True)
class Param:
    rows: int
    row_elements: int
    dead: float | None = None  # share of dead rows; None: no mask
    masks: str = "s"  # s: by slots, l: by bytes; both: half each
    constant_is_dead: bool = True
    sums: str = ""  # a: of |change|, s: of its square
    first_step: bool = False
    shift: int = 0  # elements that weight and states lie off a 16-byte boundary
    grad_shift: int = 0

    def __str__(self):
        marks = [f"{self.rows}x{self.row_elements}"]
        marks += [f"dead{self.dead}by-{self.masks}"] * (self.dead is not None)
        marks += ["constants-live"] * (not self.constant_is_dead) + [f"sums-{self.sums}"] * bool(self.sums)
        marks += ["first"] * self.first_step + [f"shift{self.shift},{self.grad_shift}"] * bool(
            self.shift or self.grad_shift
        )
        return "-".join(marks)


class Problem:
    """Dead rows hold NaN in the gradient and what nobody may change in weight and states."""

    def __init__(self, param: Param, element: str, operation: str, hyper: dict, rng: np.random.Generator):
        self.param = param
        rule, count = RULES[operation]
        count = 0 if operation == "optim_sgd" and not hyper["momentum"] else count
        shape = (param.rows, param.row_elements)
        draw = rng.random(param.rows)
        dead = draw < (param.dead or 0.0)
        by_slot = dead & (draw * 1e6 % 2 < 1) if "l" in param.masks else dead
        by_slot = by_slot if "s" in param.masks else np.zeros_like(dead)
        constant = rng.random(param.rows) < 0.5
        slots = np.where(by_slot, np.where(constant, CONSTANT, DEAD), np.arange(param.rows))
        if not param.constant_is_dead:
            dead = dead & ~(by_slot & constant)
        self.out_slot = arrays.guarded(slots, np.int32)
        self.live = arrays.guarded(~(dead & ~by_slot) * np.uint8(255), np.uint8)

        grad = np.where(dead[:, None], np.nan, rng.standard_normal(shape)).astype(f32)
        w = rng.standard_normal(shape).astype(f32)
        states = [np.abs(rng.standard_normal(shape)).astype(f32) for _ in range(count)]
        before = [np.full(shape, np.nan, f32) if param.first_step else s for s in states]
        self.weight = Shifted(w, "f32", param.shift)
        self.states = [Shifted(s, "f32", param.shift) for s in before]
        self.grad = Shifted(grad, element, param.grad_shift)
        self.sums = [arrays.poison(param.rows) for _ in "as"]

        g = arrays.widen(self.grad.array, element)
        new_w, new_states = rule(hyper, param.first_step, w, g, states)
        self.expected = np.where(dead[:, None], w, new_w)
        pairs = zip(before, new_states, strict=True)
        self.expected_states = [np.where(dead[:, None], old, new) for old, new in pairs]
        change = (self.expected - w).astype(np.float64)
        self.expected_sums = [np.abs(change).sum(1), (change * change).sum(1)]

    def descriptor(self):
        param = self.param
        masks = ("s" in param.masks, "l" in param.masks) if param.dead is not None else (False, False)
        return (
            self.weight.address,
            self.grad.address,
            *[state.address for state in self.states],
            *[0] * (2 - len(self.states)),
            *[m.ctypes.data if used else 0 for m, used in zip((self.out_slot, self.live), masks, strict=True)],
            *[s.ctypes.data if mark in param.sums else 0 for mark, s in zip("as", self.sums, strict=True)],
            *(param.rows, param.row_elements, param.constant_is_dead, param.first_step),
        )

    def check(self):
        np.testing.assert_array_equal(self.weight.array, self.expected, "weight")
        self.weight.check_surroundings("weight")
        for state, expected in zip(self.states, self.expected_states, strict=True):
            np.testing.assert_array_equal(state.array, expected, "state")
            state.check_surroundings("state")
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
    on_device: bool = False

    def __str__(self):
        return self.name or "-".join([str(self.params[0])] + [f"{k}{v}" for k, v in self.changes])

    def run(self, lib):
        rng = np.random.default_rng(11)
        hyper = (SGD if self.operation == "optim_sgd" else ADAMW) | dict(self.changes)
        problems = [Problem(p, self.element, self.operation, hyper, rng) for p in self.params]
        params = arrays.guarded(np.array([p.descriptor() for p in problems], PARAM))
        numbers = (*hyper.values(), self.on_device)
        lib.call(f"pk_{self.operation}", ELEMENTS.index(self.element), params, len(problems), *numbers)
        for problem in problems:
            problem.check()


@dataclasses.dataclass(frozen=True)
class TooLongCase:
    operation: str
    element: str

    def __str__(self):
        return "row-too-long"

    def run(self, lib):
        params = arrays.guarded(np.array([(*[0] * 8, 1, 1 << 31, False, False)], PARAM))
        numbers = (*(SGD if self.operation == "optim_sgd" else ADAMW).values(), False)
        assert lib.status(f"pk_{self.operation}", ELEMENTS.index(self.element), params, 1, *numbers)[0] == 1


def cases(operation: str, element: str) -> list:
    def case(*params, **more):
        return Case(operation, element, params, **more)

    found = [case(Param(3, n, dead=0.3, sums="as")) for n in (1, 3, 4, 5, 127, 128, 129, 1023, 1024, 1025, 2049)]
    found += [case(Param(n, 1, dead=0.5)) for n in (1, 255, 256, 257)]
    found += [case(Param(1, n)) for n in (1, 5, 4095, 4096, 4097)]  # in pieces
    found += [case(Param(n, 1023)) for n in (4, 5)]
    found += [case(Param(9, 10, dead=d, masks=m)) for d in (0.0, 0.5, 1.0) for m in ("s", "l", "sl")]
    found += [
        case(Param(9, 10, dead=0.7, constant_is_dead=False)),
        case(Param(4, 9, sums="a")),
        case(Param(4, 9, sums="s")),
    ]
    found += [case(Param(5, 37, dead=0.3, shift=s, grad_shift=g)) for s, g in ((1, 1), (3, 3), (0, 1), (2, 0))]
    found += [case(Param(3, 37, shift=1, grad_shift=1))]
    many = [Param(n % 7, n % 11, dead=0.3 if n % 3 else None, sums="as" if n % 2 else "") for n in range(100)]
    found += [case(*many, name="many-params"), case(name="no-params"), TooLongCase(operation, element)]
    found += [case(Param(3, 37, dead=0.3), name="step-on-device", on_device=True)]
    plain = Param(3, 37, dead=0.3)
    if operation == "optim_sgd":
        first = dataclasses.replace(plain, first_step=True)
        found += [case(first), case(Param(1, 37, first_step=True))]
        for changes in ({"momentum": 0.0}, {"nesterov": True}, {"dampening": 0.1}, {"weight_decay": 0.0}):
            found += [case(p, changes=tuple(changes.items())) for p in (plain, first)]
    else:
        for changes in ({"weight_decay": 0.0}, {"t": 1}, {"t": 10**7}, {"beta1": 0.3}, {"eps": 1.0}):
            found.append(case(plain, changes=tuple(changes.items())))
        found.append(case(dataclasses.replace(plain, sums="as"), changes=(("eps", 0.0),)))  # 0 / 0 beside the row
    return found


CASES = {f"{operation}_{element}_sm80": cases(operation, element) for operation in RULES for element in ELEMENTS}
