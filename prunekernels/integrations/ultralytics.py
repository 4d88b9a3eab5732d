"""add_pruning for the models of ultralytics (YOLO, RTDETR), and shrink for what they have trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from ultralytics.utils.torch_utils import unwrap_model

from ..graph.shrink import shrink as shrink_network
from ..methods import Method
from ..nn.convert import convert, restore
from .pruning import Pruning

KEY = "prunekernels"  # in checkpoints


def add_pruning(
    model: Any, method: str | type[Method] = "ghfp", *, rate: float = 0.5, mode: str = "auto", **options: Any
) -> PruningCallback:
    """Prunes what `model.train(...)` trains from now on. Arguments are those of `PruningCallback`.

    Args:
        model: A YOLO or another model of ultralytics.
    """
    callback = PruningCallback(method, rate=rate, mode=mode, **options)
    for event in ("on_pretrain_routine_end", "on_train_epoch_start", "on_train_epoch_end", "on_model_save"):
        model.add_callback(event, getattr(callback, event))
    return callback


class PruningCallback:
    """Prunes the network of an ultralytics trainer, and its EMA with it.

    The trainer builds a network of its own, so that is converted once it is there. Checkpoints hold plain layers, with
    zeros where filters are dead; masks and the method's state are beside them (`shrink` reads them).

    Args:
        method: A name ("ghfp", "pgp", ...) or a class of `prunekernels.methods`.
        rate: The share of filters that is pruned in the end.
        mode: "auto", "masked" or "live".
        options: The others of `prunekernels.integrations.pruning.Pruning`: epochs (the trainer's by default),
            followers, filter_fn, and keywords of the method; example_input is an image of the trainer's size.
    """

    def __init__(
        self, method: str | type[Method] = "ghfp", *, rate: float = 0.5, mode: str = "auto", **options: Any
    ) -> None:
        self.pruning = Pruning(method, rate=rate, mode=mode, **options)
        self._at_start: dict[str, Any] = {}  # of this epoch

    @property
    def method(self) -> Method | None:
        """The pruning method; None before training."""
        return self.pruning.method

    def on_pretrain_routine_end(self, trainer: Any) -> None:
        model = unwrap_model(trainer.model)
        self.pruning.reset()
        self.pruning.convert(model, trainer.ema.ema)
        if trainer.resume:
            saved = _load(trainer.args.resume).get(KEY)
            if saved is not None:
                self.pruning.load_state_dict(saved["state"])
        image = torch.zeros(1, trainer.data.get("channels", 3), trainer.args.imgsz, trainer.args.imgsz)
        self.pruning.begin(
            model, trainer.optimizer, trainer.epochs, epoch=trainer.start_epoch, example_input=image,
            followers=[lambda: trainer.ema],
        )  # fmt: skip
        # The event "optimizer_step" exists, but no trainer calls it; and gradients are clipped inside of the step.
        trainer.optimizer_step = self._around(trainer.optimizer_step)

    def _around(self, step: Callable[[], None]) -> Callable[[], None]:
        def optimizer_step() -> None:
            self.pruning.before_clipping()
            step()
            self.pruning.step()

        return optimizer_step

    def on_train_epoch_start(self, trainer: Any) -> None:
        if getattr(trainer, "nan_recovery_attempts", 0):  # the weights are those of the last checkpoint
            self.pruning.load_state_dict(self._at_start)
        else:
            self._at_start = self.pruning.state_dict()

    def on_train_epoch_end(self, trainer: Any) -> None:
        assert self.method is not None
        if not self.method.finished:  # the best network is one with the masks to come
            trainer.best_fitness = None
            trainer.stopper.best_fitness, trainer.stopper.best_epoch = 0.0, trainer.epoch
        self.pruning.end_epoch()

    def on_model_save(self, trainer: Any) -> None:
        checkpoint = _load(trainer.last)
        masked = checkpoint["ema"].state_dict()
        restore(checkpoint["ema"])
        plain = checkpoint["ema"].state_dict()
        masks = {name: value.clone() for name, value in masked.items() if name not in plain}
        checkpoint[KEY] = {"state": self.pruning.state_dict(), "masks": masks}
        files = [trainer.last]
        if trainer.best_fitness == trainer.fitness:
            files.append(trainer.best)
        if trainer.save_period > 0 and trainer.epoch % trainer.save_period == 0:
            files.append(trainer.wdir / f"epoch{trainer.epoch}.pt")
        for file in files:
            torch.save(checkpoint, file)


def shrink(model: Any, *, imgsz: int | None = None) -> nn.Module:
    """Makes the network of a model that was trained with pruning, or loaded from its checkpoint, small for good.

    Args:
        model: A YOLO or another model of ultralytics.
        imgsz: Side of the images to compare with. None: that of the training.

    Returns:
        The small network, which is now `model.model`: it predicts, exports and saves as any other.
    """
    saved = (model.ckpt or {}).get(KEY)
    if saved is None:
        raise ValueError("shrink: model: expected one that add_pruning has pruned, got a checkpoint without masks")
    network: nn.Module = model.model.float()
    convert(network)
    network.load_state_dict(saved["masks"], strict=False)
    size = imgsz if imgsz is not None else int(model.overrides.get("imgsz", 640))
    first = next(p for p in network.parameters() if p.dim() == 4)
    image = torch.zeros(1, first.shape[1], size, size, device=first.device)
    small: Any = shrink_network(network.eval(), image)
    for block in small.modules():
        if hasattr(block, "forward_split"):  # takes the place of forward in exports, and splits in halves by number
            block.c = block.cv1.conv.out_channels // 2
    model.model, model.predictor = small, None
    return model.model  # type: ignore[no-any-return]


def _load(file: Any) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=False)  # whole modules, as theirs
    return checkpoint
