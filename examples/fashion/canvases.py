"""Canvases, 64x64, of Fashion-MNIST items, with a box and a label for each item."""

import torch
from torch import Tensor
from torch.nn import functional as F

from prunekernels.train.data import Split

from .boxes import Boxes, Objects, iou

SIDE, SLOTS, SCRAPS = 64, 4, 2  # pixels of a canvas; items on it, at most, and scraps
NOISES = 61


class Canvases:
    """Canvases with 1 to 4 items at random places, noise and scraps of other items. A seed decides what is on them.

    labels is int64 [N, 4], -1 where there are fewer items, and boxes [N, 4, 4].
    """

    def __init__(self, items: Split, count: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(items.labels), (count, SLOTS), generator=self.generator)
        self.scale = self.uniform(count, SLOTS, low=0.7, high=1.3)
        self.flip = torch.where(self.uniform(count, SLOTS) < 0.5, -1.0, 1.0)
        around = boxes_around(items.images[chosen.flatten(), 0]).view(count, SLOTS, 4)
        mirrored = torch.stack([-around[..., 2], around[..., 1], -around[..., 0], around[..., 3]], 2)
        around = torch.where(self.flip[..., None] < 0, mirrored, around) * self.scale[..., None]
        self.place(around)
        self.labels = torch.where(self.is_there, items.labels[chosen], -1)
        self.items, self.chosen = items, chosen
        self.scraps = torch.randint(len(items.labels), (count, SCRAPS), generator=self.generator)
        self.noise = 0.1 * torch.randn(NOISES, SIDE, SIDE, generator=self.generator)
        self.scrap_at = self.uniform(count, SCRAPS, 2, low=0, high=SIDE)

    def __len__(self) -> int:
        return len(self.labels)

    def uniform(self, *sizes: int, low: float = 0, high: float = 1) -> Tensor:
        return low + (high - low) * torch.rand(*sizes, generator=self.generator)

    def place(self, around: Boxes) -> None:
        """Chooses centres, of ten for each item the first whose box overlaps no earlier one much, or no item."""
        count = len(around)
        wanted = torch.randint(1, SLOTS + 1, (count,), generator=self.generator)
        self.centres, self.boxes = torch.zeros(count, SLOTS, 2), torch.zeros(count, SLOTS, 4)
        self.is_there = torch.zeros(count, SLOTS, dtype=torch.bool)
        for slot in range(SLOTS):
            box = around[:, slot, None]
            low, high = -box[..., :2], SIDE - box[..., 2:]
            centres = low + (high - low) * self.uniform(count, 10, 2)
            tried = box + centres.repeat(1, 1, 2)
            overlaps = iou(tried[:, :, None], self.boxes[:, None, :slot]) if slot else torch.zeros(count, 10, 1)
            fits = overlaps.amax(2) < 0.1
            rows, first = torch.arange(count), fits.float().argmax(1)
            self.is_there[:, slot] = fits.any(1) & (slot < wanted)
            self.centres[:, slot] = centres[rows, first]
            self.boxes[:, slot] = tried[rows, first] * self.is_there[:, slot, None]

    def objects(self) -> list[Objects]:
        """What is on each canvas."""
        there = self.is_there
        return [
            (box[is_], label[is_], torch.ones(int(is_.sum())))
            for box, label, is_ in zip(self.boxes, self.labels, there, strict=True)
        ]

    def images(self, rows: Tensor) -> Tensor:
        """Draws the canvases of these rows, float32 with values around 0."""
        things = self.items.images[self.chosen[rows], 0] / 255
        drawn = draw(things, self.centres[rows], self.scale[rows], self.flip[rows])
        drawn = drawn * self.is_there[rows, :, None, None]
        scraps = F.pad(self.items.images[self.scraps[rows], 0, 9:18, 9:18] / 255, (9, 10, 9, 10))
        whole = torch.ones(len(rows), SCRAPS)
        scraps = draw(scraps, self.scrap_at[rows], whole, whole)
        canvas = torch.cat([drawn, scraps], 1).amax(1) + self.noise[rows % NOISES]
        return (canvas.clamp(0, 1)[:, None] - 0.2) / 0.3


def draw(images: Tensor, centres: Tensor, scale: Tensor, flip: Tensor) -> Tensor:
    """Puts each image [N, S, 28, 28] on an empty canvas of its own: [N, S, 64, 64]."""
    at = torch.arange(SIDE) + 0.5
    x, y = ((at - centres[..., axis, None]) / (14 * scale[..., None]) for axis in range(2))
    x, y = (x * flip[..., None])[..., None, :].expand(*x.shape[:2], SIDE, SIDE), y[..., None].expand(*y.shape, SIDE)
    grid = torch.stack([x, y], -1).flatten(0, 1)
    return F.grid_sample(images.flatten(0, 1)[:, None], grid, align_corners=False).view(*images.shape[:2], SIDE, SIDE)


def boxes_around(images: Tensor) -> Boxes:
    """The box around what is not black in images [N, 28, 28], from their middle."""
    edges = []
    for axis in (1, 2):  # columns, rows
        seen = (images > 25).any(axis)
        first, last = seen.float().argmax(1), 28 - seen.flip(1).float().argmax(1)
        edges += [(first - 14.0, last - 14.0)]
    (left, right), (top, bottom) = edges
    return torch.stack([left, top, right, bottom], 1)
