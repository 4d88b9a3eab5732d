"""batch_norm, forward and backward, against numpy in double: live channels of x, dead ones full of NaN, and holes."""

import dataclasses

import numpy as np

from . import arrays
from .mask_grad import ELEMENTS, Shifted

MOMENTUM, EPS = 0.25, 1e-5
TOLERANCE = {"f32": 2e-5, "bf16": 2**-8, "f16": 2**-10}  # of a value; statistics and parameters are float32's


@dataclasses.dataclass(frozen=True)
class Case:
    element: str
    pixels: int
    channels: int
    training: bool = True
    dead: float = 0.3  # share of the channels
    wide: bool = False  # x has dead channels, which have no place among the live ones; else holes, which have one
    affine: bool = True
    running: bool = True
    adds: bool = False  # a tensor is added to y
    relu: bool = False  # of that
    shift: int = 0  # elements that x lies off a 16-byte boundary
    offset: float = 0.0  # of all values

    def __str__(self):
        marks = [f"p{self.pixels}c{self.channels}", "training" if self.training else "eval"]
        marks += [f"dead{self.dead}"] * (self.dead != 0.3) + ["wide"] * self.wide
        marks += ["adds"] * self.adds + ["relu"] * self.relu
        marks += ["plain"] * (not self.affine) + ["untracked"] * (not self.running)
        return "-".join(
            marks + [f"shift{self.shift}"] * bool(self.shift) + [f"offset{self.offset}"] * bool(self.offset)
        )

    def run(self, lib):
        rng = np.random.default_rng(self.pixels + self.channels)
        dead = rng.random(self.channels) < self.dead
        features = self.channels if self.wide else 2 * self.channels + 1
        of_live = np.sort(rng.permutation(features)[: self.channels])
        feature = np.where(dead, -1, np.arange(self.channels) if self.wide else of_live)
        place = np.where(dead, -1, np.cumsum(~dead) - 1) if self.wide else np.arange(self.channels)
        places = int((~dead).sum()) if self.wide else self.channels
        values = rng.standard_normal((2, self.pixels, self.channels)) * 2 + self.offset
        values[:, :, dead] = np.nan
        x, grad = (Shifted(each, self.element, self.shift) for each in values)
        weight, bias = (arrays.guarded(rng.standard_normal(features), np.float32) for _ in range(2))
        running = [arrays.guarded(rng.random(features) + 0.5, np.float32) for _ in range(2)]
        before = [each.astype(np.float64) for each in running]
        parameters = (weight, bias) if self.affine else (None, None)
        lists = [arrays.guarded(each, np.int32) for each in (feature, place)]
        floats = arrays.guarded([0], np.int64)
        problem = (ELEMENTS.index(self.element), self.pixels, self.channels)
        lib.call("pk_batch_norm_workspace", *problem, floats)

        y, grad_x = (Shifted(np.full_like(values[0], 7), self.element, self.shift) for _ in range(2))
        mean, invstd, scales, offsets = (arrays.poison(places) for _ in range(4))
        workspace = arrays.poison(int(floats[0]))
        tracked = running if self.running else (None, None)
        lib.call("pk_batch_norm", *problem, *lists, *parameters, *tracked, self.training, MOMENTUM, EPS,
                 x.array, y.array, mean, invstd, scales, offsets, workspace)  # fmt: skip
        if self.adds or self.relu:
            lib.call("pk_batch_norm_apply", *problem, *lists, mean, scales, offsets, x.array,
                     grad.array if self.adds else None, self.relu, y.array)  # fmt: skip
        behind_relu = self.relu and not self.adds
        grad_weight, grad_bias = (arrays.guarded(np.full(features, 9.0), np.float32) for _ in range(2))
        workspace = arrays.poison(int(floats[0]))
        lib.call("pk_batch_norm_backward", *problem, *lists, parameters[0], mean, invstd, self.training,
                 *((scales, offsets) if behind_relu else (None, None)), grad.array, x.array, grad_x.array, grad_weight,
                 grad_bias, workspace)  # fmt: skip

        rows = feature[~dead]
        wide_x, wide_grad = (arrays.widen(each.array, self.element).astype(np.float64)[:, ~dead] for each in (x, grad))
        if self.training:
            expected_mean, var = wide_x.mean(0), wide_x.var(0)
        else:
            expected_mean, var = before[0][rows], before[1][rows]
        scale = 1 / np.sqrt(var + EPS)
        gamma, beta = (weight[rows], bias[rows]) if self.affine else (1.0, 0.0)
        normal = (wide_x - expected_mean) * scale
        expected_y = normal * gamma + beta + (wide_grad if self.adds else 0)
        if self.relu:
            expected_y = np.maximum(expected_y, 0)
        if behind_relu:  # of what the kernel itself takes for positive
            wide_grad = wide_grad * (arrays.widen(y.array, self.element)[:, ~dead] > 0)
        means = [(wide_grad * normal).mean(0), wide_grad.mean(0)] if self.training else [0.0, 0.0]
        self._near(y, dead, expected_y)
        terms = gamma * scale * wide_grad  # of two values, say, little is left after the means are gone
        self._near(grad_x, dead, terms - gamma * scale * (means[1] + normal * means[0]), terms)
        exact = {"rtol": 2e-4, "atol": 2e-4 * np.abs(wide_grad).max(initial=1) * max(np.sqrt(self.pixels), 1)}
        np.testing.assert_allclose(mean[place[~dead]], expected_mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(invstd[place[~dead]], scale, rtol=1e-4)
        if not self.wide:
            assert not mean[dead].any() and not invstd[dead].any()
        np.testing.assert_allclose(grad_weight[rows], (wide_grad * normal).sum(0), **exact)
        np.testing.assert_allclose(grad_bias[rows], wide_grad.sum(0), **exact)
        others = np.setdiff1d(np.arange(features), rows)
        assert (grad_weight[others] == 9).all() and (grad_bias[others] == 9).all()
        moves = self.training and self.running
        new = (expected_mean, var * self.pixels / (self.pixels - 1)) if moves else (None, None)
        for got, old, value in zip(running, before, new, strict=True):
            np.testing.assert_array_equal(got[others], old[others])
            wanted = old[rows] + MOMENTUM * (value - old[rows]) if moves else old[rows]
            np.testing.assert_allclose(got[rows], wanted, rtol=1e-5, atol=1e-5)

    def _near(self, got, dead, expected, terms=None):
        """terms: numbers of the size of what is added, where much of it cancels."""
        values = arrays.widen(got.array, self.element)
        assert not values[:, dead].any()
        rtol = TOLERANCE[self.element]
        largest, cancels = (0 if each is None else np.abs(each).max(initial=0) for each in (expected, terms))
        atol = rtol * max(largest, 1e-3) + TOLERANCE["f32"] * cancels
        np.testing.assert_allclose(values[:, ~dead], expected, rtol=rtol, atol=atol)


def cases(element: str) -> list:
    span = 4 if element == "f32" else 8

    def case(pixels, channels, **more):
        return Case(element, pixels, channels, **more)

    found = [case(10, C) for C in (1, 2, span - 1, span, span + 1, 3 * span, 31, 33)]
    found += [case(9, C) for C in (32 * span, 33 * span)]  # one and two blocks side by side
    found += [case(pixels, 3) for pixels in (2, 63, 64, 65, 1030)] + [case(pixels, span) for pixels in (2, 257, 2200)]
    for more in ({"wide": True}, {"training": False}, {"affine": False}, {"shift": 1}, {"dead": 0.0}, {"dead": 1.0}):
        found += [case(21, 2 * span, **more), case(70, 5, **more)]
    for more in ({"adds": True}, {"relu": True}, {"adds": True, "relu": True}):
        found += [case(21, 2 * span, **more), case(70, 5, **more), case(70, 5, training=False, **more)]
        found += [case(1030, 33 * span, **more), case(70, 5, wide=True, **more)]
    found += [case(21, 2 * span, running=False), case(21, 2 * span, wide=True, training=False)]
    return found + [case(300, span, offset=30.0)] * (element == "f32")


CASES = {f"batch_norm_{element}_sm80": cases(element) for element in ELEMENTS}
