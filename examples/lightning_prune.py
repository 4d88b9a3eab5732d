"""Trains a small network with Lightning's Trainer while SFP prunes half of its filters, then keeps what is live.

python examples/lightning_prune.py --epochs 8
"""

import argparse
import tempfile

import torch
from ddp import network, stripes
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import prunekernels as pk
from prunekernels.integrations.lightning import PruningCallback

EXAMPLE = (2, 1, 16, 16)


class Stripes(LightningModule):
    """Tells the direction of stripes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.example_input_array = torch.randn(EXAMPLE)  # from which the callback knows the graph

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.net(x)
        return scores

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main(arguments: list[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--images", type=int, default=1024)
    given = parser.parse_args(arguments)

    torch.manual_seed(0)
    module, data = Stripes(), stripes(given.images)
    pruning = PruningCallback("sfp", rate=0.5, mode="auto", duty=0.2, coupling="joint")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=given.epochs, callbacks=[pruning, EMAWeightAveraging(decay=0.9)], gradient_clip_val=1.0,
            accelerator="cpu", devices=1, default_root_dir=folder, logger=False, enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(data, 32, shuffle=True), DataLoader(data, 256))
    print(pruning.method)
    small = pk.shrink(module.net.eval(), torch.randn(EXAMPLE, device=module.device))
    print(f"parameters: {sum(p.numel() for p in small.parameters())} of {sum(p.numel() for p in module.parameters())}")
    images, labels = data.tensors
    print(f"accuracy of the small network: {(small(images).argmax(1) == labels).float().mean():.3f}")
    return small


if __name__ == "__main__":
    main()
