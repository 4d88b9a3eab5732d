"""Masks half of the filters of one convolution, and shows what that saves.

python examples/prune_one_layer.py
"""

import argparse
import time

import torch
from torch import Tensor, nn

import prunekernels as pk


def milliseconds(layer: nn.Module, x: Tensor, rounds: int) -> float:
    """Least time of forward and backward; the first rounds are a warm-up."""
    times = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        layer(x).sum().backward()
        times.append(time.perf_counter() - start)
    return 1000 * min(times[2:])


def main(arguments: list[str] | None = None) -> pk.MaskedConv2d:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args(arguments)

    layer = pk.MaskedConv2d(given.channels, given.channels, 3, padding=1)
    x = torch.randn(8, given.channels, given.size, given.size)
    dense = milliseconds(layer, x, given.rounds)  # nothing is dead: a plain nn.Conv2d

    lengths = layer.weight.detach().flatten(1).norm(dim=1)
    layer.set_masks(filter=lengths > lengths.median())
    masked = milliseconds(layer, x, given.rounds)
    print(f"{layer}\nplans: {layer.plan}\nforward and backward: {dense:.2f} ms dense, {masked:.2f} ms masked")
    return layer


if __name__ == "__main__":
    main()
