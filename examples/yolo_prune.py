"""Trains a YOLO on images that it draws itself while PGP prunes half of its filters, then exports the small network.

python examples/yolo_prune.py --model yolov8n.yaml --epochs 6
"""

import argparse
import tempfile
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from ultralytics import YOLO

from prunekernels.integrations.ultralytics import add_pruning, shrink

SIDE = 96


def draw(folder: Path, count: int) -> Path:
    """Writes noisy images with a red or a green square each. Returns the path of data.yaml."""
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / kind / part).mkdir(parents=True)
        for i in range(count):
            side = int(torch.randint(24, 48, (), generator=generator))
            x, y = (int(torch.randint(SIDE - side, (), generator=generator)) for _ in "xy")
            pixels = torch.randint(90, (SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
            pixels[y : y + side, x : x + side, i % 2] = 200
            Image.fromarray(pixels.numpy()).save(folder / "images" / part / f"{i}.png")
            row = [(x + side / 2) / SIDE, (y + side / 2) / SIDE, side / SIDE, side / SIDE]
            (folder / "labels" / part / f"{i}.txt").write_text(f"{i % 2} {' '.join(map(str, row))}\n")
    file = folder / "data.yaml"
    file.write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames:\n  0: red\n  1: green\n")
    return file


def main(arguments: list[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="yolov8n.yaml")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--out", type=Path, help="folder for the small network; none: it is not kept")
    given = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as folder:
        model = YOLO(given.model)
        pruning = add_pruning(model, "pgp", rate=0.5, mode="auto", duty=0.2, coupling="joint")
        model.train(
            data=draw(Path(folder) / "data", given.images), imgsz=SIDE, epochs=given.epochs, batch=16, device="cpu",
            project=str(Path(folder) / "runs"), plots=False,
        )  # fmt: skip
        print(pruning.method)
        dense = sum(p.numel() for p in model.model.parameters())
        small = shrink(model)
        print(f"parameters: {sum(p.numel() for p in small.parameters())} of {dense}")
        out = given.out or Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        model.save(out / "small.pt")
        model.ckpt_path = model.model.pt_path = str(out / "small.pt")  # the exported file lies beside it
        print(f"exported {model.export(format='torchscript', imgsz=SIDE)}")
    return small


if __name__ == "__main__":
    main()
