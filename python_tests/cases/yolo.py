"""A data set of a few images, with one coloured box each, in the format of ultralytics; and a small network."""

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import prunekernels as pk
from cases.trainers import live_counts

YAML = {
    "nc": 2, "channels": 3, "scales": {"n": [1.0, 1.0, 1024]},
    "backbone": [
        [-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [16, 3, 2]], [-1, 1, "C2f", [16, True]],
        [-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [32, 3, 2]], [-1, 1, "SPPF", [32, 5]],
    ],
    "head": [
        [-1, 1, "nn.Upsample", ["None", 2, "nearest"]], [[-1, 3], 1, "Concat", [1]], [-1, 1, "C2f", [16]],
        [[8, 5], 1, "Detect", ["nc"]],
    ],
}  # fmt: skip


def write_data(folder, images=8, size=64):
    """Returns the path of data.yaml."""
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / kind / part).mkdir(parents=True, exist_ok=True)
        for i in range(images):
            label, x, y = i % 2, *(torch.randint(4, 28, (2,), generator=generator).tolist())
            pixels = torch.randint(0, 60, (size, size, 3), generator=generator).numpy().astype(np.uint8)
            pixels[y : y + 32, x : x + 32, label] = 220
            Image.fromarray(pixels).save(folder / "images" / part / f"{i}.png")
            centre = f"{(x + 16) / size} {(y + 16) / size}"
            (folder / "labels" / part / f"{i}.txt").write_text(f"{label} {centre} {32 / size} {32 / size}\n")
    file = folder / "data.yaml"
    file.write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames:\n  0: red\n  1: green\n")
    return file


def write_model(folder):
    """Returns the path of a model's yaml."""
    import yaml

    file = folder / "tinyn.yaml"
    file.write_text(yaml.safe_dump(YAML))
    return file


def arguments(folder, **options):
    """Those of YOLO.train; images are written where there are none."""
    data = folder / "data.yaml"
    return {
        "data": data if data.exists() else write_data(folder), "imgsz": 64, "epochs": 2, "batch": 4,
        "project": str(folder / "runs"), "plots": False, "verbose": False, "device": "cpu", "workers": 0,
        "optimizer": "SGD", "lr0": 0.01, "warmup_epochs": 0, "nbs": 4, "seed": 1, "mosaic": 0.0, **options,
    }  # fmt: skip


def go_offline():
    """Nothing is downloaded or sent; to be called before ultralytics is imported. It looks for a font, and has one."""
    if "ultralytics" in sys.modules or importlib.util.find_spec("ultralytics") is None:
        return
    folder = Path(tempfile.mkdtemp(prefix="ultralytics"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ.update(YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", YOLO_CONFIG_DIR=str(folder))
    (folder / "Ultralytics").mkdir()
    import matplotlib

    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    for place in (folder, folder / "Ultralytics"):
        shutil.copy(font, place / "Arial.ttf")


def two_ranks(rank, folder):
    """Trains on one of two processes. ultralytics starts them for GPUs alone; here they are on the CPU, and joined."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")  # read when it is imported
    go_offline()
    from ultralytics.engine import trainer as engine
    from ultralytics.models.yolo.detect import DetectionTrainer

    from prunekernels.integrations.ultralytics import PruningCallback

    class OnCpu(DetectionTrainer):
        def _setup_ddp(self):
            pass

        def final_eval(self):  # on a GPU
            pass

    class Wrapper(nn.parallel.DistributedDataParallel):
        def __init__(self, model, device_ids, **options):
            super().__init__(model, **options)

    engine.nn.parallel.DistributedDataParallel, barrier = Wrapper, torch.distributed.barrier
    torch.distributed.barrier = lambda **options: barrier()
    callback = PruningCallback("pgp", mode="auto", duty=0.5, fine_tune=1)
    training = OnCpu(overrides={**arguments(folder), "model": str(write_model(folder))})
    training.world_size = 2
    for event in ("on_pretrain_routine_end", "on_train_epoch_start", "on_train_epoch_end", "on_model_save"):
        training.add_callback(event, getattr(callback, event))
    training._do_train()
    model = callback.method.model
    pk.check_same_masks(model)
    pk.check_same_masks(training.ema.ema)
    return {"net": model.state_dict(), "live": live_counts(model), "chosen": callback.pruning.chosen}
