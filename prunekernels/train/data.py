"""Data sets, held in memory: digits, Fashion-MNIST, files in MNIST's format, binary CIFAR-10, folders of images.

data = load("digits")
images, labels = data.train.images, data.train.labels
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import idx
from .optional_deps import need

TEST_SHARE = 0.2  # of the images, where there is no test set
CIFAR_RECORDS, CIFAR_SIZE = 10_000, 32
CIFAR_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
FASHION_CLASSES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")
FASHION_DIR = "/usr/share/datasets/fashion-mnist"  # of Debian's package dataset-fashion-mnist
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
AUGMENTS = ("none", "shift", "shift+flip")


@dataclass
class Split:
    """Images, uint8 [N, C, H, W], with labels, int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class Data:
    """A training and a test set of the same classes, and perhaps a validation set.

    Args:
        name: For errors.
        train: The training set.
        test: The test set.
        classes: Names, by label.
        augment: The one of AUGMENTS that suits the images.
        validation: Images to make choices by, none of which is in the test set.
    """

    name: str
    train: Split
    test: Split
    classes: list[str]
    augment: str = "none"
    validation: Split | None = None

    def __post_init__(self) -> None:
        for part, split in self.splits.items():
            where = f"data: {self.name}: {part}"
            if len(split) == 0:
                raise ValueError(f"{where}: expected images, got none")
            wrong = torch.nonzero((split.labels < 0) | (split.labels >= len(self.classes))).flatten()
            if len(wrong):
                i = int(wrong[0])
                known = f"labels in [0, {len(self.classes)})"
                raise ValueError(f"{where}: expected {known}, got {int(split.labels[i])} at image {i}")
        self._check_validation()
        pixels = self.train.images.transpose(0, 1).flatten(1)
        count = pixels.shape[1]  # integers are summed, for the same bits on any number of threads
        mean = pixels.sum(1, dtype=torch.int64).double() / count
        square = pixels.long().square_().sum(1).double() / count
        self.mean = mean.float().view(-1, 1, 1)
        self.std = (square - mean.square()).clamp(min=1).sqrt().float().view(-1, 1, 1)

    def _check_validation(self) -> None:
        """No image for validation is in the test set."""
        if self.validation is None:
            return
        known = {image.tobytes() for image in self.test.images.numpy()}
        seen = [i for i, image in enumerate(self.validation.images.numpy()) if image.tobytes() in known]
        if seen:
            got = f"{len(seen)} of {len(self.validation)} there, the first at image {seen[0]}"
            raise ValueError(f"data: {self.name}: validation: expected images that are not in the test set, got {got}")

    @property
    def splits(self) -> dict[str, Split]:
        """The sets by name: train, validation if there is one, test."""
        validation = {} if self.validation is None else {"validation": self.validation}
        return {"train": self.train, **validation, "test": self.test}

    @property
    def judged(self) -> Split:
        """What epochs are evaluated on: the validation set if there is one, else the test set."""
        return self.test if self.validation is None else self.validation

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def fingerprint(self) -> str:
        """Numbers of images, and a checksum of all images and labels."""
        check = 0
        for split in self.splits.values():
            for tensor in (split.images, split.labels):
                check = zlib.crc32(tensor.contiguous().numpy().data, check)
        numbers = " + ".join(str(len(split)) for split in self.splits.values())
        return f"{numbers} images, crc {check:08x}"

    def normalised(self, images: Tensor) -> Tensor:
        """Returns float32 images, with mean 0 and variance 1 by channel over the training set."""
        device = images.device
        return images.float().sub_(self.mean.to(device)).div_(self.std.to(device))


def load(spec: str, size: int | None = None) -> Data:
    """Loads a data set.

    Args:
        spec: One of KNOWN.
        size: Height and width that images are resized to. None: what suits the data.
    """
    kind, _, place = spec.partition(":")
    if kind not in LOADERS:
        raise ValueError(f"data: expected one of {', '.join(KNOWN)}, got {spec!r}")
    if bool(place) is (kind in WITHOUT_PLACE):
        raise ValueError(f"data: expected {KNOWN[list(LOADERS).index(kind)]}, got {spec!r}")
    if size is not None and size < 1:
        raise ValueError(f"data: size: expected at least 1, got {size}")
    return LOADERS[kind](place, size)


def _digits(_: str, size: int | None) -> Data:
    """1797 grey images of 8x8, by default enlarged to 16x16, for networks that halve them twice."""
    digits = need("sklearn.datasets", "data: digits").load_digits()
    images = torch.from_numpy(digits.images).float().mul(255 / 16).round().byte().unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    train, test = _split(labels)
    images = _resized(images, size or 16)
    return Data(
        "digits", Split(images[train], labels[train]), Split(images[test], labels[test]), [str(d) for d in range(10)]
    )


def _cifar10(place: str, size: int | None) -> Data:
    folder = Path(place)
    nested = folder / "cifar-10-batches-bin"
    folder = nested if nested.is_dir() else folder
    train = [_cifar_batch(folder / f"data_batch_{i}.bin") for i in range(1, 6)]
    splits = []
    for batches in (train, [_cifar_batch(folder / "test_batch.bin")]):
        records = np.concatenate(batches)
        images = torch.from_numpy(records[:, 1:].reshape(-1, 3, CIFAR_SIZE, CIFAR_SIZE))
        splits.append(Split(_resized(images, size), torch.from_numpy(records[:, 0]).long()))
    return Data(f"cifar10:{folder}", splits[0], splits[1], CIFAR_CLASSES, "shift+flip")


def _cifar_batch(path: Path) -> np.ndarray:
    """uint8 [records, 1 + 3 * 32 * 32]: a label, then the planes."""
    width = 1 + 3 * CIFAR_SIZE**2
    if not path.is_file():
        raise FileNotFoundError(f"data: expected CIFAR-10's binary version, got no file {path}")
    if path.stat().st_size != CIFAR_RECORDS * width:
        expected = f"{CIFAR_RECORDS * width} bytes ({CIFAR_RECORDS} records of {width})"
        raise ValueError(f"data: {path}: expected {expected}, got {path.stat().st_size}")
    records = np.fromfile(path, np.uint8).reshape(-1, width)
    wrong = np.flatnonzero(records[:, 0] >= len(CIFAR_CLASSES))
    if len(wrong):
        raise ValueError(f"data: {path}: expected labels in [0, 10), got {records[wrong[0], 0]} in record {wrong[0]}")
    return records


def _idx(place: str, size: int | None) -> Data:
    """A folder with the four files of MNIST, or of another set in that format; images of any height and width."""
    folder = Path(place)
    if not folder.is_dir():
        raise FileNotFoundError(f"data: expected a folder of idx files, got no folder {folder}")
    train, test = (_idx_split(folder, part, size) for part in ("train", "test"))
    classes = int(train.labels.max()) + 1
    wrong = torch.nonzero(test.labels >= classes).flatten()
    if len(wrong):
        where, i = f"data: {idx.find(folder, 'test', 'labels')}", int(wrong[0])
        expected = f"labels in [0, {classes}), as the training set has"
        raise ValueError(f"{where}: expected {expected}, got {int(test.labels[i])} at image {i}")
    if train.images.shape[1:] != test.images.shape[1:]:
        expected, got = (" x ".join(map(str, split.images.shape[1:])) for split in (train, test))
        where = f"data: {idx.find(folder, 'test', 'images')}"
        raise ValueError(f"{where}: expected images of {expected}, as the training set has, got {got}")
    return Data(f"idx:{folder}", train, test, [str(label) for label in range(classes)], "shift")


def _idx_split(folder: Path, part: str, size: int | None) -> Split:
    paths = [idx.find(folder, part, what) for what in ("images", "labels")]
    images, labels = idx.read(paths[0], "images"), idx.read(paths[1], "labels")
    if len(images) != len(labels):
        expected = f"{len(images):,} labels, one for each image of {paths[0].name}"
        raise ValueError(f"data: {paths[1]}: expected {expected}, got {len(labels):,}")
    pixels = torch.from_numpy(images)
    pixels = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    return Split(_resized(pixels, size), torch.from_numpy(labels).long())


def _fashion_mnist(_: str, size: int | None) -> Data:
    """60,000 + 10,000 grey images of 28x28."""
    place = os.environ.get("FASHION_MNIST_DIR") or FASHION_DIR
    if not Path(place).is_dir():
        got = f"expected Fashion-MNIST, got no folder {place}"
        ways = "apt-get install dataset-fashion-mnist, or set FASHION_MNIST_DIR to a folder with its four idx files"
        raise FileNotFoundError(f"data: fashion-mnist: {got}: {ways}")
    data = _idx(place, size)
    if len(data.classes) != len(FASHION_CLASSES):
        expected = f"Fashion-MNIST's {len(FASHION_CLASSES)} classes"
        raise ValueError(f"data: fashion-mnist: {place}: expected {expected}, got {len(data.classes)}")
    data.name, data.classes, data.augment = "fashion-mnist", FASHION_CLASSES, "shift+flip"
    return data


def _folder(place: str, size: int | None) -> Data:
    """Reads DIR/class/image, or DIR/train/class/image and DIR/test/class/image (or DIR/val).

    Without a test set, TEST_SHARE of the images become one.
    """
    root, size = Path(place), size or 32
    if not root.is_dir():
        raise FileNotFoundError(f"data: expected a folder of class folders, got no folder {root}")
    tests = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if (root / "train").is_dir() and tests:
        classes = _classes(root / "train")
        if _classes(tests[0]) != classes:
            raise ValueError(f"data: {tests[0]}: expected the classes of {root / 'train'}, got {_classes(tests[0])}")
        splits = [_images(part, classes, size) for part in (root / "train", tests[0])]
    else:
        classes = _classes(root)
        every = _images(root, classes, size)
        splits = [Split(every.images[rows], every.labels[rows]) for rows in _split(every.labels)]
    return Data(f"folder:{root}", splits[0], splits[1], classes, "shift+flip")


def _classes(folder: Path) -> list[str]:
    found = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not found:
        raise ValueError(f"data: {folder}: expected class folders, got none")
    return found


def _images(folder: Path, classes: list[str], size: int) -> Split:
    images, labels = [], []
    for label, name in enumerate(classes):
        paths = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in SUFFIXES)
        if not paths:
            raise ValueError(f"data: {folder / name}: expected images, got none ({' '.join(sorted(SUFFIXES))})")
        images += [_image(path, size) for path in paths]
        labels += [label] * len(paths)
    return Split(torch.stack(images), torch.tensor(labels))


def _image(path: Path, size: int) -> Tensor:
    """The largest middle square of an image, resized: uint8 [3, size, size]."""
    Image, ImageOps = need("PIL.Image", "data: folder"), need("PIL.ImageOps", "data: folder")
    try:
        with Image.open(path) as image:
            square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"data: {path}: expected a readable image, got {type(error).__name__}: {error}") from error
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def _split(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Splits by a fixed seed, each class in the same proportion: int64 rows of the training and of the test set."""
    generator = torch.Generator().manual_seed(0)
    train, test = [], []
    for label in labels.unique().tolist():
        rows = torch.nonzero(labels == label).flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        count = round(len(rows) * TEST_SHARE)
        test.append(rows[:count])
        train.append(rows[count:])
    return torch.cat(train), torch.cat(test)


def _resized(images: Tensor, size: int | None) -> Tensor:
    if size is None or images.shape[2:] == (size, size):
        return images
    large = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
    return large.round_().clamp_(0, 255).byte()


LOADERS: dict[str, Callable[[str, int | None], Data]] = {
    "digits": _digits, "fashion-mnist": _fashion_mnist, "idx": _idx, "cifar10": _cifar10, "folder": _folder,
}  # fmt: skip
KNOWN = ("digits", "fashion-mnist", "idx:DIR", "cifar10:DIR", "folder:DIR")
WITHOUT_PLACE = ("digits", "fashion-mnist")


def train_batches(
    data: Data, batch: int, seed: int, epoch: int, augment: str, share: Callable[[int], slice] = slice
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches (images uint8 [batch, C, H, W], labels int64 [batch]) in an order that seed and epoch decide.

    All batches are whole; the images that are left over are not used in this epoch. Of several ranks each has its share
    of every batch, in which the images are the same as in the whole batch.

    Args:
        data: The data set.
        batch: Images a batch.
        seed: Of the order and of the augmentation.
        epoch: The epoch, from 0.
        augment: One of AUGMENTS.
        share: From the number of images of a batch, those of them that are yielded; by default all.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    split = data.train
    order = torch.randperm(len(split), generator=generator)
    for rows in order[: steps_per_epoch(data, batch) * batch].split(batch):
        own = share(len(rows))
        images = split.images[rows[own]]
        if augment != "none":
            images = augmented(images, augment, generator, len(rows), own)
        yield images, split.labels[rows[own]]


def steps_per_epoch(data: Data, batch: int) -> int:
    """How many batches train_batches yields."""
    return max(1, len(data.train) // batch)


def augmented(
    images: Tensor, augment: str, generator: torch.Generator, of: int | None = None, own: slice = slice(None)
) -> Tensor:
    """Shifts each image by up to an eighth, filling up with black; "shift+flip" also mirrors half of the images.

    own: which images of a batch these are, of so many (of; None: they are the batch). Random numbers are drawn for all.
    """
    N, C, H, W = images.shape
    of = N if of is None else of
    pad = max(1, min(H, W) // 8)
    down, right = (torch.randint(0, 2 * pad + 1, (of, 1), generator=generator)[own] for _ in range(2))
    rows, columns = torch.arange(H) + down, torch.arange(W) + right
    if augment == "shift+flip":
        mirrored = torch.rand(of, 1, generator=generator)[own] < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    n, c = torch.arange(N).view(N, 1, 1, 1), torch.arange(C).view(1, C, 1, 1)
    return F.pad(images, (pad,) * 4)[n, c, rows[:, None, :, None], columns[:, None, None, :]]
