"""Boxes: how far two overlap, which of them one object needs, and the mean average precision of what was found."""

from collections.abc import Sequence

import torch
from torch import Tensor

Boxes = Tensor  # float32 [..., 4]: left, top, right, bottom, in pixels
Objects = tuple[Boxes, Tensor, Tensor]  # those of one image: [n, 4], int64 labels [n], scores [n]


def iou(a: Boxes, b: Boxes) -> Tensor:
    """Intersection over union; a and b broadcast."""
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    shared = sides.prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1) for box in (a, b)]
    return shared / (areas[0] + areas[1] - shared).clamp(min=1e-6)


def suppress(boxes: Boxes, labels: Tensor, scores: Tensor, threshold: float = 0.5) -> Tensor:
    """Non-maximum suppression: the rows to keep, best first. A box goes if it overlaps a better one of its label."""
    order = scores.argsort(descending=True, stable=True)
    boxes, labels = boxes[order], labels[order]
    clash = (iou(boxes[:, None], boxes) > threshold) & (labels[:, None] == labels)
    kept = torch.ones(len(boxes), dtype=torch.bool)
    for row in range(len(boxes)):
        if kept[row]:
            kept[row + 1 :] &= ~clash[row, row + 1 :]
    return order[kept]


def mean_average_precision(found: Sequence[Objects], true: Sequence[Objects], threshold: float = 0.5) -> float:
    """The mean over the labels of average_precision; both lists have an entry for each image."""
    labels = torch.cat([objects[1] for objects in true]).unique().tolist()
    return sum(average_precision(found, true, label, threshold) for label in labels) / len(labels)


def average_precision(found: Sequence[Objects], true: Sequence[Objects], label: int, threshold: float = 0.5) -> float:
    """The area under precision over recall of one label, at all points, as Pascal VOC has computed it since 2010.

    From the best score on, a box is right if the object of its image that it overlaps most is by more than threshold
    covered, and no better box had that object.
    """
    scores, rights, total = [], [], 0
    for (boxes, labels, confidence), (true_boxes, true_labels, _) in zip(found, true, strict=True):
        mine, objects = labels == label, true_boxes[true_labels == label]
        order = confidence[mine].argsort(descending=True, stable=True)
        scores.append(confidence[mine][order])
        right = torch.zeros(len(order), dtype=torch.bool)
        if len(objects) and len(order):
            overlap, nearest = iou(boxes[mine][order][:, None], objects).max(1)
            is_taken = [False] * len(objects)
            for row, (share, at) in enumerate(zip(overlap.tolist(), nearest.tolist(), strict=True)):
                right[row] = share > threshold and not is_taken[at]
                is_taken[at] |= share > threshold
        rights.append(right)
        total += len(objects)
    hits = torch.cat(rights)[torch.cat(scores).argsort(descending=True, stable=True)].double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    best_from_here = precision.flip(0).cummax(0).values.flip(0)
    return float((best_from_here * hits).sum() / total)
