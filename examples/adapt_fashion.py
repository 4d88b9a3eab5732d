"""Adapts a classifier, by domain-adversarial training, to items on textures without labels, while PGP prunes it.

python examples/adapt_fashion.py --seeds 0 1 2 --md adapt.md

The source are items of Fashion-MNIST with their labels, the target other items, before smooth textures, without labels.
The accuracy is that on test items before textures. Beside PGP train the dense network without and with the target's
images, and, from new weights, the small network that PGP ends with ("scratch").
"""

import copy
import math
import time
from collections.abc import Iterator
from functools import partial

import torch
from fashion.comparison import Row, compare, items, parser, row
from torch import Tensor, nn
from torch.nn import functional as F

import prunekernels as pk
from prunekernels.train.data import Split

LEARNING_RATE = 0.05


def block(inputs: int, filters: int) -> nn.Module:
    conv = nn.Conv2d(inputs, filters, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(filters), nn.ReLU())


def reversed_gradient(x: Tensor, strength: float) -> Tensor:
    """x itself, whose gradient is -strength times what comes in.

    An autograd.Function would do the same, but prunekernels' graph knows none: the filters before it would stay.
    """
    return x.detach() + strength * (x.detach() - x)


class Classifier(nn.Module):
    """Features, and from them the class of an item and, by gradients that reach the features reversed, its domain."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            block(1, width), nn.MaxPool2d(2), block(width, 2 * width), block(2 * width, 2 * width), nn.MaxPool2d(2),
            block(2 * width, 4 * width), block(4 * width, 4 * width), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.classes = nn.Linear(4 * width, 10)
        self.domain = nn.Sequential(nn.Linear(4 * width, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor, strength: float = 0.0) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        return self.classes(features), self.domain(reversed_gradient(features, strength)).flatten()


def new_weights(model: nn.Module) -> nn.Module:
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types lack it
    return model


def plain(images: Tensor) -> Tensor:
    """float32 images [N, 1, 28, 28] with values around 0."""
    return (images / 255 - 0.3) / 0.33


def on_textures(images: Tensor, seed: int) -> Tensor:
    """The same, each image before a smooth random texture of its own."""
    coarse = torch.rand(len(images), 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    texture = F.interpolate(coarse, images.shape[2:], mode="bicubic").clamp(0, 1)
    return plain(255 * (images / 255 - 0.5 * texture).abs())


def augmented(images: Tensor) -> Tensor:
    """All images shifted by the same up to two pixels, and maybe mirrored."""
    down, right, mirror = (int(torch.randint(count, ())) for count in (5, 5, 2))
    height, width = images.shape[2:]
    images = F.pad(images, (2,) * 4, mode="replicate")[:, :, down : down + height, right : right + width]
    return images.flip(3) if mirror else images


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, source: Split, target: Tensor | None, epochs: int, batch: int,
    method: pk.methods.Method | None = None,
) -> float:  # fmt: skip
    """Trains on the source and, if there is one, the target. Returns the seconds of training steps and of pruning."""
    steps = len(source) // batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    is_source = (torch.arange(2 * batch) < batch).float()
    seconds = 0.0
    for epoch in range(epochs):
        orders = (torch.randperm(len(source))[: steps * batch].split(batch) for _ in range(2))
        for step, (ours, theirs) in enumerate(zip(*orders, strict=True)):
            images, labels = augmented(source.images[ours]), source.labels[ours]
            if target is not None:
                images = torch.cat([images, augmented(target[theirs])])
            progress = (epoch * steps + step) / (epochs * steps)
            begun = time.process_time()
            optimizer.zero_grad()
            classes, domain = model(images, 2 / (1 + math.exp(-10 * progress)) - 1)
            loss = F.cross_entropy(classes[:batch], labels)
            if target is not None:
                loss = loss + F.binary_cross_entropy_with_logits(domain, is_source)
            loss.backward()  # the gradients of both losses, by which PGP chooses filters
            optimizer.step()
            if method is not None:
                method.step()
            schedule.step()
            seconds += time.process_time() - begun
        if method is not None:
            begun = time.process_time()
            method.end_epoch()
            seconds += time.process_time() - begun
    return seconds


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = [model(x)[0].argmax(1) == y for x, y in zip(images.split(250), labels.split(250), strict=True)]
    return float(torch.cat(right).float().mean())


def main(arguments: list[str] | None = None) -> list[Row]:
    arguments_of = parser(__doc__, epochs=8)
    arguments_of.add_argument("--images", type=int, default=6400, help="of each domain")
    arguments_of.add_argument("--batch", type=int, default=64, help="images of each domain in a step")
    given = arguments_of.parse_args(arguments)
    if given.tiny:
        given.epochs, given.images, given.batch = 3, 8, 4
    own, others = items(given)
    if given.tiny:
        others = Split(others.images[:8], others.labels[:8])
    count = given.images
    if not given.batch <= count <= len(own) // 2:
        arguments_of.error(f"--images: expected {given.batch} to {len(own) // 2}, half of the items, got {count}")
    source = Split(plain(own.images[:count]), own.labels[:count])
    target = on_textures(own.images[-count:], seed=0)
    scored = on_textures(others.images, seed=1), others.labels
    example = torch.randn(2, 1, *source.images.shape[2:]), 1.0  # images and strength

    def rows_of(seed: int) -> Iterator[Row]:
        run = partial(train, source=source, target=target, epochs=given.epochs, batch=given.batch)
        sgd = partial(torch.optim.SGD, lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
        torch.manual_seed(seed)
        first = new_weights(Classifier())
        for name, images in (("source alone", None), ("dense", target)):
            model = copy.deepcopy(first)
            seconds = run(model, sgd(model.parameters()), target=images)
            yield row(name, seed, accuracy(model, *scored), seconds, model, example)

        model = copy.deepcopy(first)
        pk.convert(model)
        pk.flow(model)  # live mode: what lies between the convolutions skips dead channels too
        optimizer = pk.optim.MaskedSGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
        method = pk.methods.PGP(
            model, optimizer, given.rate, given.epochs, duty=0.1, steps_per_epoch=count // given.batch,
            coupling="joint", example_input=example,
        )  # fmt: skip
        seconds = run(model, optimizer, method=method)
        small = pk.shrink(model.eval(), example)
        yield row("PGP", seed, accuracy(small, *scored), seconds, small, example)

        small = new_weights(small.train())
        seconds = run(small, sgd(small.parameters()))
        yield row("scratch", seed, accuracy(small, *scored), seconds, small, example)

    return compare(given, __doc__, "accuracy on the target, %", rows_of)


if __name__ == "__main__":
    main()
