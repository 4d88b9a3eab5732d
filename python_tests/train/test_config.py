"""Config: what a run may be, and what may change when it goes on."""

import pytest

from prunekernels.train.config import DUTY, FREE, Config


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"arch": "lenet"}, "train: arch: expected one of vgg16_bn, .*, got 'lenet'"),
        ({"mode": "third"}, "train: mode: expected one of auto, masked, live, compacted, dense, got 'third'"),
        ({"rate": 1.0}, r"train: rate: expected a number in \[0, 1\), got 1.0"),
        ({"rate": -0.1}, r"train: rate: expected a number in \[0, 1\), got -0.1"),
        ({"rate": float("nan")}, "train: rate: .* got nan"),
        ({"duty": 1.5}, r"train: duty: expected a number in \[0, 1\], got 1.5"),
        ({"lr": 0}, "train: lr: expected a number above 0, got 0"),
        ({"lr": float("inf")}, "train: lr: expected a number above 0, got inf"),
        ({"momentum": -1}, "train: momentum: expected a number, at least 0, got -1"),
        ({"epochs": 0}, "train: epochs: expected at least 1, got 0"),
        ({"batch": 1}, "train: batch: expected at least 2, got 1"),
        ({"compile_after": -1}, "train: compile_after: expected at least 0, got -1"),
        ({"seed": -1}, r"train: seed: expected a number in \[0, 2\^32\), got -1"),
        ({"seed": 2**60}, r"train: seed: expected a number in \[0, 2\^32\), got 1152921504606846976"),
        ({"train_images": 0}, "train: train_images: expected at least 1, got 0"),
        ({"validation": -1}, "train: validation: expected at least 0, got -1"),
        ({"evaluate": "never"}, "train: evaluate: expected one of each, end, got 'never'"),
        ({"stop_after": 0}, "train: stop_after: expected at least 1, got 0"),
        ({"augment": "mixup"}, "train: augment: expected one of none, shift, .*, got 'mixup'"),
    ],
)
def test_values_that_are_refused(given, text):
    with pytest.raises(ValueError, match=text):
        Config("runs/a", **given)


def test_duty_is_that_of_its_time():
    """Said in the checkpoint, so that another version's default changes nothing."""
    assert (Config("runs/a").duty, Config("runs/a", method="sfp").duty) == (None, DUTY)
    assert Config("runs/a", method="sfp", duty=1.0).as_dict()["duty"] == 1.0
    saved = Config("runs/a", method="sfp").as_dict() | {"duty": 0.7}
    assert Config.resumed(saved, {}, "c.pt").duty == 0.7


def test_resumed_takes_what_moves_no_weight():
    saved = Config("runs/a", lr=0.3, stop_after=2).as_dict()
    config = Config.resumed(saved, {"out": "runs/b", "onnx": True, "lr": 0.3}, "c.pt")
    assert (config.out, config.onnx, config.lr, config.stop_after) == ("runs/b", True, 0.3, None)
    assert {"out", "onnx", "stop_after"} <= set(FREE)


@pytest.mark.parametrize(("gear", "mode"), [("network", "live"), ("layer", "masked"), ("dense", "dense")])
def test_gear_is_the_former_name_of_mode(gear, mode):
    with pytest.warns(DeprecationWarning, match="Config: gear is deprecated: use mode"):
        config = Config("runs/a", gear=gear)
    assert config == Config("runs/a", mode=mode) and "gear" not in config.as_dict()
    saved = config.as_dict()
    del saved["mode"]
    saved["gear"] = gear  # as in checkpoints of old
    assert Config.resumed(saved, {}, "c.pt").mode == mode
    assert Config.resumed(saved, {"mode": mode}, "c.pt") == Config.resumed(saved, {"gear": gear}, "c.pt")
    with pytest.raises(ValueError, match=f"train: mode: expected '{mode}', as in c.pt, got 'other'"):
        Config.resumed(saved, {"mode": "other"}, "c.pt")


def test_a_gear_that_was_none():
    with pytest.warns(DeprecationWarning), pytest.raises(ValueError, match="train: mode: expected .*, got 'third'"):
        Config("runs/a", gear="third")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("arch", "vgg_small"),
        ("method", "sfp"),
        ("epochs", 31),
        ("lr", 0.2),
        ("options", {"hard": 1.0}),
        ("data", "folder:x"),
        ("train_images", 100),
        ("validation", 10),
    ],
)
def test_resumed_refuses_what_does(name, value):
    saved = Config("runs/a", method="ghfp").as_dict()
    with pytest.raises(ValueError, match=f"train: {name}: expected .*, as in c.pt, got "):
        Config.resumed(saved, {name: value}, "c.pt")
