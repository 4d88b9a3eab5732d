"""Prunes half of a ResNet-20's filters by their length, shrinks it to plain layers, and exports it.

python examples/shrink_and_export.py --out small.pt2
python examples/shrink_and_export.py --out small.onnx     # needs onnx and onnxscript
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import prunekernels as pk
from prunekernels.train.models import resnet20


def prune(model: nn.Module, images: torch.Tensor, rate: float) -> None:
    """Masks the shortest filters; those that meet in an addition by the sum of their lengths."""
    pk.convert(model)
    for group in pk.coupled_groups(model, images):
        lengths = {name: model.get_parameter(f"{name}.weight").flatten(1).norm(dim=1) for name in group.layers}
        scores = group.combine(lengths)
        group.set_masks(model, scores.argsort().argsort() >= round(rate * group.width))


def main(arguments: list[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("small.pt2"))
    given = parser.parse_args(arguments)

    model, images = resnet20(), torch.randn(2, 3, given.size, given.size)
    prune(model, images, given.rate)
    small = pk.shrink(model.eval(), images)
    batch = ({0: torch.export.Dim.DYNAMIC},)
    if given.out.suffix == ".onnx":
        torch.onnx.export(small, (images,), given.out, dynamo=True, dynamic_shapes=batch, verbose=False)
    else:
        torch.export.save(torch.export.export(small, (images,), dynamic_shapes=batch), given.out)
    counts = [sum(p.numel() for p in network.parameters()) for network in (model, small)]
    print(f"{counts[1]:,} of {counts[0]:,} parameters are left, in {given.out}")
    return small


if __name__ == "__main__":
    main()
