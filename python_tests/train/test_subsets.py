"""Parts of a training set: fixed, disjoint, of every class its share; and what a run does with images held out."""

import math
from dataclasses import replace

import pytest
import torch

from cases.train import tiny_config, tiny_data, tiny_run
from prunekernels.train import checkpoint, finalize, loop
from prunekernels.train.data import Data, Split
from prunekernels.train.loop import Trainer, accuracy, predictions
from prunekernels.train.run import train
from prunekernels.train.setup import evaluation_batches
from prunekernels.train.subsets import chosen


def numbered(labels):
    """A set whose every image is another, and its test set of two images of each class."""
    labels = torch.as_tensor(labels)
    pixels = torch.arange(len(labels))
    images = torch.stack((pixels % 256, pixels // 256), 1).view(-1, 1, 1, 2).byte()
    classes = int(labels.max()) + 1
    test = Split(torch.full((2 * classes, 1, 1, 2), 255, dtype=torch.uint8), torch.arange(2 * classes) % classes)
    return Data("numbered", Split(images, labels), test, [str(c) for c in range(classes)])


def rows(split):
    """Where in the training set of numbered() the images were."""
    pixels = split.images.long().flatten(1)
    return (pixels[:, 0] + 256 * pixels[:, 1]).tolist()


BALANCED = torch.arange(1000) % 10


@pytest.mark.parametrize(("train_images", "validation"), [(200, 0), (None, 300), (200, 300), (700, 300)])
def test_parts_are_disjoint_and_balanced(train_images, validation):
    data = chosen(numbered(BALANCED), train_images, validation)
    used = 1000 - validation if train_images is None else train_images
    assert torch.bincount(data.train.labels).tolist() == [used // 10] * 10
    assert rows(data.train) == sorted(rows(data.train)) and len(data.test) == 20
    assert all(i % 10 == label for i, label in zip(rows(data.train), data.train.labels.tolist(), strict=True))
    if validation == 0:
        assert data.validation is None
    else:
        assert torch.bincount(data.validation.labels).tolist() == [validation // 10] * 10
        assert not set(rows(data.train)) & set(rows(data.validation))


def test_parts_depend_on_nothing_else():
    """A run with validation trains on the images that the run without it trains on; more images are those and more."""
    data = numbered(BALANCED)
    both, train, held = (chosen(data, *parts) for parts in ((200, 300), (200, 0), (None, 300)))
    torch.rand(3)
    assert rows(both.train) == rows(train.train) and rows(both.validation) == rows(held.validation)
    assert set(rows(chosen(data, 150, 0).train)) < set(rows(train.train)) != set(range(200))


def test_parts_are_in_proportion():
    labels = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    data = chosen(numbered(labels), 100, 200)
    assert torch.bincount(data.train.labels).tolist() == [90, 9, 1]
    assert torch.bincount(data.validation.labels).tolist() == [180, 18, 2]


@pytest.mark.parametrize("images", [13, 101, 999])
def test_any_number_of_images(images):
    data = chosen(numbered(BALANCED), images, 0)
    counts = torch.bincount(data.train.labels)
    assert len(data.train) == images and counts.max() - counts.min() <= 1


def test_data_that_fit_already():
    data = numbered(BALANCED)
    assert chosen(data, None, 0) is data and chosen(data, 1000, 0) is data
    held = chosen(data, 200, 300)
    assert chosen(held, 200, 300) is held and chosen(held, None, 0) is held
    fewer = chosen(held, 100, 300)
    assert len(fewer.train) == 100 and fewer.validation is held.validation


def test_means_are_those_of_the_part():
    data = chosen(numbered(BALANCED), 100, 300)
    assert float(data.mean) == pytest.approx(float(data.train.images.double().mean()), rel=1e-6)


@pytest.mark.parametrize(
    ("train_images", "validation", "text"),
    [
        (1001, 0, "train: train_images: expected at most 1000 of the 1000 that numbered has for training, got 1001"),
        (None, 1000, "train: validation: expected at most 999 of the 1000 that numbered has for training, got 1000"),
        (701, 300, "train: train_images: expected at most 700 of the 1000 that .*, as 300 are held out, got 701"),
        (9, 0, "train: train_images: expected images of each class of numbered, got 9, none of class '.'"),
        (None, 9, "train: validation: expected images of each class of numbered, got 9, none of class '.'"),
        (None, 995, "train: train_images: expected images of each class of numbered, got 5, none of class '.'"),
    ],
)
def test_numbers_that_are_refused(train_images, validation, text):
    with pytest.raises(ValueError, match=f"^{text}$"):
        chosen(numbered(BALANCED), train_images, validation)


def test_other_validation_images_than_the_data_have():
    with pytest.raises(ValueError, match="train: validation: expected 300, as numbered has them, got 200"):
        chosen(chosen(numbered(BALANCED), None, 300), None, 200)


def test_validation_images_that_are_in_the_test_set():
    data = numbered(BALANCED)
    held = Split(torch.cat((data.train.images[:3], data.test.images[:2])), torch.arange(5))
    text = (
        "data: numbered: validation: expected images that are not in the test set, got 2 of 5 there, "
        "the first at image 3"
    )
    with pytest.raises(ValueError, match=text):
        replace(data, validation=held)
    data.train.images[:500] = 255
    with pytest.raises(ValueError, match=r"not in the test set, got 1\d\d of 300 there, the first at image \d+$"):
        chosen(data, None, 300)


@pytest.mark.parametrize("label", [-1, 10])
def test_validation_labels_out_of_range(label):
    data = numbered(BALANCED)
    held = Split(data.train.images[:2], torch.tensor([0, label]))
    with pytest.raises(
        ValueError, match=rf"numbered: validation: expected labels in \[0, 10\), got {label} at image 1"
    ):
        replace(data, validation=held)


# ---- runs


def test_epochs_are_evaluated_on_what_is_held_out(tmp_path, monkeypatch):
    run = tiny_run(tmp_path, method="ghfp", validation=12, train_images=32, deterministic=True, epochs=2)
    assert (len(run.data.train), len(run.data.validation), len(run.data.test)) == (32, 12, 16)
    answered = []

    def watched(model, data, device, part=slice(None), split=None):
        answers = predictions(model, data, device, part, split)
        answered.append(len(answers))
        return answers

    for module in (loop, finalize):
        monkeypatch.setattr(module, "predictions", watched)
    run.run()
    assert answered == [12, 12]
    with run.masked():
        right = (predictions(run.model, run.data, run.device) == run.data.validation.labels).double().mean()
        assert accuracy(run.model, run.data, run.device) == run.history[-1]["accuracy"] == float(right)
        on_test = accuracy(run.model, run.data, run.device, run.data.test)
    del answered[:]
    monkeypatch.setattr(finalize, "SECONDS", 0.05)
    summary = finalize.finalize_run(run)
    assert (summary["accuracy"], summary["validation_accuracy"]) == (on_test, float(right))
    assert summary["test_images"] == 16 and answered == [16, 16]


def test_masks_are_evaluated_on_what_is_held_out():
    data = chosen(tiny_data(), None, 12)
    ((x, y),) = evaluation_batches(data)
    assert torch.equal(x, data.normalised(data.validation.images)) and torch.equal(y, data.validation.labels)
    assert sum(len(y) for _, y in evaluation_batches(tiny_data())) == 48


def test_parts_resume(tmp_path):
    given = {"method": "ghfp", "validation": 12, "train_images": 32, "deterministic": True}
    tiny_run(tmp_path / "whole", **given).run()
    tiny_run(tmp_path / "parts", stop_after=2, **given).run()
    run = Trainer.resumed(tmp_path / "parts", data=tiny_data())
    run.run()
    whole, parts = (checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    assert all(torch.equal(value, parts["model"][name]) for name, value in whole["model"].items())
    assert [row["accuracy"] for row in whole["history"]] == [row["accuracy"] for row in parts["history"]]
    for name, value in (("validation", 8), ("train_images", 31)):
        with pytest.raises(ValueError, match=f"train: {name}: expected .*, as in .*checkpoint.pt, got {value}"):
            Trainer.resumed(tmp_path / "parts", {name: value}, data=tiny_data())


def test_a_checkpoint_without_parts_resumes_on_all_images(tmp_path):
    tiny_run(tmp_path, stop_after=1).run()
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    for name in ("train_images", "validation", "evaluate"):
        del state["config"][name]
    checkpoint.save(tmp_path / "checkpoint.pt", state)
    assert len(Trainer.resumed(tmp_path, data=tiny_data()).data.train) == 48
    with pytest.raises(ValueError, match=r"expected its data, 48 \+ 16 images, crc .*, got 36 \+ 12 \+ 16 images"):
        Trainer.resumed(tmp_path, {"validation": 12}, data=tiny_data())


@pytest.mark.parametrize("method", ["none", "ghfp"])
def test_evaluation_at_the_end(tmp_path, method):
    given = {"method": method, "deterministic": True, "recalibrate": 0}  # which an evaluation may do
    each, end = tiny_run(tmp_path / "each", **given), tiny_run(tmp_path / "end", evaluate="end", **given)
    each.run()
    end.run()
    seen = [row["accuracy"] for row in end.history]
    assert [math.isnan(share) for share in seen] == [True, True, False]
    assert seen[-1] == each.history[-1]["accuracy"]
    assert all(torch.equal(value, end.model.state_dict()[name]) for name, value in each.model.state_dict().items())


def test_an_epoch_without_evaluation_is_told_without_accuracy(tmp_path, capsys):
    run = tiny_run(tmp_path, quiet=False, evaluate="end", epochs=2)
    run.run()
    first, last = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert "accuracy" not in first and "nan" not in first and f"accuracy {run.history[1]['accuracy']:.4f}" in last


def test_a_dense_run_beside_was_evaluated_on_the_same_images(tmp_path):
    tiny_run(tmp_path / "dense", epochs=1).run()
    given = tiny_config(tmp_path / "a", epochs=1, size=8, validation=100, beside=str(tmp_path / "dense")).as_dict()
    pytest.importorskip("sklearn")
    text = "train: beside: expected a run with as many images held out for validation, 100, got 0 in .*dense"
    with pytest.raises(ValueError, match=text):
        train(given)
    assert not (tmp_path / "a").exists()
