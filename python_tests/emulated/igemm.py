"""Implicit matrix products, with and without tile lists, against the convolutions of arrays.py; NaN in all that is
dead, on both sides. Then what the host decides: tile lists, tiles, splits."""

from dataclasses import dataclass, replace

import numpy as np

from . import arrays

ELEMENTS = ("f32", "bf16", "f16")  # as enum Element has them
TILES = ((128, 128), (128, 64), (64, 32))  # as enum IgemmTile: pixels, channels
GRAD_TILES = (128, 64)  # as enum GradWeightTile: filters, and columns
DEAD, CONSTANT = -1, -2


def _vector(element: str) -> int:
    """kVector: channels in 16 bytes"""
    return 8 if element in ("bf16", "f16") else 4


def _packed(live: int) -> int:
    return -(-live // 8) * 8


@dataclass(frozen=True)
class Problem:
    n: int = 1
    c: int = 24
    h: int = 5
    w: int = 6
    k: int = 24
    r: int = 1
    s: int = 1
    stride: tuple = (1, 1)
    padding: tuple = (0, 0)
    dilation: tuple = (1, 1)
    filters: object = "some"  # live ones: some, all, none, runs (of 8), a number (spread), or a tuple of them
    inputs: object = "some"
    blocks: tuple = ()  # the kernel mask in tiles of (filters, channels), half of them live
    constants: tuple = ()  # live filters, none of whose kernels is
    seed: int = 0

    def __str__(self):
        text = f"n{self.n}c{self.c}h{self.h}w{self.w}k{self.k}r{self.r}s{self.s}"
        for letter, value, usual in (("st", self.stride, 1), ("p", self.padding, 0), ("d", self.dilation, 1)):
            text += f"{letter}{value[0]}x{value[1]}" if value != (usual, usual) else ""
        for letter, live in (("k", self.filters), ("c", self.inputs)):
            text += f"-{letter}:{f'{live[0]}..{live[-1]}of{len(live)}' if isinstance(live, tuple) else live}"
        text += f"-blocks{self.blocks[0]}x{self.blocks[1]}" if self.blocks else ""
        return text + (f"-constants{len(self.constants)}" if self.constants else "")

    @property
    def geometry(self):
        return self.stride, self.padding, self.dilation

    def sizes(self) -> np.ndarray:
        P, Q = arrays.out_size((self.n, self.c, self.h, self.w), (self.k, self.c, self.r, self.s), *self.geometry)
        return np.array(
            [self.n, self.c, self.h, self.w, self.k, self.r, self.s, P, Q, 1]
            + [*self.stride, *self.padding, *self.dilation],
            np.int64,
        )

    def masks(self, rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """filters [K], kernels [K, C] and inputs [C]; kernels with those of dead filters and inputs taken out"""
        filters, inputs = _live(rng, self.filters, self.k), _live(rng, self.inputs, self.c)
        kernels = np.ones((self.k, self.c), bool)
        if self.blocks:
            rows, columns = self.blocks
            tiles = rng.random((-(-self.k // rows), -(-self.c // columns))) < 0.5
            kernels = np.repeat(np.repeat(tiles, rows, 0), columns, 1)[: self.k, : self.c]
        filters[list(self.constants)] = True
        kernels[list(self.constants)] = False
        return filters, kernels & filters[:, None] & inputs[None], inputs


def _live(rng, which, count: int) -> np.ndarray:
    live = np.zeros(count, bool)
    if which == "all":
        live[:] = True
    elif which == "some":
        live[:] = rng.random(count) < 0.6
    elif which == "runs":
        live[:] = np.repeat(rng.random(-(-count // 8)) < 0.6, 8)[:count]
        live[:8] = True
    elif isinstance(which, int):
        live[rng.permutation(count)[:which]] = True
    elif which != "none":
        live[list(which)] = True
    return live


class Lists:
    """What a mask table says of one side."""

    def __init__(self, live: np.ndarray, constant: np.ndarray, lib, element: str):
        self.index = np.flatnonzero(live).astype(np.int32)
        self.slot = np.where(constant, CONSTANT, DEAD).astype(np.int32)
        self.slot[self.index] = np.arange(len(self.index))
        self.index, self.slot = arrays.guarded(self.index), arrays.guarded(self.slot)
        vectors = np.zeros(1, bool)
        code = ELEMENTS.index(element)
        lib.call("pk_list_is_vectors", self.index, len(self.index), len(live), code, vectors)
        size = _vector(element)
        runs = self.index.reshape(-1, size) if len(self.index) % size == 0 and len(live) % size == 0 else None
        expected = runs is not None and bool((runs == runs[:, :1] // size * size + np.arange(size)).all())
        assert bool(vectors[0]) == expected, "list_is_vectors"
        self.vectors = expected

    @property
    def live(self) -> int:
        return len(self.index)


def _tile_lists(lib, masks, of_filters: bool, tile: int, chunk: int):
    filters, kernels, inputs = masks
    K, C = kernels.shape
    first = np.zeros(K + C + 2, np.int32)
    chunks, counts = np.zeros((K + 1) * (C + 1), np.int32), np.zeros(3, np.int64)
    lib.call("pk_tile_lists", filters, kernels, inputs, K, C, of_filters, tile, chunk, first, chunks, counts)
    tiles, listed, longest = (int(count) for count in counts)
    return arrays.guarded(first[: tiles + 1]), arrays.guarded(chunks[:listed]), longest


def _data(rng, shape, exact: bool) -> np.ndarray:
    return arrays.integers(rng, shape) if exact else rng.standard_normal(shape).astype(np.float32)


def _held(values, element: str) -> np.ndarray:
    """The numbers that the kernel multiplies."""
    if element == "tf32":
        return arrays.round_to_tf32(values)
    return arrays.widen(arrays.narrow(values, element), element)


def _storage(element: str) -> str:
    return "f32" if element == "tf32" else element


def _compare(result, expected, element: str, exact: bool):
    stored = arrays.widen(result, element)
    if exact:
        np.testing.assert_array_equal(stored, arrays.widen(arrays.narrow(expected, element), element))
    else:
        step = {"bf16": 2**-8, "f16": 2**-10}.get(element, 2**-20)
        np.testing.assert_allclose(stored, expected, rtol=step, atol=step * np.abs(expected).max(initial=1e-30))


@dataclass(frozen=True)
class Conv:
    """igemm_fwd, igemm_grad_input and their block_sparse kin."""

    problem: Problem
    element: str
    grad_input: bool
    tile: int
    bias: bool = False
    listed: bool = False
    exact: bool = True
    plain: str = ""  # identity: no lists at all; elements: whatever the lists are

    def __str__(self):
        pixels, channels = TILES[self.tile]
        notes = [f"m{pixels}n{channels}", *(["bias"] if self.bias else []), *([] if self.exact else ["random"])]
        return "-".join([str(self.problem), *notes, *([self.plain] if self.plain else [])])

    def run(self, lib):
        p, store = self.problem, lambda values: arrays.narrow(values, self.element)
        rng = np.random.default_rng(p.seed)
        masks = filters, kernels, inputs = p.masks(rng)
        live_out, live_in = kernels.any(1), kernels.any(0)
        out = Lists(live_out, filters & ~live_out, lib, _storage(self.element))
        into = Lists(live_in, np.zeros(p.c, bool), lib, _storage(self.element))
        x_shape, w_shape = (p.n, p.c, p.h, p.w), (p.k, p.c, p.r, p.s)
        y_shape = (p.n, p.k, *arrays.out_size(x_shape, w_shape, *p.geometry))
        w = np.where(kernels[:, :, None, None], _held(_data(rng, w_shape, self.exact), self.element), 0)
        source, target = (out, into) if self.grad_input else (into, out)

        operand = _held(_data(rng, y_shape if self.grad_input else x_shape, self.exact), self.element)
        alive = np.zeros(operand.shape[1], bool)
        alive[source.index] = True
        given = np.where(alive[None, :, None, None], operand, np.nan)
        operand = np.where(alive[None, :, None, None], operand, 0)
        packed = w.transpose(1, 2, 3, 0) if self.grad_input else w.transpose(0, 2, 3, 1)
        packed = packed[target.index][..., source.index]
        packed = np.pad(packed, [(0, 0)] * 3 + [(0, _packed(source.live) - source.live)])
        if self.grad_input:
            expected = arrays.conv2d_grad_input(operand, w, x_shape, *p.geometry)
            bias = None
        else:
            bias = _held(_data(rng, p.k, self.exact), self.element) if self.bias else None
            expected = arrays.conv2d(operand, w, *p.geometry)
            if self.bias:
                expected += np.where(filters, bias, 0)[None, :, None, None]
                bias = store(np.where(filters, bias, np.nan))
        result = arrays.poison(arrays.nhwc(expected).shape, self.element)
        lists = (None, None, 0)
        if self.listed:
            lists = _tile_lists(lib, masks, not self.grad_input, TILES[self.tile][1], _vector(self.element))
        identity = self.plain == "identity"
        lib.call(
            "pk_igemm",
            self.grad_input,
            p.sizes(),
            ELEMENTS.index(_storage(self.element)),
            self.element == "tf32",
            self.tile,
            store(arrays.nhwc(given)),
            given.shape[1],
            source.live,
            None if identity else source.index,
            source.vectors and self.plain != "elements",
            store(packed),
            bias,
            result,
            expected.shape[1],
            target.live,
            None if identity else target.index,
            None if identity else target.slot,
            *lists,
        )
        _compare(result, arrays.nhwc(expected), self.element, self.exact)


@dataclass(frozen=True)
class GradWeight:
    """igemm_grad_weight and block_sparse_grad_weight."""

    problem: Problem
    element: str
    tile: int
    splits: int = 1
    listed: bool = False
    exact: bool = True

    def __str__(self):
        notes = [f"m{GRAD_TILES[self.tile]}", f"splits{self.splits}", *([] if self.exact else ["random"])]
        return "-".join([str(self.problem), *notes])

    def run(self, lib):
        p, store = self.problem, lambda values: arrays.narrow(values, self.element)
        rng = np.random.default_rng(p.seed)
        masks = _, kernels, _ = p.masks(rng)
        out = Lists(kernels.any(1), np.zeros(p.k, bool), lib, _storage(self.element))
        into = Lists(kernels.any(0), np.zeros(p.c, bool), lib, _storage(self.element))
        x_shape, w_shape = (p.n, p.c, p.h, p.w), (p.k, p.c, p.r, p.s)
        y_shape = (p.n, p.k, *arrays.out_size(x_shape, w_shape, *p.geometry))
        x = _held(_data(rng, x_shape, self.exact), self.element)
        grad = _held(_data(rng, y_shape, self.exact), self.element)
        given_x, given_grad = np.full_like(x, np.nan), np.full_like(grad, np.nan)
        given_x[:, into.index], given_grad[:, out.index] = x[:, into.index], grad[:, out.index]
        full = arrays.conv2d_grad_weight(grad, x, w_shape, *p.geometry)
        expected = full.transpose(0, 2, 3, 1)[out.index][..., into.index]  # [filters, R, S, channels]
        live = np.broadcast_to(kernels[out.index][:, None, None, into.index], expected.shape)

        packed = _packed(into.live)
        partial = arrays.poison((self.splits, out.live, p.r, p.s, packed))
        lists = (None, None, 0)
        if self.listed:
            lists = _tile_lists(lib, masks, True, GRAD_TILES[self.tile], _vector(self.element))
        lib.call(
            "pk_igemm_grad_weight",
            p.sizes(),
            ELEMENTS.index(_storage(self.element)),
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
        _compare(np.float32(total[live]), expected[live], "f32", self.exact)


def _around(value: int) -> tuple[int, int, int]:
    return value - 1, value, value + 1


def _convolutions() -> list[Problem]:
    """Every way a convolution walks: taps, classes, vectors of channels about a chunk."""
    taps = Problem(n=2, c=40, k=40, r=3, s=3, padding=(1, 1))
    return [
        taps,
        replace(taps, filters="all", inputs="all"),
        replace(taps, filters="runs", inputs="runs", constants=(9, 39)),
        replace(taps, stride=(2, 2), h=7, w=8),
        replace(taps, stride=(2, 3), h=9, w=8, c=8, inputs="all"),
        replace(taps, stride=(3, 2), r=2, s=1, padding=(0, 1), h=8, w=5),  # classes without a tap
        replace(taps, dilation=(2, 2), padding=(2, 1), h=7),
        replace(taps, stride=(2, 2), dilation=(2, 3), padding=(2, 3), h=9, w=9),  # every other class has no tap
        replace(taps, r=1, s=3, padding=(0, 1), k=17),
        replace(taps, padding=(3, 4), h=3, w=2),  # outputs that no pixel reaches
        replace(taps, padding=(0, 0), h=3, w=3, n=3),  # one pixel each
        replace(taps, r=7, s=7, padding=(3, 3), stride=(2, 2), c=3, k=8, inputs="all", h=9, w=9),
        replace(taps, stride=(8, 8), padding=(0, 0), r=3, s=3, h=12, w=11),
    ]


def _channels(element: str) -> list[Problem]:
    chunk = 4 * _vector(element)
    counts = sorted({1, 2, *_around(_vector(element)), *_around(chunk), 3 * chunk, 5 * chunk + 1})
    problems = [Problem(c=count + 7, inputs=count, h=2, w=9) for count in counts]
    problems += [Problem(k=count + 7, filters=count, h=2, w=9) for count in counts]  # the input gradient's operand
    problems += [Problem(c=1, k=1, inputs="all", filters="all"), Problem(n=0), Problem(h=0), Problem(c=64, k=9)]
    problems += [Problem(filters=f, inputs=i) for f, i in (("none", "all"), ("all", "none"), ("all", "all"))]
    return problems + [Problem(filters="none", constants=(0, 5, 6, 23)), Problem(k=25, c=27), Problem(k=25, c=25)]


def _tile_edges(element: str, grad_input: bool, tiles) -> list[Conv]:
    """Pixels, result channels and the ranges of the full width about each tile."""
    cases = []
    for tile in tiles:
        pixels, channels = TILES[tile]
        for count in _around(pixels):
            cases.append(Conv(Problem(h=1, w=count, c=9, k=9), element, grad_input, tile))
        for count in (*_around(channels), 2 * channels + 1):
            wide = {"c" if grad_input else "k": 2 * count + 3, "inputs" if grad_input else "filters": count}
            cases.append(Conv(Problem(h=3, w=2, **wide), element, grad_input, tile))
        # few live in many: one block writes a wide range; ranges that begin and end inside a vector
        spread = (0, 1, 900, *range(1000, 1000 + channels))
        sides = {"c": 1200, "k": 8, "inputs": spread} if grad_input else {"k": 1200, "c": 8, "filters": spread}
        cases.append(Conv(Problem(h=1, w=3, **sides), element, grad_input, tile))
    return cases


def _of(element: str, grad_input: bool) -> list[Conv]:
    cases = _tile_edges(element, grad_input, (0, 1, 2))
    for i, problem in enumerate(_convolutions()):
        cases.append(Conv(problem, element, grad_input, i % 3, bias=i % 2 == 0 and not grad_input))
    cases += [Conv(problem, element, grad_input, 2, bias=not grad_input) for problem in _channels(element)]
    everything = Problem(n=2, c=40, k=40, r=3, s=3, padding=(1, 1), filters="all", inputs="all")
    for tile in range(3):
        cases.append(Conv(everything, element, grad_input, tile, plain="identity"))
        cases.append(Conv(everything, element, grad_input, tile, plain="elements"))
        cases.append(Conv(replace(everything, filters="runs", inputs="runs"), element, grad_input, tile, exact=False))
    return cases


def _sparse(element: str, grad_input: bool) -> list[Conv]:
    cases = []
    for tile in (1, 2):
        channels = TILES[tile][1]
        for blocks in ((channels, 16), (8, 8), (channels, 1), (5, 3)):
            masked = Problem(c=2 * channels + 5, k=2 * channels + 9, h=2, w=5, blocks=blocks, filters="all")
            if grad_input:
                masked = replace(masked, blocks=blocks[::-1])
            cases += [
                Conv(masked, element, grad_input, tile),
                Conv(replace(masked, inputs="all"), element, grad_input, tile),
            ]
        for problem in _convolutions()[:8]:
            problem = replace(problem, blocks=(16, 8), inputs="all", filters="all")
            cases.append(Conv(problem, element, grad_input, tile, bias=not grad_input))
    nothing = Problem(blocks=(8, 8), filters="none")
    return cases + [
        Conv(nothing, element, grad_input, 2),
        Conv(replace(nothing, filters="all", constants=(1,)), element, grad_input, 2),
    ]


def _grad_weights(element: str) -> list[GradWeight]:
    chunk = 4 * _vector(element)
    cases = []
    for tile, side in enumerate(GRAD_TILES):
        cases += [GradWeight(Problem(k=n + 5, filters=n, c=9, h=2, w=3), element, tile) for n in _around(side)]
        cases += [GradWeight(Problem(c=n + 5, inputs=n, k=9, h=2, w=3), element, tile) for n in _around(side)]
        cases += [GradWeight(Problem(h=1, w=n), element, tile) for n in (1, *_around(chunk), *_around(4 * chunk))]
        for filters in ("all", "some"):
            for inputs in ("all", "some"):
                problem = Problem(n=2, c=24, k=40, r=3, s=3, padding=(1, 1), filters=filters, inputs=inputs)
                cases += [GradWeight(problem, element, tile, splits) for splits in (1, 3)]
                cases.append(GradWeight(problem, element, tile, 2, exact=False))
    for i, problem in enumerate(_convolutions()):
        cases.append(GradWeight(replace(problem, constants=()), element, i % 2, 1 + i % 3))
    empty = [
        Problem(filters="none"),
        Problem(inputs="none"),
        Problem(n=0),
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
        for problem in _convolutions()[:8]:
            problem = replace(problem, blocks=(16, 8), inputs="all", filters="all", constants=())
            cases.append(GradWeight(problem, element, tile, 2, True))
    return cases + [GradWeight(Problem(blocks=(8, 8), filters="none"), element, 1, 1, True)]


class HostTileLists:
    """filter_tile_lists and channel_tile_lists against a search of the mask."""

    def __str__(self):
        return "tile-lists"

    def run(self, lib):
        for seed in range(20):
            rng = np.random.default_rng(seed)
            K, C = (int(count) for count in rng.integers(1, 40, 2))
            tile, chunk = int(rng.integers(1, 12)), int(rng.integers(1, 12))
            filters, inputs, kernels = rng.random(K) < 0.8, rng.random(C) < 0.8, rng.random((K, C)) < rng.random()
            live = kernels & filters[:, None] & inputs
            compact = live[live.any(1)][:, live.any(0)]
            for of_filters in (True, False):
                first, chunks, longest = _tile_lists(lib, (filters, kernels, inputs), of_filters, tile, chunk)
                table = compact if of_filters else compact.T
                expected = [
                    [
                        j
                        for j in range(-(-table.shape[1] // chunk))
                        if table[i : i + tile, j * chunk : (j + 1) * chunk].any()
                    ]
                    for i in range(0, table.shape[0], tile)
                ] or [[]]
                found = [list(chunks[first[i] : first[i + 1]]) for i in range(len(first) - 1)]
                assert found == expected, f"seed {seed}"
                assert longest == max(map(len, expected))


class HostChoices:
    """What is served, and which tiles and splits are taken."""

    def __str__(self):
        return "choices"

    def run(self, lib):
        serves = np.zeros(1, bool)
        for change, expected in (
            ({}, True),
            ({"stride": (8, 1)}, True),
            ({"stride": (1, 9)}, False),
            ({"h": 1 << 14}, True),
            ({"h": (1 << 14) + 1}, False),
            ({"n": 1 << 27}, False),
            ({"k": 1 << 16, "c": 1 << 16}, False),
        ):
            lib.call("pk_igemm_serves", replace(Problem(), **change).sizes(), serves)
            assert serves[0] == expected, change
        grouped = Problem().sizes()
        grouped[9] = 2
        lib.call("pk_igemm_serves", grouped, serves)
        assert not serves[0]

        tile = np.zeros(1, np.int32)
        for pixels, channels, block, expected in (
            (1 << 20, 512, 0, 0),
            (1 << 20, 64, 0, 1),
            (1 << 20, 20, 0, 2),
            (49, 512, 0, 2),
            (1 << 20, 512, 64, 1),
            (1 << 20, 512, 32, 2),
            (1 << 20, 512, 16, 2),
            (0, 0, 0, 0),
        ):
            lib.call("pk_igemm_tile", pixels, channels, block, 132, tile)
            assert tile[0] == expected, (pixels, channels, block, tile[0])

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
    """Lists that are missing, a tile that kernels with lists do not have, a misaligned weight, too large a stride."""

    def __str__(self):
        return "refused"

    def run(self, lib):
        one = arrays.guarded(np.zeros(64, np.int32))
        sizes = Problem().sizes()
        wide = replace(Problem(), stride=(9, 1), h=20).sizes()
        for tile, weight, lists, problem in (
            (0, one, one, sizes),
            (2, one[1:], None, sizes),
            (2, one, None, wide),
        ):
            status, _ = lib.status(
                "pk_igemm",
                False,
                problem,
                1,
                False,
                tile,
                one,
                24,
                1,
                one,
                False,
                weight,
                None,
                one,
                24,
                1,
                one,
                one,
                lists,
                one,
                1,
            )
            assert status == 1


ROWS = ("bf16", "f16", "tf32", "f32")
CASES: dict[str, list] = {
    **{f"igemm_fwd_{e}_sm80": _of(e, False) for e in ROWS},
    **{f"igemm_grad_input_{e}_sm80": _of(e, True) for e in ROWS},
    **{f"igemm_grad_weight_{e}_sm80": _grad_weights(e) for e in ROWS},
    **{f"block_sparse_fwd_{e}_sm80": _sparse(e, False) for e in ROWS},
    **{f"block_sparse_grad_input_{e}_sm80": _sparse(e, True) for e in ROWS},
    **{f"block_sparse_grad_weight_{e}_sm80": _sparse_grad_weights(e) for e in ROWS},
}
CASES["igemm_fwd_bf16_sm80"] += [HostChoices(), Refused()]
CASES["block_sparse_fwd_bf16_sm80"].append(HostTileLists())
