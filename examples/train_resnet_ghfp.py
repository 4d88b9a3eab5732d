"""Trains ResNet-20 on scikit-learn's digits while GHFP prunes half of its filters. Needs scikit-learn.

python examples/train_resnet_ghfp.py --epochs 20
"""

import argparse

import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import prunekernels as pk
from prunekernels.train.models import resnet20


def digits(size: int) -> tuple[TensorDataset, TensorDataset]:
    """Training and test images, float32 [1, size, size], with their labels."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=(size, size), mode="bilinear") - 0.5
    labels = torch.tensor(found.target)
    test = torch.arange(len(labels)) % 5 == 0
    return TensorDataset(images[~test], labels[~test]), TensorDataset(images[test], labels[test])


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    images, labels = data.tensors
    model.eval()
    right = [(model(x).argmax(1) == y) for x, y in zip(images.split(64), labels.split(64), strict=True)]
    model.train()
    return float(torch.cat(right).float().mean())


def main(arguments: list[str] | None = None) -> tuple[nn.Module, Tensor]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    given = parser.parse_args(arguments)

    train, test = digits(given.size)
    model = resnet20(in_channels=1)
    pk.convert(model)
    pk.flow(model)
    optimizer = pk.optim.MaskedSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, given.epochs)
    example = train.tensors[0][:2]
    method = pk.methods.GHFP(
        model, optimizer, given.rate, given.epochs, duty=0.1, coupling="joint", example_input=example
    )
    for epoch in range(given.epochs):
        for x, y in DataLoader(train, given.batch, shuffle=True, drop_last=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            method.step()
        method.end_epoch()
        schedule.step()
        with method.masked():
            print(f"epoch {epoch}: accuracy {accuracy(model, test):.4f}, {method}")
    print(pk.count_flops(model, example))
    return model, example


if __name__ == "__main__":
    main()
