"""Made-up rows of benchmarks/methods.py."""

from trainings.rows import TrainingRow
from trainings.yardstick import FORMS


def training_row(**given):
    """A run of 8 epochs of 10 steps; a dense step takes 1 s in float32 and 0.5 s in bfloat16, a small one half of it.

    given: in place of what follows. points: the accuracy in %.
    """
    dense = {form: 1000.0 if form.startswith("fp32") else 500.0 for form in FORMS}
    if "points" in given:
        given["accuracy"] = given.pop("points") / 100
    common = {
        "arch": "vgg_small", "kind": "method", "seed": 0, "epochs": 8, "method": "ghfp", "rate": 0.5, "duty": 0.1,
        "options": {}, "key": "100-a", "setting": "digits", "accuracy": 0.9, "train_accuracy": 0.95, "seconds": 20.0,
        "setup_seconds": 4.0, "epoch_seconds": [2.0] * 8, "steps": 10, "dense_step_ms": dense,
        "small_step_ms": {form: ms / 2 for form, ms in dense.items()}, "computed": [0.5] * 8, "live": [0.5] * 8,
        "soft": [4] * 8, "came_back": [None, 0.2, 0.1, 0.0, 0.9, 0.0, 0.0, 0.0], "multiply_adds": 25,
        "dense_multiply_adds": 100, "parameters": 30, "dense_parameters": 100, "ms_1": 1.0, "dense_ms_1": 1.0,
        "ms_64": 2.0, "dense_ms_64": 8.0, "masks": {"filter_mask": "f0"},
    }  # fmt: skip
    if given.get("kind") in ("dense", "scratch"):
        common |= {"method": "none", "rate": 0.0, "duty": 1.0}
    if given.get("kind") == "dense":
        common |= {"key": "", "small_step_ms": dense}
    return TrainingRow(**common | given)
