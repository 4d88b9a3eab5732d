"""Trains a small single-shot detector on canvases of Fashion-MNIST items while PGP prunes its backbone and neck.

python examples/detect_fashion.py --seeds 0 1 2 --md detect.md

Beside it train the dense detector and, from new weights, the small one that PGP ends with ("scratch").
"""

import copy
import time
from collections.abc import Iterator
from functools import partial

import torch
from fashion.boxes import Boxes, Objects, iou, mean_average_precision, suppress
from fashion.canvases import SIDE, Canvases
from fashion.comparison import Row, compare, items, parser, row
from torch import Tensor, nn
from torch.nn import functional as F

import prunekernels as pk

LEARNING_RATE = 0.1
STRIDE = 4  # pixels of a cell of the map on which the heads work


def block(inputs: int, filters: int, size: int = 3, stride: int = 1) -> nn.Module:
    conv = nn.Conv2d(inputs, filters, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(filters), nn.ReLU())


class Detector(nn.Module):
    """Gives for each of 16x16 cells the logits of ten classes, and the distances from its middle to a box's edges.

    The backbone's maps of 16x16 and 8x8 meet in the neck, where the coarse one is added to the fine one.
    """

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.fine = nn.Sequential(
            block(1, width, stride=2), block(width, 2 * width, stride=2), block(2 * width, 2 * width)
        )
        self.coarse = nn.Sequential(block(2 * width, 4 * width, stride=2), block(4 * width, 4 * width))
        self.from_fine, self.from_coarse = block(2 * width, 2 * width, 1), block(4 * width, 2 * width, 1)
        self.neck = block(2 * width, 2 * width)
        self.classes, self.edges = nn.Conv2d(2 * width, 10, 3, padding=1), nn.Conv2d(2 * width, 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.fine(x)
        coarse = F.interpolate(self.from_coarse(self.coarse(fine)), scale_factor=2.0)
        x = self.neck(self.from_fine(fine) + coarse)
        return self.classes(x), F.softplus(self.edges(x))


def boxes_of(edges: Tensor) -> Boxes:
    """The boxes [N, cells, 4], in pixels, of the detector's distances."""
    at = STRIDE * (torch.arange(edges.shape[2]) + 0.5)
    y, x = torch.meshgrid(at, at, indexing="ij")
    middle = torch.stack([x, y, x, y], 2).flatten(0, 1)
    return middle + STRIDE * edges.flatten(2).transpose(1, 2) * torch.tensor([-1, -1, 1, 1])


def loss_of(outputs: tuple[Tensor, Tensor], labels: Tensor, boxes: Boxes) -> Tensor:
    """Focal loss over classes, and 1 - GIoU over the cells in the middle of a box.

    Of several boxes a cell belongs to the smallest; its middle are the cells of its inner half.
    """
    logits, predicted = outputs[0].flatten(2).transpose(1, 2), boxes_of(outputs[1])
    middle = boxes_of(torch.zeros_like(outputs[1][:1]))[0, :, :2]
    centre, half = (boxes[..., 2:] + boxes[..., :2]) / 2, (boxes[..., 2:] - boxes[..., :2]) / 2
    reach = (half / 2).clamp(min=STRIDE / 2)
    inside = ((middle[:, None] - centre[:, None]).abs() <= reach[:, None]).all(3) & (labels >= 0)[:, None]
    area, owner = torch.where(inside, 4 * half.prod(2)[:, None], torch.inf).min(2)  # [N, cells]
    has_object = area.isfinite()
    rows, cells = has_object.nonzero(as_tuple=True)
    owners = owner[rows, cells]

    target = torch.zeros_like(logits)
    target[rows, cells, labels[rows, owners]] = 1
    wrong = (logits.sigmoid() - target).abs()
    weight = wrong.square() * (0.25 * target + 0.75 * (1 - target))
    focal = (weight * F.binary_cross_entropy_with_logits(logits, target, reduction="none")).sum()
    a, b = predicted[rows, cells], boxes[rows, owners]
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(1)
    shared = iou(a, b)
    areas = sum((box[:, 2:] - box[:, :2]).prod(1) for box in (a, b))
    union = areas / (1 + shared)
    giou = shared - (hull - union) / hull.clamp(min=1e-6)
    return (focal + (1 - giou).sum()) / max(1, len(rows))


@torch.no_grad()
def detect(model: nn.Module, images: Tensor, best: int = 40) -> list[Objects]:
    """What the detector finds in each image: boxes, labels, scores."""
    logits, edges = model(images)
    scores, labels = logits.sigmoid().flatten(2).max(1)
    boxes = boxes_of(edges)
    found: list[Objects] = []
    for image, cells in enumerate(scores.topk(min(best, scores.shape[1])).indices):
        objects = boxes[image, cells], labels[image, cells], scores[image, cells]
        kept = suppress(*objects)
        found.append((objects[0][kept], objects[1][kept], objects[2][kept]))
    return found


def new_weights(model: nn.Module) -> nn.Module:
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    nn.init.constant_(model.get_parameter("classes.bias"), -4.0)  # at first nearly no cell has an object
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types lack it
    return model


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, canvases: list[Canvases], batch: int,
    method: pk.methods.Method | None = None,
) -> float:  # fmt: skip
    """Trains an epoch on each of the canvases. Returns the seconds of the training steps and of pruning."""
    steps = len(canvases[0]) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, len(canvases) * steps, pct_start=0.1, cycle_momentum=False
    )
    seconds = 0.0
    for epoch in canvases:
        for rows in torch.arange(steps * batch).split(batch):
            images = epoch.images(rows)
            begun = time.process_time()
            optimizer.zero_grad()
            loss_of(model(images), epoch.labels[rows], epoch.boxes[rows]).backward()
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


def precision(model: nn.Module, canvases: Canvases) -> float:
    model.eval()
    found = [
        objects for rows in torch.arange(len(canvases)).split(100) for objects in detect(model, canvases.images(rows))
    ]
    return mean_average_precision(found, canvases.objects())


def main(arguments: list[str] | None = None) -> list[Row]:
    arguments_of = parser(__doc__, epochs=8)
    arguments_of.add_argument("--canvases", type=int, default=3000, help="an epoch")
    arguments_of.add_argument("--batch", type=int, default=32)
    given = arguments_of.parse_args(arguments)
    if given.tiny:
        given.epochs, given.canvases, given.batch = 3, 8, 4
    if given.canvases < given.batch:
        arguments_of.error(f"--canvases: expected at least {given.batch}, a batch, got {given.canvases}")
    own, others = items(given)
    scored = Canvases(others, 8 if given.tiny else 1000, seed=1)
    example = torch.randn(2, 1, SIDE, SIDE)

    def rows_of(seed: int) -> Iterator[Row]:
        canvases = [Canvases(own, given.canvases, seed=1000 * (seed + 1) + epoch) for epoch in range(given.epochs)]
        sgd = partial(torch.optim.SGD, lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4)
        torch.manual_seed(seed)
        model = new_weights(Detector())
        before = copy.deepcopy(model)
        seconds = train(model, sgd(model.parameters()), canvases, given.batch)
        yield row("dense", seed, precision(model, scored), seconds, model, example)

        model = before  # the same weights to begin with
        pk.convert(model)
        pk.flow(model)  # live mode: what lies between the convolutions skips dead channels too
        optimizer = pk.optim.MaskedSGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4)
        method = pk.methods.PGP(
            model, optimizer, given.rate, given.epochs, duty=0.1, steps_per_epoch=given.canvases // given.batch,
            coupling="joint", example_input=example,
        )  # fmt: skip
        print(f"not pruned: {method.left_out}")  # the heads: their channels are classes and edges
        seconds = train(model, optimizer, canvases, given.batch, method)
        small = pk.shrink(model.eval(), example)
        yield row("PGP", seed, precision(small, scored), seconds, small, example)

        small = new_weights(small.train())
        seconds = train(small, sgd(small.parameters()), canvases, given.batch)
        yield row("scratch", seed, precision(small, scored), seconds, small, example)

    return compare(given, __doc__, "mAP at IoU 0.5, %", rows_of)


if __name__ == "__main__":
    main()
