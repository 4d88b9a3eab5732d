"""Small folders in the file format of MNIST."""

import gzip
import math
import struct

import numpy as np


def idx_bytes(values, type_byte=8, shape=None):
    """The file of an array; shape: what the file claims, if that is something else."""
    shape = values.shape if shape is None else shape
    return bytes((0, 0, type_byte, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + values.tobytes()


def idx_values(count, shape, classes=4, seed=0):
    """Random images uint8 [count, *shape], and labels uint8 [count] that take turns."""
    images = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
    return images, (np.arange(count) % classes).astype(np.uint8)


def write_idx(folder, shape=(8, 6), counts=(24, 8), classes=4, packed=True, names=("train-{}-idx", "t10k-{}-idx")):
    """Writes the four files and returns what they hold, by part and kind."""
    folder.mkdir(parents=True, exist_ok=True)
    held = {}
    for seed, (part, name, count) in enumerate(zip(("train", "test"), names, counts, strict=True)):
        for what, values in zip(("images", "labels"), idx_values(count, shape, classes, seed), strict=True):
            held[part, what] = values
            raw = idx_bytes(values)
            path = folder / f"{name.format(what)}{values.ndim}-ubyte{'.gz' * packed}"
            path.write_bytes(gzip.compress(raw, 1) if packed else raw)
    return held


def claims(*shape):
    """A file of no bytes that claims sizes, and how many bytes that would be."""
    return idx_bytes(np.zeros(0, np.uint8), shape=shape), math.prod(shape)
