"""What examples/detect_fashion.py is made of: boxes, average precision, canvases, the loss."""

import sys

import pytest
import torch

from cases.pages import ROOT

sys.path.append(str(ROOT / "examples"))

import detect_fashion
from fashion.boxes import average_precision, iou, mean_average_precision, suppress
from fashion.canvases import SIDE, Canvases, boxes_around, draw

from prunekernels.train.data import Split

A, B, C, ELSEWHERE = [0.0, 0, 10, 10], [20.0, 0, 30, 10], [0.0, 20, 10, 30], [40.0, 40, 50, 50]


def objects(*found):
    """(box, label, score), ... of one image."""
    boxes, labels, scores = zip(*found, strict=True) if found else ((), (), ())
    return torch.tensor(boxes).view(-1, 4), torch.tensor(labels, dtype=torch.long), torch.tensor(scores)


def test_iou():
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3], [2, 0, 3, 2], [0, 0, 0, 0]])
    expected = torch.tensor([1, 1 / 7, 0, 0])
    torch.testing.assert_close(iou(boxes[:1], boxes), expected)


# true boxes of label 0 in one image, what is found there, and the area that a hand computes
AREAS = {
    "all found": ([A, B], [(A, 0.9), (B, 0.8)], 1),
    "nothing found": ([A], [], 0),
    "one of four": ([A, B, C, ELSEWHERE], [(A, 0.9)], 1 / 4),
    "a wrong one between": ([A, B], [(A, 0.9), (ELSEWHERE, 0.8), (B, 0.7)], (1 + 2 / 3) / 2),
    "a wrong one first: precision is the best from there on": (
        [A, B], [(ELSEWHERE, 0.9), (A, 0.8), (B, 0.7)], 2 / 3,
    ),
    "a wrong one last costs nothing": ([A], [(A, 0.9), (ELSEWHERE, 0.1)], 1),
    "found twice": ([A, B], [(A, 0.9), (A, 0.8), (B, 0.7)], (1 + 2 / 3) / 2),
    "scores decide, not the order": ([A, B], [(B, 0.7), (ELSEWHERE, 0.8), (A, 0.9)], (1 + 2 / 3) / 2),
    "half covered is not more than half": ([A], [([0.0, 0, 10, 5], 0.9)], 0),
    "a little more is": ([A], [([0.0, 0, 10, 5.1], 0.9)], 1),
}  # fmt: skip


@pytest.mark.parametrize("case", AREAS)
def test_average_precision(case):
    true, found, expected = AREAS[case]
    got = average_precision([objects(*((b, 0, s) for b, s in found))], [objects(*((b, 0, 1.0) for b in true))], 0)
    assert got == pytest.approx(expected)


def test_boxes_count_in_their_own_image_only():
    true = [objects((A, 0, 1.0)), objects((B, 0, 1.0))]
    assert average_precision([objects((B, 0, 0.9)), objects((B, 0, 0.8))], true, 0) == pytest.approx(1 / 4)


def test_mean_over_the_labels_that_are_there():
    true = [objects((A, 0, 1.0), (B, 3, 1.0))]
    found = [objects((A, 0, 0.9), (B, 5, 0.8))]  # B with a label that no object has
    assert mean_average_precision(found, true) == 1 / 2


def test_suppress():
    near = [1.0, 0, 11, 10]
    boxes, labels, scores = objects((near, 0, 0.5), (A, 0, 0.9), (near, 1, 0.7), (B, 0, 0.6))
    assert suppress(boxes, labels, scores).tolist() == [1, 2, 3]


def test_what_was_suppressed_suppresses_nothing():
    boxes, labels, scores = objects(([0.0, 0, 10, 10], 0, 0.9), ([3.0, 0, 13, 10], 0, 0.8), ([6.0, 0, 16, 10], 0, 0.7))
    assert suppress(boxes, labels, scores).tolist() == [0, 2]


def items(count=12):
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(count, 1, 28, 28, dtype=torch.uint8)
    for image, side in zip(images, torch.randint(10, 24, (count,), generator=generator).tolist(), strict=True):
        image[0, 2 : 2 + side, 4:side] = 200
    return Split(images, torch.arange(count) % 10)


def test_draw_puts_the_image_where_the_box_says():
    image = items().images[:1].float() / 255
    canvas = draw(image, torch.tensor([[[30.0, 40.0]]]), torch.ones(1, 1), -torch.ones(1, 1))[0, 0]
    expected = torch.zeros(SIDE, SIDE)
    expected[26:54, 16:44] = image[0, 0].flip(1)
    torch.testing.assert_close(canvas, expected)
    box = boxes_around(items().images[:1, 0])[0]
    side = int((items().images[0, 0] > 0).any(1).sum())
    assert box.tolist() == [4 - 14, 2 - 14, side - 14, 2 + side - 14]


def test_canvases_follow_from_the_seed():
    first, again, other = (Canvases(items(), 50, seed) for seed in (3, 3, 4))
    rows = torch.arange(50)
    assert torch.equal(first.images(rows), again.images(rows)) and torch.equal(first.boxes, again.boxes)
    assert torch.equal(first.images(rows)[20:30], first.images(rows[20:30]))
    assert not torch.equal(first.boxes, other.boxes)


def test_canvases_have_one_to_four_items_inside_that_hardly_overlap():
    canvases = Canvases(items(), 200, 0)
    counts = torch.tensor([len(labels) for _, labels, _ in canvases.objects()])
    assert counts.unique().tolist() == [1, 2, 3, 4]
    for boxes, labels, _ in canvases.objects():
        assert bool((boxes >= -1e-4).all() and (boxes <= SIDE + 1e-4).all() and (labels >= 0).all())
        shared = iou(boxes[:, None], boxes).fill_diagonal_(0)
        assert float(shared.max()) < 0.1


def perfect_outputs(box, label):
    """What a detector would say that knows the one object."""
    at = detect_fashion.STRIDE * (torch.arange(16) + 0.5)
    left, top, right, bottom = box
    x, y = at[None, :].expand(16, 16), at[:, None].expand(16, 16)
    edges = torch.stack([x - left, y - top, right - x, bottom - y]).clamp(min=0.01) / detect_fashion.STRIDE
    logits = torch.full((1, 10, 16, 16), -20.0)
    inside = (edges > 1.5).all(0)
    logits[0, label][inside] = 20.0
    return logits, edges[None]


def test_the_loss_of_a_perfect_detector_is_that_of_the_cells_it_leaves_out():
    labels, boxes = torch.tensor([[7, -1]]), torch.tensor([[[10.0, 12, 42, 44], [0, 0, 0, 0]]])
    logits, edges = perfect_outputs([10.0, 12, 42, 44], 7)
    owned = (edges[0] >= 2 - 1e-6).all(0)  # the inner half: 8 pixels from every edge
    logits[0, 7] = torch.where(owned, 20.0, -20.0)
    assert float(detect_fashion.loss_of((logits, edges), labels, boxes)) < 1e-6
    assert float(detect_fashion.loss_of((logits, edges + 1), labels, boxes)) > 0.3
    assert float(detect_fashion.loss_of((-logits, edges), labels, boxes)) > 3


def test_detect_gives_one_box_for_one_object():
    box = [10.0, 12, 42, 44]
    ((boxes, labels, scores),) = detect_fashion.detect(
        lambda images: perfect_outputs(box, 7), torch.zeros(1, 1, 64, 64)
    )
    sure = scores > 0.5
    assert boxes[sure].tolist() == [box] and labels[sure].tolist() == [7]


def test_no_object_no_box_loss():
    labels, boxes = torch.tensor([[-1]]), torch.zeros(1, 1, 4)
    logits = torch.full((1, 10, 16, 16), -20.0)
    assert float(detect_fashion.loss_of((logits, torch.ones(1, 4, 16, 16)), labels, boxes)) < 1e-6
