"""sparse_fwd, sparse_grad_input and sparse_grad_weight against the convolutions of arrays.py, with NaN in everything
dead."""

from dataclasses import dataclass, replace

import numpy as np

from . import arrays


@dataclass
class Problem:
    """A convolution in the notation of benchmarks/shapes, and its masks."""

    n: int = 1
    c: int = 5
    h: int = 6
    w: int = 7
    k: int = 6
    r: int = 3
    s: int = 3
    stride: tuple = (1, 1)
    padding: tuple = (1, 1)
    dilation: tuple = (1, 1)
    g: int = 1
    density: float = 0.5  # of single kernels
    masks: str = "kernel"  # kernel, all, none, filter, input, mixed, constant
    last: bool = False  # the weight lies channels last
    exact: bool = True
    processors: int = 1  # of the device; 0: no number of blocks is too small
    note: str = ""

    def __str__(self):
        parts = [f"n{self.n}c{self.c}h{self.h}w{self.w}k{self.k}r{self.r}s{self.s}"]
        parts += [f"st{self.stride[0]}x{self.stride[1]}"] if self.stride != (1, 1) else []
        parts += [f"p{self.padding[0]}x{self.padding[1]}"]
        parts += [f"d{self.dilation[0]}x{self.dilation[1]}"] if self.dilation != (1, 1) else []
        parts += [f"g{self.g}"] if self.g > 1 else []
        parts += [self.masks, f"{round(100 * self.density)}%"]
        parts += ["last"] if self.last else []
        parts += ["random"] if not self.exact else []
        parts += [f"m{self.processors}"]
        return "-".join(parts + ([self.note] if self.note else []))

    @property
    def geometry(self):
        return self.stride, self.padding, self.dilation

    def make(self):
        """Makes the masks, operands with NaN where they are dead, and the same operands with zeros there."""
        rng = np.random.default_rng(abs(hash((self.n, self.c, self.h, self.w, self.k, self.r))) % 1000)
        channels = self.c // self.g
        x_shape, w_shape = (self.n, self.c, self.h, self.w), (self.k, channels, self.r, self.s)
        P, Q = arrays.out_size(x_shape, w_shape, *self.geometry)
        kernel = rng.random((self.k, channels)) < self.density
        filters, inputs = np.ones(self.k, bool), np.ones(self.c, bool)
        if self.masks == "all":
            kernel[...] = True
        if self.masks == "none":
            kernel[...] = False
        if self.masks in ("filter", "mixed"):
            filters = rng.random(self.k) < 0.6
        if self.masks in ("input", "mixed"):
            inputs = rng.random(self.c) < 0.6
        if self.masks == "constant":  # some live filters without a live kernel
            kernel[::2] = False
        groups = np.repeat(np.arange(self.g), self.k // self.g)
        live = kernel & filters[:, None] & inputs.reshape(self.g, channels)[groups]
        read = np.zeros((self.g, channels), bool)
        np.logical_or.at(read, groups, live)
        read, read_filters = read.ravel(), live.any(1)

        def values(shape):
            return arrays.integers(rng, shape) if self.exact else rng.standard_normal(shape).astype(np.float32)

        def both(array, alive):
            alive = np.broadcast_to(alive, array.shape)
            return np.where(alive, array, np.nan).astype(np.float32), np.where(alive, array, 0).astype(np.float32)

        self.filter, self.kernel, self.input, self.live = map(arrays.guarded, (filters, kernel, inputs, live))
        self.x, self.clean_x = both(values(x_shape), read[None, :, None, None])
        self.weight, self.clean_weight = both(values(w_shape), live[:, :, None, None])
        self.bias, self.clean_bias = both(values(self.k), filters)
        self.grad, self.clean_grad = both(values((self.n, self.k, P, Q)), read_filters[None, :, None, None])
        sizes = [*x_shape, self.k, self.r, self.s, P, Q, self.g, *self.stride, *self.padding, *self.dilation]
        self.sizes = np.array(sizes, np.int64)
        taps = self.r * self.s
        strides = (channels * taps, 1, channels) if self.last else (channels * taps, taps, 1)
        self.strides = np.array(strides, np.int64)
        return self

    def lay_out(self, weight) -> np.ndarray:
        """[K, C / G, R, S] as it lies in memory"""
        return arrays.guarded(weight.transpose(0, 2, 3, 1) if self.last else weight)

    def lay_back(self, weight) -> np.ndarray:
        shape = (self.k, self.r, self.s, self.c // self.g)
        return weight.reshape(shape).transpose(0, 3, 1, 2) if self.last else weight

    @property
    def lists(self):
        return self.filter, self.kernel, self.input, self.sizes, self.strides, self.processors

    def check(self, got, expected):
        if self.exact:
            np.testing.assert_array_equal(got, expected)
        else:
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@dataclass
class Forward:
    problem: Problem
    bias: bool = True

    def __str__(self):
        return f"{self.problem}{'' if self.bias else '-nobias'}"

    def run(self, lib):
        p = self.problem.make()
        expected = arrays.conv2d(p.clean_x, p.clean_weight, *p.geometry)
        if self.bias:
            expected += p.clean_bias[:, None, None]
        y = arrays.poison(expected.shape)
        bias = arrays.guarded(p.bias) if self.bias else None
        lib.call("pk_sparse_fwd", arrays.guarded(p.x), p.lay_out(p.weight), bias, y, *p.lists)
        p.check(y, expected)


@dataclass
class GradInput:
    problem: Problem

    def __str__(self):
        return str(self.problem)

    def run(self, lib):
        p = self.problem.make()
        expected = arrays.conv2d_grad_input(p.clean_grad, p.clean_weight, p.x.shape, *p.geometry)
        dx = arrays.poison(expected.shape)
        lib.call("pk_sparse_grad_input", arrays.guarded(p.grad), p.lay_out(p.weight), dx, *p.lists)
        p.check(dx, expected)


@dataclass
class GradWeight:
    problem: Problem
    scale: bool = False

    def __str__(self):
        return f"{self.problem}{'-scale' if self.scale else ''}"

    def run(self, lib):
        p = self.problem.make()
        expected = arrays.conv2d_grad_weight(p.clean_grad, p.clean_x, p.weight.shape, *p.geometry)
        expected = np.where(p.live[:, :, None, None], expected, 0)
        scale = None
        if self.scale:
            scale = np.arange(p.k, dtype=np.float32) % 3 / 2
            p.grad[:, scale == 0] = np.nan  # 0 is exact 0
            expected = np.where(scale[:, None, None, None] != 0, expected * scale[:, None, None, None], 0)
            scale = arrays.guarded(scale)
        floats = np.zeros(1, np.int64)
        lib.call("pk_sparse_grad_weight_workspace", *p.lists, floats)
        dw = arrays.poison(p.lay_out(p.weight).shape)
        workspace = arrays.poison(int(floats[0]))
        lib.call(
            "pk_sparse_grad_weight",
            arrays.guarded(p.x),
            arrays.guarded(p.grad),
            scale,
            workspace,
            dw,
            *p.lists,
        )
        p.check(p.lay_back(dw), expected)


@dataclass
class Refused:
    """Shapes that the kernels do not serve: sparse_serves() is false, and a launch returns cudaErrorInvalidValue."""

    operation: str

    def __str__(self):
        return "refused"

    def run(self, lib):
        for p in (
            Problem(r=33, s=1, h=40, padding=(0, 0)),
            Problem(h=900, w=900, padding=(0, 0), dilation=(400, 400)),
            Problem(h=20, w=20, stride=(9, 9), padding=(0, 0)) if self.operation == "grad_input" else None,
        ):
            if p is None:
                continue
            p.make()
            serves = np.ones(1, bool)
            lib.call("pk_sparse_serves", p.sizes, serves)
            assert not serves[0]
            one = arrays.guarded(np.zeros(4, np.float32))
            if self.operation == "fwd":
                status, _ = lib.status("pk_sparse_fwd", one, one, one, one, *p.lists)
            elif self.operation == "grad_input":
                status, _ = lib.status("pk_sparse_grad_input", one, one, one, *p.lists)
            else:
                status, _ = lib.status("pk_sparse_grad_weight", one, one, None, one, one, *p.lists)
            assert status == 1
        serves = np.zeros(1, bool)
        lib.call("pk_sparse_serves", Problem().make().sizes, serves)
        assert serves[0]


ONE = {"r": 1, "s": 1, "padding": (0, 0)}


def _shapes() -> list[Problem]:
    """Shapes that reach every window, class and tile of all three directions."""
    problems = [Problem(masks=m) for m in ("kernel", "all", "none", "filter", "input", "mixed", "constant")]
    problems += [Problem(masks=m, g=g, c=6, k=6, last=g == 2) for m in ("kernel", "mixed") for g in (2, 3, 6)]
    problems += [Problem(last=True), Problem(last=True, **ONE), Problem(exact=False), Problem(exact=False, **ONE)]
    problems += [Problem(n=0), Problem(h=0, padding=(2, 2)), Problem(h=1, w=1, padding=(0, 0), note="no-output")]
    problems += [Problem(c=1, k=1, masks="all"), Problem(c=1, k=1, h=1, w=1, masks="all", **ONE)]
    # planes around the size of a patch, a row of lanes and a tile; several images in a tile
    problems += [Problem(h=h, w=w, c=2, k=3) for h, w in ((3, 3), (4, 4), (5, 5), (7, 9), (8, 8), (15, 17), (16, 16))]
    problems += [Problem(h=h, w=w, c=2, k=3) for h, w in ((17, 33), (2, 31), (1, 32), (65, 3), (2, 129))]
    problems += [Problem(n=n, h=2, w=3, c=2, k=3) for n in (2, 3, 7, 8, 9, 17)]
    problems += [Problem(n=n, h=7, w=8, c=2, k=3, **ONE) for n in (1, 2, 9)]
    problems += [Problem(n=n, h=h, w=w, c=3, k=3, **ONE) for n, h, w in ((1, 4, 4), (2, 8, 6), (1, 12, 20), (3, 4, 36))]
    # kernels of any size
    problems += [Problem(r=r, s=s, padding=(r // 2, 0)) for r, s in ((2, 2), (2, 1), (1, 2), (1, 3), (3, 1), (5, 4))]
    problems += [Problem(r=7, s=7, h=9, w=9, c=2, k=3, padding=(3, 3), stride=(2, 2))]
    problems += [Problem(padding=(3, 4)), Problem(padding=(0, 0)), Problem(r=2, s=2, padding=(2, 3))]
    # strides and dilations: classes of 2 x 2, 2 x 1, 1 x 2, 1 x 1 and no taps
    problems += [Problem(stride=(2, 2), h=h, w=w) for h, w in ((7, 8), (8, 7), (2, 1))]
    problems += [Problem(stride=(2, 2), h=h, w=w, **ONE) for h, w in ((5, 6), (9, 34), (1, 70))]
    problems += [
        Problem(stride=(2, 3), h=5, w=6, r=1, s=1, padding=(2, 1)),
        Problem(stride=(1, 2), h=5, w=6),
        Problem(stride=(3, 1)),
    ]
    problems += [Problem(dilation=(2, 1), padding=(2, 1)), Problem(dilation=(2, 3), stride=(2, 2), h=9, w=11)]
    problems += [Problem(stride=(4, 4), r=4, s=4, h=9, w=8, padding=(0, 0)), Problem(stride=(2, 4), h=33, w=40, c=2)]
    # numbers of filters around a block's, of channels around a stage's
    problems += [Problem(k=k, h=3, w=4, density=0.2) for k in (31, 32, 33, 65)]
    problems += [Problem(c=c, h=3, w=4, density=0.2) for c in (3, 4, 8, 9, 33)]
    problems += [Problem(c=c, k=k, h=2, w=2, density=0.9) for c, k in ((9, 9), (40, 17), (3, 40))]
    problems += [Problem(n=2, c=40, k=40, h=4, w=4, density=d) for d in (0.05, 0.5)]
    # every width of the stores
    problems += [Problem(h=3, w=w, c=2, k=2) for w in (8, 10, 11)]
    return problems


def _many_steps() -> list[Problem]:
    """Around kListSteps operands; with 512 the second part of the list overwrites all of the first."""
    problems = [Problem(c=c, k=2, h=1, w=2, masks="all", note="listed", **ONE) for c in (255, 256, 257, 512)]
    return problems + [Problem(c=2, k=k, h=1, w=2, masks="all", note="listed", **ONE) for k in (255, 256, 257, 512)]


def _large_tiles() -> list[Problem]:
    """Tiles so large that a stage has 2 steps, or 1, and that a block has only part of its jobs."""
    return [
        Problem(c=3, k=3, h=70, w=70, dilation=(16, 16), padding=(16, 16), note="dilated"),
        Problem(c=5, k=3, h=60, w=61, dilation=(12, 8), padding=(0, 0), note="dilated"),
        Problem(c=5, k=3, h=40, w=41, r=11, s=11, stride=(4, 4), padding=(2, 2), note="large"),
        Problem(c=2, k=2, h=34, w=35, r=31, s=31, padding=(15, 15), density=0.8, note="large"),
    ]


def _dots() -> list[GradWeight]:
    cases = [GradWeight(p) for p in _shapes() + _large_tiles()]
    cases += [GradWeight(p) for p in _on(100, _shapes()[:6] + _large_tiles()[:2])]
    cases += [GradWeight(Problem(k=7), scale=True)]
    cases += [GradWeight(Problem(k=7, last=True, masks="mixed", processors=3), scale=True)]
    cases += [GradWeight(Problem(n=9, h=8, w=8, c=3, k=3, processors=m)) for m in (2, 3, 100)]
    cases += [GradWeight(Problem(h=3, w=4, c=c, k=3, last=last)) for c in (31, 32, 33, 65) for last in (False, True)]
    cases += [GradWeight(Problem(h=2, w=2, c=c, k=k, masks="all")) for c, k in ((31, 8), (32, 9), (33, 16), (2, 33))]
    return cases


def _on(processors: int, problems: list[Problem]) -> list[Problem]:
    return [replace(p, processors=processors) for p in problems]


def _wide_and_narrow() -> list[Problem]:
    """Blocks of 16 results (where there are too few blocks for the device) and of 32."""
    problems = _shapes() + _many_steps() + _large_tiles()
    return problems + _on(0, problems)


CASES: dict[str, list] = {
    "sparse_fwd_f32_sm80": [
        *(Forward(p) for p in _wide_and_narrow()),
        *(Forward(Problem(masks=m), bias=False) for m in ("kernel", "mixed", "constant", "none")),
        Refused("fwd"),
    ],
    "sparse_grad_input_f32_sm80": [*(GradInput(p) for p in _wide_and_narrow()), Refused("grad_input")],
    "sparse_grad_weight_f32_sm80": [*_dots(), Refused("grad_weight")],
}
