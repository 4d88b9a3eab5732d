"""The file format of MNIST: what is read, and what is refused before memory is taken for it."""

import gzip
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from cases.idx import claims, idx_bytes, write_idx
from prunekernels.train import data as module
from prunekernels.train import idx
from prunekernels.train.data import load

TRAIN = "train-images-idx3-ubyte"
REAL = Path(module.FASHION_DIR)
needs_fashion = pytest.mark.skipif(not REAL.is_dir(), reason=f"needs {REAL}: apt-get install dataset-fashion-mnist")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("names", [("train-{}-idx", "t10k-{}-idx"), ("train-{}.idx", "t10k-{}.idx"),
                                   ("train-{}-idx", "test-{}-idx")])  # fmt: skip
def test_what_is_read(tmp_path, packed, names):
    held = write_idx(tmp_path, packed=packed, names=names)
    data = load(f"idx:{tmp_path}")
    for part, split in (("train", data.train), ("test", data.test)):
        assert torch.equal(split.images, torch.from_numpy(held[part, "images"])[:, None])
        assert split.labels.dtype == torch.int64 and split.labels.tolist() == held[part, "labels"].tolist()
    assert data.classes == ["0", "1", "2", "3"] and data.augment == "shift"


def test_images_are_resized_to_a_square(tmp_path):
    write_idx(tmp_path, shape=(7, 12))
    assert load(f"idx:{tmp_path}").train.images.shape == (24, 1, 7, 12)
    assert load(f"idx:{tmp_path}", 10).train.images.shape == (24, 1, 10, 10)


def test_channels_come_last_in_the_file(tmp_path):
    held = write_idx(tmp_path, shape=(5, 6, 3))
    images = load(f"idx:{tmp_path}").train.images
    assert images.shape == (24, 3, 5, 6) and images[2, 1, 4, 5] == held["train", "images"][2, 4, 5, 1]


def test_gzip_is_told_by_the_contents(tmp_path):
    write_idx(tmp_path, packed=False)
    for path in list(tmp_path.iterdir()):
        path.rename(f"{path}.gz")
    assert len(load(f"idx:{tmp_path}").train) == 24


# Bad input


def whole():
    return idx_bytes(np.arange(24 * 48, dtype=np.int64).astype(np.uint8).reshape(24, 8, 6))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", "expected an idx file, which begins with the bytes 00 00, got an empty file"),
        (b"\0\0\x08", "expected an idx file, which begins with the bytes 00 00, got bytes 00 00 08"),
        (b"PK\3\4" + bytes(60), "expected an idx file, which begins with the bytes 00 00, got bytes 50 4b 03 04"),
        (b"\0\0\x0d\3" + whole()[4:], r"expected the type byte 8 \(uint8\), got 13 \(float32\)"),
        (b"\0\0\x07\3" + whole()[4:], r"expected the type byte 8 \(uint8\), got 7 \(no type\)"),
        (b"\0\0\x08\2" + whole()[4:], "expected 3 or 4 dimensions, as images have, got 2"),
        (whole()[:15], "expected 3 sizes of 4 bytes, got 11 bytes"),
        (claims(24, 0, 6)[0], "expected sizes of at least 1, got 24 x 0 x 6"),
        (whole()[:-1], r"expected 1,152 bytes after the sizes \(24 x 8 x 6\), got 1,151"),
        (whole()[:16], r"expected 1,152 bytes after the sizes \(24 x 8 x 6\), got 0"),
        (whole() + b"\0", r"expected 1,152 bytes after the sizes \(24 x 8 x 6\), got more"),
    ],
)
def test_files_that_are_refused(tmp_path, raw, text, packed):
    write_idx(tmp_path, packed=False)
    (tmp_path / TRAIN).write_bytes(gzip.compress(raw) if packed else raw)
    with pytest.raises(ValueError, match=f"data: .*{TRAIN}: {text}$"):
        load(f"idx:{tmp_path}")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda packed: packed[: len(packed) // 2], "Compressed file ended before the end-of-stream marker"),
        (lambda packed: packed[:5], "Compressed file ended before the end-of-stream marker"),
        (lambda packed: packed[:-8] + bytes(8), "CRC check failed"),
        (lambda packed: packed[:40] + bytes(40) + packed[80:], "Error -3 while decompressing data|CRC check failed"),
        (lambda packed: packed + b"more", "Not a gzipped file"),
    ],
)
def test_gzip_files_that_are_broken(tmp_path, change, text):
    write_idx(tmp_path)
    path = tmp_path / f"{TRAIN}.gz"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{TRAIN}.gz: expected a whole gzip file, got .*({text})"):
        load(f"idx:{tmp_path}")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("there", [0, 30_000_000])
def test_claimed_sizes_take_no_memory(tmp_path, packed, there):
    """Nor does what is there, which packs to a thousandth."""
    raw, claimed = claims(2**32 - 1, 2**31, 3)
    path = tmp_path / TRAIN
    path.write_bytes(gzip.compress(raw + bytes(there), 9) if packed else raw + bytes(there))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"expected {claimed:,} bytes after .*, got {there:,}$"):
            idx.read(path, "images")
        assert tracemalloc.get_traced_memory()[1] < 8 * idx.CHUNK
    finally:
        tracemalloc.stop()


def test_bytes_after_the_last_take_no_memory(tmp_path):
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx_bytes(np.zeros(9, np.uint8)) + bytes(30_000_000), 9))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"expected 9 bytes after the sizes \(9\), got more$"):
            idx.read(path, "labels")
        assert tracemalloc.get_traced_memory()[1] < 8 * idx.CHUNK
    finally:
        tracemalloc.stop()


def rewrite(folder, name, values):
    (folder / f"{name}-ubyte").write_bytes(idx_bytes(np.array(values, np.uint8)))


def test_numbers_and_labels_that_disagree(tmp_path):
    write_idx(tmp_path, packed=False)
    rewrite(tmp_path, "train-labels-idx1", range(23))
    text = f"train-labels-idx1-ubyte: expected 24 labels, one for each image of {TRAIN}, got 23"
    with pytest.raises(ValueError, match=text):
        load(f"idx:{tmp_path}")
    write_idx(tmp_path, packed=False)
    rewrite(tmp_path, "t10k-labels-idx1", [0, 1, 2, 3, 0, 4, 2, 9])
    text = r"t10k-labels-idx1-ubyte: expected labels in \[0, 4\), as the training set has, got 4 at image 5"
    with pytest.raises(ValueError, match=text):
        load(f"idx:{tmp_path}")


def test_sizes_of_images_that_disagree(tmp_path):
    write_idx(tmp_path, packed=False)
    rewrite(tmp_path, "t10k-images-idx3", np.zeros((8, 6, 6)))
    text = "t10k-images-idx3-ubyte: expected images of 1 x 8 x 6, as the training set has, got 1 x 6 x 6"
    with pytest.raises(ValueError, match=text):
        load(f"idx:{tmp_path}")
    assert load(f"idx:{tmp_path}", 8).test.images.shape == (8, 1, 8, 8)


@pytest.mark.parametrize("name", [TRAIN, "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"])
def test_files_that_are_missing(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="data: expected a folder of idx files, got no folder .*nowhere"):
        load(f"idx:{tmp_path / 'nowhere'}")
    write_idx(tmp_path, packed=False)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"data: .*: expected a file {name} or {name}.gz, got none"):
        load(f"idx:{tmp_path}")


# fashion-mnist


def test_fashion_mnist_is_where_the_variable_says(tmp_path, monkeypatch):
    monkeypatch.setenv("FASHION_MNIST_DIR", str(tmp_path))
    write_idx(tmp_path, counts=(20, 10), classes=10)
    data = load("fashion-mnist")
    assert len(data.train) == 20 and (data.name, data.augment) == ("fashion-mnist", "shift+flip")
    assert len(data.classes) == 10 and (data.classes[0], data.classes[9]) == ("T-shirt/top", "Ankle boot")
    write_idx(tmp_path, counts=(20, 10), classes=9)
    with pytest.raises(ValueError, match="data: fashion-mnist: .*: expected Fashion-MNIST's 10 classes, got 9"):
        load("fashion-mnist")


def test_fashion_mnist_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.delenv("FASHION_MNIST_DIR", raising=False)
    monkeypatch.setattr(module, "FASHION_DIR", str(tmp_path / "nowhere"))
    text = "data: fashion-mnist: expected Fashion-MNIST, got no folder .*nowhere: apt-get install dataset-fashion-mnist"
    with pytest.raises(
        FileNotFoundError, match=f"{text}, or set FASHION_MNIST_DIR to a folder with its four idx files"
    ):
        load("fashion-mnist")


@needs_fashion
def test_fashion_mnist(monkeypatch):
    monkeypatch.delenv("FASHION_MNIST_DIR", raising=False)
    data = load("fashion-mnist")
    assert data.train.images.shape == (60_000, 1, 28, 28) and data.test.images.shape == (10_000, 1, 28, 28)
    assert torch.bincount(data.train.labels).tolist() == [6000] * 10
    assert float(data.mean) == pytest.approx(72.94, abs=0.01)
