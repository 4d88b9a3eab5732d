"""The choices of the igemm host code: tile lists, which lists are made of vectors, which problems and tiles."""

from dataclasses import replace

import numpy as np

from .igemm_problems import ELEMENTS, Problem, chunks_of_tiles, list_is_vectors, vector_channels


class HostTileLists:
    """filter_tile_lists and channel_tile_lists against a search of the mask."""

    def __str__(self):
        return "tile-lists"

    def run(self, lib):
        for seed in range(40):
            rng = np.random.default_rng(seed)
            K, C = (int(count) for count in rng.integers(1, 40, 2))
            tile, chunk = int(rng.integers(1, 12)), int(rng.integers(1, 12))
            filters, inputs = rng.random(K) < 0.8, rng.random(C) < 0.8
            kernels = rng.random((K, C)) < (0.0, 1.0, rng.random())[min(seed, 2)]
            live = kernels & filters[:, None] & inputs
            for of_filters in (True, False):
                operands = live.any(0 if of_filters else 1).sum()
                all_chunks = -(-operands // chunk)
                first, chunks = np.zeros(K + C + 2, np.int32), np.zeros((K + 1) * (C + 1), np.int32)
                counts, share, masks = np.zeros(3, np.int64), np.zeros(1), (filters, kernels, inputs)
                lib.call(
                    "pk_tile_lists", *masks, K, C, of_filters, tile, chunk, first, chunks, counts, all_chunks, share
                )
                expected = chunks_of_tiles(live, of_filters, tile, chunk)
                tiles, listed, longest = counts
                assert tiles == len(expected) and first[tiles] == listed and longest == max(map(len, expected))
                assert [list(chunks[a:b]) for a, b in zip(first[:tiles], first[1:], strict=False)] == expected, seed
                np.testing.assert_allclose(share, listed / (tiles * all_chunks) if all_chunks else 0)


class HostVectors:
    """list_is_vectors() of runs that are cut, shifted or short, and without a list."""

    def __str__(self):
        return "vectors"

    def run(self, lib):
        answer = np.zeros(1, bool)
        for element in ELEMENTS:
            size = vector_channels(element)
            for channels in (4 * size, 4 * size + 1):
                for index in (
                    [],
                    range(size),
                    range(size, 3 * size),
                    [*range(size), *range(2 * size, 3 * size)],
                    range(size - 1),
                    range(1, size + 1),
                    [*range(size - 1), size],
                    [*range(size), *range(size + 1, 2 * size + 1)],
                ):
                    index = np.array(index, np.int32)
                    lib.call("pk_list_is_vectors", index, len(index), channels, ELEMENTS.index(element), answer)
                    assert answer[0] == list_is_vectors(index, channels, element), (element, channels, index)
                lib.call("pk_list_is_vectors", None, channels, channels, ELEMENTS.index(element), answer)
                assert answer[0] == (channels % size == 0)


class HostChoices:
    """igemm_serves(), igemm_tile() and block_sparse_tile()."""

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
            ({"k": 46208, "c": 46208}, True),  # the last rows of a tile that begins before them, in 32 bits
            ({"k": 46216, "c": 46216}, False),
            ({"k": 0, "c": (1 << 28) + 1}, False),
            ({"r": 15, "s": 15, "padding": (7, 7)}, True),  # a bit of a pixel for each
            ({"r": 16, "padding": (8, 0)}, False),
            ({"s": 16, "padding": (0, 8)}, False),
        ):
            lib.call("pk_igemm_serves", replace(Problem(), **change).sizes(), serves)
            assert serves[0] == expected, change
        grouped = Problem().sizes()
        grouped[9] = 2
        lib.call("pk_igemm_serves", grouped, serves)
        assert not serves[0]

        tile = np.zeros(1, np.int32)
        for pixels, channels, block, single_warps, warpgroups in (  # the tiles with vectors, and with elements
            (1 << 20, 512, 0, (0, 0), (3, 3)),
            (1 << 20, 64, 0, (1, 1), (1, 3)),
            (1 << 20, 20, 0, (1, 1), (1, 3)),
            (25088, 20, 0, (2, 2), (2, 2)),  # 14 x 14, batch 128: few blocks
            (25088, 256, 0, (0, 0), (3, 3)),
            (6272, 128, 0, (2, 0), (2, 0)),  # 7 x 7
            (49, 512, 0, (2, 2), (2, 2)),
            (1 << 20, 512, 64, (1, 1), (1, 1)),
            (1 << 20, 512, 32, (2, 2), (2, 2)),
            (1 << 20, 512, 16, (2, 2), (2, 2)),
        ):
            for has_warpgroups, expected in ((False, single_warps), (True, warpgroups)):
                for by_vectors, one in zip((True, False), expected, strict=True):
                    lib.call("pk_igemm_tile", pixels, channels, by_vectors, block, 132, has_warpgroups, tile)
                    assert tile[0] == one, (pixels, channels, block, by_vectors, has_warpgroups, tile[0])
        lib.call("pk_igemm_tile", 0, 0, True, 0, 132, True, tile)
