"""igemm_grad_weight and block_sparse_grad_weight against the convolutions of arrays.py, with NaN in dead channels, read
or written, and in everything that must not be written. Then how plan_grad_weight() splits the pixels.

Kernels get numbers as they were drawn, and are compared with the gradient of rounded ones: tf32 rounds on the way."""

from dataclasses import dataclass, replace

import numpy as np

from . import arrays
from .igemm_problems import (
    ELEMENTS,
    ROWS,
    Problem,
    around,
    compare,
    convolutions,
    data,
    device_lists,
    held,
    packed_count,
    sides,
    storage,
    vector_channels,
)

GRAD_TILES = (128, 64)  # as enum GradWeightTile: filters, and columns
# Infinities; NaNs of both signs: quiet, with all bits set (what GPUs compute), with the lowest bit that tf32 keeps.
SPECIAL = (0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F802000, 0xFF802000)


@dataclass(frozen=True)
class GradWeight:
    """One call of igemm_grad_weight or block_sparse_grad_weight."""

    problem: Problem
    element: str
    tile: int
    splits: int = 1
    listed: bool = False
    exact: bool = True
    special: bool = False  # SPECIAL in one pixel of some filters and channels

    def __str__(self):
        notes = [f"m{GRAD_TILES[self.tile]}", f"splits{self.splits}", *([] if self.exact else ["random"])]
        notes += ["special"] if self.special else []
        return "-".join([str(self.problem), *notes])

    def run(self, lib):
        p, store = self.problem, lambda values: arrays.narrow(values, self.element)
        rng = np.random.default_rng(p.seed)
        masks = _, kernels, _ = p.masks(rng)
        out, into = sides(masks, self.element)
        x_shape, w_shape = (p.n, p.c, p.h, p.w), (p.k, p.c, p.r, p.s)
        y_shape = (p.n, p.k, *arrays.out_size(x_shape, w_shape, *p.geometry))
        x, grad = self._operand(rng, x_shape, into.index), self._operand(rng, y_shape, out.index)
        given_x, given_grad = np.full_like(x, np.nan), np.full_like(grad, np.nan)
        given_x[:, into.index], given_grad[:, out.index] = x[:, into.index], grad[:, out.index]
        with np.errstate(invalid="ignore"):  # of SPECIAL
            rounded = held(grad, self.element), held(x, self.element)
            full = arrays.conv2d_grad_weight(*rounded, w_shape, *p.geometry)
        expected = full.transpose(0, 2, 3, 1)[out.index][..., into.index]  # [filters, R, S, channels]
        live = np.broadcast_to(kernels[out.index][:, None, None, into.index], expected.shape)

        packed = packed_count(into.live)
        partial = arrays.poison((self.splits, out.live, p.r, p.s, packed))
        lists = (None, None, 0)
        if self.listed:
            lists = device_lists(kernels, True, GRAD_TILES[self.tile], vector_channels(self.element))
        lib.call(
            "pk_igemm_grad_weight",
            p.sizes(),
            ELEMENTS.index(storage(self.element)),
            self.element == "tf32",
            self.tile,
            self.splits,
            store(arrays.nhwc(given_grad)),
            p.k,
            out.live,
            out.index,
            out.vectors,
            store(arrays.nhwc(given_x)),
            p.c,
            into.live,
            into.index,
            into.vectors,
            partial,
            *lists,
        )
        total = partial[..., : into.live].astype(np.float64).sum(0)
        compare(np.float32(total[live]), expected[live], "f32", self.exact)

    def _operand(self, rng, shape, index):
        values = data(rng, shape, self.exact)
        if self.special:
            values[0, index[: len(SPECIAL)], 0, 0] = np.array(SPECIAL, np.uint32).view(np.float32)
        return values


def _grad_weights(element: str) -> list[GradWeight]:
    chunk = 4 * vector_channels(element)
    cases = []
    for tile, side in enumerate(GRAD_TILES):
        cases += [GradWeight(Problem(k=n + 5, filters=n, c=9, h=2, w=3), element, tile) for n in around(side)]
        cases += [GradWeight(Problem(c=n + 5, inputs=n, k=9, h=2, w=3), element, tile) for n in around(side)]
        cases += [GradWeight(Problem(h=1, w=n), element, tile) for n in (1, *around(chunk), *around(4 * chunk))]
        for filters in ("all", "some"):
            for inputs in ("all", "some"):
                problem = Problem(n=2, c=24, k=40, r=3, s=3, padding=(1, 1), filters=filters, inputs=inputs)
                cases += [GradWeight(problem, element, tile, splits) for splits in (1, 3)]
                cases.append(GradWeight(problem, element, tile, 2, exact=False))
        cases += [GradWeight(Problem(filters=f, inputs=f), element, tile, special=True) for f in ("all", 17)]
    for i, problem in enumerate(convolutions()):
        cases.append(GradWeight(replace(problem, constants=()), element, i % 2, 1 + i % 3))
    empty = [
        Problem(filters="none"),
        Problem(inputs="none"),
        Problem(n=0),
        Problem(h=0),
        Problem(c=1, k=1, inputs="all", filters="all"),
    ]
    return cases + [GradWeight(problem, element, 1, 2) for problem in empty]


def _sparse_grad_weights(element: str) -> list[GradWeight]:
    cases = []
    for tile, side in enumerate(GRAD_TILES):
        for blocks in ((side, 16), (8, 8), (side, side), (5, 3)):
            problem = Problem(c=side + 21, k=2 * side + 9, h=2, w=5, blocks=blocks, filters="all", inputs="all")
            cases += [
                GradWeight(problem, element, tile, 2, True),
                GradWeight(replace(problem, filters="some"), element, tile, 1, True),
            ]
        for problem in convolutions()[:8]:
            problem = replace(problem, blocks=(16, 8), inputs="all", filters="all", constants=())
            cases.append(GradWeight(problem, element, tile, 2, True))
    return cases + [GradWeight(Problem(blocks=(8, 8), filters="none"), element, 1, 1, True)]


class HostPlan:
    """plan_grad_weight() for many pixels, few pixels, a gradient that is large by itself, and an empty one."""

    def __str__(self):
        return "plan"

    def run(self, lib):
        plan = np.zeros(3, np.int64)
        for problem, filters, channels, expected in (
            (Problem(n=64, h=56, w=56, c=64, k=64), 32, 32, (1, 528)),
            (Problem(n=64, h=14, w=14, c=256, k=256, r=3, s=3, padding=(1, 1)), 128, 128, (0, 30)),
            (Problem(n=1, h=2, w=2), 24, 24, (1, 1)),
        ):
            lib.call("pk_plan_grad_weight", problem.sizes(), 1, filters, channels, 132, plan)
            assert tuple(plan[:2]) == expected, (problem, plan)
            assert plan[2] == plan[1] * filters * problem.r * problem.s * channels


class Refused:
    """cudaErrorInvalidValue for no splits, a misaligned workspace, too large a stride."""

    def __str__(self):
        return "refused"

    def run(self, lib):
        one = arrays.guarded(np.zeros(64, np.int32))
        side = (24, 1, one, False)
        usual, wide = Problem(), Problem(h=20, stride=(9, 1))
        for splits, partial, problem in ((0, one, usual), (1, one[1:], usual), (1, one, wide)):
            arguments = (problem.sizes(), 1, False, 1, splits, one, *side, one, *side, partial, None, None, 0)
            assert lib.status("pk_igemm_grad_weight", *arguments)[0] == 1


CASES: dict[str, list] = {
    **{f"igemm_grad_weight_{e}_sm80": _grad_weights(e) for e in ROWS},
    **{f"block_sparse_grad_weight_{e}_sm80": _sparse_grad_weights(e) for e in ROWS},
}
CASES["igemm_grad_weight_bf16_sm80"] += [HostPlan(), Refused()]
