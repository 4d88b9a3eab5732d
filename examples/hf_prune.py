"""Trains a ResNet of transformers with its Trainer while GHFP prunes half of its filters, then keeps what is live.

python examples/hf_prune.py --epochs 6
"""

import argparse
import tempfile

import torch
from ddp import stripes
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import prunekernels as pk
from prunekernels.integrations.transformers import PruningCallback


def main(arguments: list[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=1024)
    given = parser.parse_args(arguments)

    torch.manual_seed(0)
    config = ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic",
        id2label={label: str(label) for label in range(4)},
    )  # fmt: skip
    model, data = ResNetForImageClassification(config), stripes(given.images)
    images, labels = data.tensors
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    example = {"pixel_values": torch.randn(2, 1, 16, 16)}
    pruning = PruningCallback("ghfp", rate=0.5, mode="auto", duty=0.2, coupling="joint", example_input=example)
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            folder, num_train_epochs=given.epochs, per_device_train_batch_size=32, learning_rate=5e-3, use_cpu=True,
            save_strategy="epoch", save_total_limit=1, report_to=[],
        )  # fmt: skip
        Trainer(model, training, train_dataset=rows, callbacks=[pruning]).train()
    print(pruning.method)
    small = pk.shrink(model.eval(), example)
    print(f"parameters: {sum(p.numel() for p in small.parameters())} of {sum(p.numel() for p in model.parameters())}")
    with torch.no_grad():
        right = small(pixel_values=images).logits.argmax(1) == labels
    print(f"accuracy of the small network: {right.float().mean():.3f}")
    return small


if __name__ == "__main__":
    main()
