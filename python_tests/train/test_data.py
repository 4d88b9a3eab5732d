"""Data sets: what is read, how it is split and drawn, and what is refused."""

import numpy as np
import pytest
import torch

from cases.train import tiny_data
from prunekernels.train import data as module
from prunekernels.train.data import Data, Split, augmented, load, steps_per_epoch, train_batches


def write_cifar(folder, records=4, labels=None, name=None, cut=0):
    """The six files; in the named one other labels, or the last bytes cut."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for file in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        rows = generator.integers(0, 256, (records, 3073), dtype=np.uint8)
        rows[:, 0] = labels if labels is not None and file == name else np.arange(records) % 10
        raw = rows.tobytes()
        (folder / file).write_bytes(raw[: len(raw) - cut] if file == name else raw)
    return rows


def write_images(folder, classes=("ant", "bee"), count=5, size=(12, 9)):
    image = pytest.importorskip("PIL.Image")
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image.new("RGB", size, (40 * c, 10 * i, 7)).save(folder / name / f"{i}.png")


# digits


def test_digits():
    pytest.importorskip("sklearn")
    data, again = load("digits"), load("digits")
    assert data.train.images.shape == (1438, 1, 16, 16) and data.test.images.shape == (359, 1, 16, 16)
    assert data.train.images.dtype == torch.uint8 and data.classes == [str(d) for d in range(10)]
    assert torch.equal(data.train.images, again.train.images) and torch.equal(data.test.labels, again.test.labels)
    assert torch.bincount(data.test.labels).min() >= 34  # a fifth of every class
    assert load("digits", 8).train.images.shape[2:] == (8, 8)


def test_normalised():
    data = tiny_data()
    x = data.normalised(data.train.images)
    torch.testing.assert_close(
        (x.mean(), x.var(correction=0)), (torch.tensor(0.0), torch.tensor(1.0)), atol=1e-4, rtol=0
    )


# cifar10


@pytest.mark.parametrize("nested", [False, True])
def test_cifar10(tmp_path, monkeypatch, nested):
    monkeypatch.setattr(module, "CIFAR_RECORDS", 4)
    rows = write_cifar(tmp_path / "cifar-10-batches-bin" if nested else tmp_path)
    data = load(f"cifar10:{tmp_path}")
    assert data.train.images.shape == (20, 3, 32, 32) and data.test.labels.tolist() == [0, 1, 2, 3]
    assert data.test.images[1, 2, 5, 6] == int(rows[1, 1 + 2 * 1024 + 5 * 32 + 6])
    assert data.augment == "shift+flip" and data.classes[3] == "cat"
    assert load(f"cifar10:{tmp_path}", 16).train.images.shape[2:] == (16, 16)


def test_cifar10_files_are_checked(tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match="data: expected CIFAR-10's binary version, got no file .*data_batch_1.bin"
    ):
        load(f"cifar10:{tmp_path}")
    monkeypatch.setattr(module, "CIFAR_RECORDS", 4)
    write_cifar(tmp_path, name="data_batch_3.bin", cut=1)
    with pytest.raises(ValueError, match=r"data_batch_3.bin: expected 12292 bytes \(4 records of 3073\), got 12291"):
        load(f"cifar10:{tmp_path}")
    write_cifar(tmp_path, name="test_batch.bin", labels=[0, 1, 10, 3])
    with pytest.raises(ValueError, match=r"test_batch.bin: expected labels in \[0, 10\), got 10 in record 2"):
        load(f"cifar10:{tmp_path}")


# folder


def test_folder_without_a_test_set(tmp_path):
    write_images(tmp_path)
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    data = load(f"folder:{tmp_path}", 8)
    assert data.classes == ["ant", "bee"] and data.train.images.shape == (8, 3, 8, 8)
    assert sorted(data.test.labels.tolist()) == [0, 1]
    assert all(int(x[0, 0, 0]) == 40 * int(y) for x, y in zip(data.train.images, data.train.labels, strict=True))


@pytest.mark.parametrize("name", ["test", "val"])
def test_folder_with_a_test_set(tmp_path, name):
    write_images(tmp_path / "train", count=3)
    write_images(tmp_path / name, count=2)
    data = load(f"folder:{tmp_path}")
    assert data.train.images.shape == (6, 3, 32, 32) and data.test.labels.tolist() == [0, 0, 1, 1]


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder of class folders, got no folder .*nowhere"):
        load(f"folder:{tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match="expected class folders, got none"):
        load(f"folder:{tmp_path}")
    write_images(tmp_path / "a")
    (tmp_path / "a" / "cow").mkdir()
    with pytest.raises(ValueError, match="cow: expected images, got none"):
        load(f"folder:{tmp_path / 'a'}")
    write_images(tmp_path / "b")
    (tmp_path / "b" / "bee" / "9.png").write_bytes((tmp_path / "b" / "bee" / "0.png").read_bytes()[:40])
    with pytest.raises(ValueError, match="9.png: expected a readable image, got "):
        load(f"folder:{tmp_path / 'b'}")
    write_images(tmp_path / "c" / "train")
    write_images(tmp_path / "c" / "test", classes=("ant", "cow"))
    with pytest.raises(ValueError, match=r"expected the classes of .*train, got \['ant', 'cow'\]"):
        load(f"folder:{tmp_path / 'c'}")
    write_images(tmp_path / "d", count=1)
    with pytest.raises(ValueError, match="test: expected images, got none"):
        load(f"folder:{tmp_path / 'd'}")


# all


@pytest.mark.parametrize(
    ("spec", "size", "text"),
    [
        ("mnist", None, "data: expected one of digits, fashion-mnist, idx:DIR, cifar10:DIR, folder:DIR, got 'mnist'"),
        ("digits:x", None, "data: expected digits, got 'digits:x'"),
        ("fashion-mnist:x", None, "data: expected fashion-mnist, got 'fashion-mnist:x'"),
        ("idx", None, "data: expected idx:DIR, got 'idx'"),
        ("folder", None, "data: expected folder:DIR, got 'folder'"),
        ("digits", 0, "data: size: expected at least 1, got 0"),
    ],
)
def test_specs_that_are_refused(spec, size, text):
    with pytest.raises(ValueError) as error:
        load(spec, size)
    assert str(error.value) == text


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_out_of_range(label):
    labels = torch.arange(64) % 4
    labels[5] = label
    with pytest.raises(ValueError, match=rf"data: tiny: train: expected labels in \[0, 4\), got {label} at image 5"):
        tiny_data(labels)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'data: digits: expected scikit-learn: pip install "prunekernels\[demo\]"'):
        load("digits")


def test_batches_follow_from_seed_and_epoch():
    data = tiny_data()

    def drawn(seed, epoch):
        return [torch.cat(parts) for parts in zip(*train_batches(data, 20, seed, epoch, "shift+flip"), strict=True)]

    first = drawn(0, 0)
    assert steps_per_epoch(data, 20) == 2 and first[0].shape == (40, 1, 8, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, drawn(0, 0), strict=True))
    assert not torch.equal(first[0], drawn(0, 1)[0]) and not torch.equal(first[0], drawn(1, 0)[0])


def test_a_batch_larger_than_the_set():
    (batch,) = train_batches(tiny_data(), 100, 0, 0, "none")
    assert len(batch[0]) == 48 and sorted(batch[1].tolist()) == sorted(tiny_data().train.labels.tolist())


@pytest.mark.parametrize("augment", ["shift", "shift+flip"])
def test_augmented_images_are_shifted_ones(augment):
    x = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).repeat(50, 2, 1, 1)
    y = augmented(x, augment, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x[0], (1, 1, 1, 1))
    windows = {padded[:, r : r + 8, c : c + 8].numpy().tobytes() for r in range(3) for c in range(3)}
    mirrored = {padded[:, r : r + 8, c : c + 8].flip(2).numpy().tobytes() for r in range(3) for c in range(3)}
    seen = {image.numpy().tobytes() for image in y}
    assert seen <= (windows | mirrored if augment == "shift+flip" else windows) and len(seen) > 5
    assert bool(seen & mirrored) == (augment == "shift+flip")


def test_constant_images_have_no_spread_to_divide_by():
    split = Split(torch.full((4, 1, 2, 2), 9, dtype=torch.uint8), torch.zeros(4, dtype=torch.long))
    data = Data("flat", split, split, ["all"])
    assert torch.equal(data.normalised(split.images), torch.zeros(4, 1, 2, 2))
