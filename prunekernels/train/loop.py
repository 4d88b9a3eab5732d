"""Trainer: trains a run's network epoch by epoch, with checkpoints and a history.

run = Trainer(Config("runs/a", method="ghfp", epochs=30))
run.run()
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import plan
from ..methods import PGP, recalibrate_norms
from ..nn.process_groups import world_size
from ..nn.ranks import check_same_masks
from . import checkpoint, distributed, setup
from .config import FREE, Config
from .data import Data, Split, load, steps_per_epoch, train_batches
from .dense_step import DenseStep, choose, chosen_before
from .loggers import Loggers
from .modes import Modes, computed_share
from .progress import Progress, say
from .subsets import chosen

CHECKPOINT = "checkpoint.pt"
EVALUATION_BATCH = 256
CHECK_EVERY = 20  # steps between two checks of the loss where reading it makes the host wait for a device or for ranks


class Trainer:
    """Trains the network of a run. Nothing is written before `run` has trained an epoch.

    In a process group of torch.distributed it trains on all ranks: each makes a Trainer, rank 0 writes.

    Args:
        config: The run's settings.
        data: The data set, of which config chooses images to train on and to hold out. None: that of config.
        state: A checkpoint's state, to go on from.
        model: The network to train, without masks. None: that of config.

    Attributes:
        ranks: The number of processes that train together.
        dense: The memory layout of the network, and whether dense steps are in bfloat16.
        history: A row of numbers by epoch; the accuracy of one that was not evaluated is nan.
        states: By epoch, uint8 [filters of all layers]: 0 live, 1 soft-dead, 2 hard-dead.
        recalibrate_seconds: What estimating the norms' statistics took at the last evaluation; no epoch's seconds have
            it.
    """

    def __init__(
        self,
        config: Config,
        *,
        data: Data | None = None,
        state: Mapping[str, Any] | None = None,
        model: nn.Module | None = None,
    ) -> None:
        setup.class_of(config)
        if config.small_of is not None and model is None:
            got = f"none for that of {config.small_of}: train() makes it"
            raise ValueError(f"train: model: expected a small network with new weights, got {got}")
        self.config, self.out = config, Path(config.out)
        self.data = chosen(data or load(config.data, config.size), config.train_images, config.validation)
        self.ranks, self.quiet = world_size(), config.quiet or distributed.rank() > 0
        self.batch = min(config.batch, len(self.data.train))  # of all ranks together
        self._check_ranks()
        self.device = setup.device_of(config)
        torch.manual_seed(config.seed)
        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)
        self.model = setup.network(config, self.data) if model is None else setup.placed(config, model)
        self.dense = self._dense_step(state)
        self.model = setup.set_mode(config, self.dense.of(self.model))
        self.optimizer = setup.optimizer_of(config, self.model)
        with setup.numerics(config):
            self.method = setup.method_of(config, self.model, self.optimizer, self.data)
        self.layers = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Conv2d)}
        self.history: list[dict[str, float]] = []
        self.states: list[Tensor] = []  # uint8 [filters], an epoch each
        self.epoch, self.recalibrate_seconds = 0, 0.0
        self.augment = config.augment or self.data.augment
        self._loggers = Loggers(config.log or (), self.out, config.as_dict())
        self.modes = Modes(config, self.model, self.optimizer, self.method, self._say, self.dense)
        if state is not None:
            self._restore(state)

    def _dense_step(self, state: Mapping[str, Any] | None) -> DenseStep:
        """The layout of the network, and whether dense steps are in bfloat16: chosen once, or as before."""
        if state is not None:
            return chosen_before(self.config, self.device, state["modes"])
        step, line = distributed.from_rank_0(lambda: choose(self.config, self.model, self.first_batch))
        if line is not None:
            self._say(line)
        return step

    def first_batch(self) -> tuple[Tensor, Tensor]:
        """The images and labels that one rank has of a batch, not augmented."""
        x, y = next(train_batches(self.data, self.config.batch, self.config.seed, 0, "none"))
        own = slice(len(y) // self.ranks)
        return self.data.normalised(x[own].to(self.device)), y[own].to(self.device)

    def _check_ranks(self) -> None:
        """All ranks have the same settings and data, and images for each step."""
        if self.ranks == 1:
            return
        settings = {name: value for name, value in self.config.as_dict().items() if name not in FREE}
        distributed.check_same(settings | {"data": f"{self.config.data}: {self.data.fingerprint}"})
        if self.batch < 2 * self.ranks:
            expected = f"at least 2 images for each of the {self.ranks} ranks"
            raise ValueError(f"train: batch: expected {expected}, got {self.batch}")

    @classmethod
    def resumed(
        cls,
        out: str | Path,
        given: Mapping[str, Any] | None = None,
        *,
        data: Data | None = None,
        model: nn.Module | None = None,
    ) -> Trainer:
        """Returns the run in a folder as it was at its last checkpoint.

        Args:
            out: The folder.
            given: Settings to change (see Config.resumed).
            data: The data set. None: that of the settings.
            model: The network, if the run was made with one of its own.
        """
        path = Path(out) / CHECKPOINT
        state = distributed.from_rank_0(lambda: checkpoint.load(path))
        return cls(
            Config.resumed(state["config"], {**(given or {}), "out": str(out)}, path),
            data=data,
            state=state,
            model=model,
        )

    def run(self) -> None:
        """Trains the epochs that are left, or those up to stop_after, and writes a checkpoint after each."""
        try:
            while self.epoch < self._last_epoch:
                self.run_epoch()
                distributed.from_rank_0(self._save)
        finally:
            self._loggers.close()

    @property
    def _last_epoch(self) -> int:
        return min(self.config.epochs, self.config.stop_after or self.config.epochs)

    def _save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        checkpoint.save(self.out / CHECKPOINT, self.state())

    def run_epoch(self) -> None:
        """Trains one epoch, lets the method prune and evaluates, on the validation set or else on the test set."""
        with setup.numerics(self.config):
            row = self._train()
        states = self.filter_states()
        is_evaluated = self.config.evaluate == "each" or self.epoch + 1 == self.config.epochs
        row |= {
            "accuracy": self._accuracy() if is_evaluated else math.nan,
            "live": float((states == 0).double().mean()),
        }
        check_same_masks(self.model)
        self.epoch += 1
        self.history.append(row)
        self.states.append(states)
        if not self.quiet:
            ranks = f"  masks equal on all {self.ranks} ranks" if self.ranks > 1 else ""
            say(_line(self.epoch, self.config.epochs, row) + ranks)
        if self.config.log and distributed.rank() == 0:
            report = self.method.report() if self.method is not None else {}
            self._loggers.log({**row, **{f"method/{name}": value for name, value in report.items()}}, self.epoch)

    def _accuracy(self) -> float:
        """The share of right answers with all dead filters masked; each rank answers for its share of the images."""
        labels = self.data.judged.labels
        own = distributed.share(len(labels))
        norms = [m for m in self.model.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]
        statistics: list[Any] = [value for norm in norms for value in (norm.running_mean, norm.running_var)]
        before = [buffer.clone() for buffer in statistics]
        with self.masked():
            begun = time.perf_counter()
            self._recalibrate()
            self.recalibrate_seconds = time.perf_counter() - begun
            right = (predictions(self.model, self.data, self.device, own) == labels[own]).sum()
            if self.epoch + 1 < self.config.epochs:  # to evaluate changes nothing of the epochs to come
                for buffer, value in zip(statistics, before, strict=True):
                    buffer.copy_(value)
        return int(distributed.summed(right.to(self.device))) / len(labels)

    def _recalibrate(self) -> None:
        """Estimates the norms' statistics anew where filters are masked that were not in this epoch's last steps."""
        config, states = self.config, self.filter_states()
        was_hard = self.states[-1] == 2 if self.states else torch.zeros_like(states, dtype=torch.bool)
        if not config.recalibrate or torch.equal(states > 0, was_hard):
            return
        if any(isinstance(module, nn.BatchNorm2d) for module in self.model.modules()):
            batches = train_batches(self.data, config.batch, config.seed, self.epoch, "none", distributed.share)
            images = (self.on_device(x, y)[0] for x, y in islice(batches, config.recalibrate))
            recalibrate_norms(self.model, images)

    def masked(self) -> AbstractContextManager[None]:
        """Masks all dead filters within a `with` block, whichever phase the method is in."""
        return self.method.masked() if self.method is not None else nullcontext()

    def filter_states(self) -> Tensor:
        """uint8 [filters of all layers]: 0 live, 1 soft-dead, 2 hard-dead."""
        known = self.method.states if self.method is not None else {}
        live = {name: torch.zeros(layer.out_channels, dtype=torch.uint8) for name, layer in self.layers.items()}
        return torch.cat([known.get(name, zeros).cpu().to(torch.uint8) for name, zeros in live.items()])

    def _train(self) -> dict[str, float]:
        """Trains one epoch and ends it for the method. Returns the epoch's row of the history."""
        config, steps = self.config, steps_per_epoch(self.data, self.config.batch)
        self.model.train()
        batches = self._batches()
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss, right answers
        images, computed, begun = 0, [], time.perf_counter()
        reads_each = self.device.type == "cpu" and self.ranks == 1
        text, more = f"epoch {self.epoch + 1}/{config.epochs}", (self._last_epoch - self.epoch - 1) * steps
        with Progress(steps, text, more=more, enabled=not self.quiet) as bar:
            for step, (x, y) in enumerate(batches):
                totals += self._step(x, y, learning_rate(config, self.epoch + step / steps))
                images += self.batch
                is_time = step % CHECK_EVERY == 0 or step == steps - 1
                if is_time or self.device.type == "cpu":
                    computed.append(computed_share(self.layers.values()))
                if is_time or reads_each:
                    loss, right = (distributed.summed(totals) / images).tolist()
                    self._check_loss(loss, step)
                    rate = images / (time.perf_counter() - begun)
                    note = f"loss {loss:.3f}  accuracy {right:.3f}  live {computed[-1]:.2f}  {rate:.0f} images/s"
                    bar.update(step + 1, note)
            if self.method is not None:
                self.method.leave()
            distributed.average_statistics(self.model)
            if self.method is not None:
                if isinstance(self.method, PGP) and config.measure and not self.method.finished:
                    self.method.measure(self._losses())
                self.method.end_epoch()
        seconds = time.perf_counter() - begun
        return {
            "loss": loss, "train_accuracy": right, "seconds": seconds, "images_per_s": images / seconds,
            "computed": sum(computed) / len(computed),
        }  # fmt: skip

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's shares of the epoch's batches."""
        config = self.config
        return train_batches(self.data, config.batch, config.seed, self.epoch, self.augment, distributed.share)

    def _weighted(self, loss: Tensor, images: int) -> Tensor:
        """A mean over this rank's images, such that the mean over the ranks is the mean over the batch."""
        return loss if self.ranks == 1 else loss * (images * self.ranks / self.batch)

    def on_device(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """A batch as the network takes it."""
        x, y = self.data.normalised(x.to(self.device)), y.to(self.device)
        return self.dense.laid_out(x), y

    def _step(self, x: Tensor, y: Tensor, lr: float) -> Tensor:
        """Makes one optimizer step. Returns float64 [2]: the sum of the losses and the number of right answers."""
        x, y = self.on_device(x, y)
        net, optimizer = self.modes.at_step(x, y)
        x = self.modes.laid_out(x)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        with self.modes.autocast():
            scores = net(x)
            loss = F.cross_entropy(scores.float(), y)
        self._weighted(loss, len(y)).backward()
        optimizer.step()
        self.modes.step_ended()
        if self.method is not None:
            self.method.step()
        right = (scores.detach().argmax(1) == y).sum()
        return torch.stack((loss.detach().double() * len(y), right.double()))

    def _losses(self) -> Iterator[Tensor]:
        """The losses of this epoch's batches, for PGP.measure."""
        for x, y in self._batches():
            x, y = self.on_device(x, y)
            with self.modes.autocast():
                loss = F.cross_entropy(self.modes.whole(self.modes.laid_out(x)).float(), y)
            yield self._weighted(loss, len(y))

    def _say(self, line: str) -> None:
        """Prints a line, above the progress bar."""
        if not self.quiet:
            say(line)

    def _check_loss(self, loss: float, step: int) -> None:
        if math.isfinite(loss):
            return
        kept = f"{self.out / CHECKPOINT} of epoch {self.epoch} is kept" if self.epoch else "nothing was written"
        where = f"epoch {self.epoch + 1}, step {step + 1}, at lr {self.optimizer.param_groups[0]['lr']:.3g}"
        raise FloatingPointError(f"train: loss: expected a finite number, got {loss} in {where}; {kept}")

    def state(self) -> dict[str, Any]:
        """Returns all that the next epochs depend on, as plain values and tensors.

        The order of images is not among it: it follows from seed and epoch.
        """
        return {
            "config": self.config.as_dict(), "epoch": self.epoch, "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(), "random": checkpoint.random_state(), "history": self.history,
            "method": self.method.state_dict() if self.method is not None else None, "states": self.states,
            "layers": {name: layer.out_channels for name, layer in self.layers.items()},
            "data": self.data.fingerprint, "modes": self.modes.state_dict(),
        }  # fmt: skip

    def _restore(self, state: Mapping[str, Any]) -> None:
        layers = {name: layer.out_channels for name, layer in self.layers.items()}
        where = f"train: resume: {self.out / CHECKPOINT}"
        if state["layers"] != layers:
            raise ValueError(f"{where}: expected the layers of {self.config.arch}, got those of another network")
        if state["data"] != self.data.fingerprint:
            raise ValueError(f"{where}: expected its data, {state['data']}, got {self.data.fingerprint}")
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.method is not None:
                self.method.load_state_dict(state["method"])
            self.modes.load_state_dict(state["modes"])
            self.epoch, self.history, self.states = int(state["epoch"]), list(state["history"]), list(state["states"])
            checkpoint.set_random_state(state["random"])
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}: expected this run's state, got {type(error).__name__}: {error}") from error


def learning_rate(config: Config, epoch: float) -> float:
    """lr / 2 (1 + cos(pi epoch / epochs)): a cosine from lr to 0. epoch: with its fraction."""
    return config.lr * 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))


@torch.no_grad()
def accuracy(model: nn.Module, data: Data, device: torch.device, split: Split | None = None) -> float:
    """The share of images that the model classifies right, in eval mode. split: of these images; None: data.judged."""
    split = split or data.judged
    return float((predictions(model, data, device, split=split) == split.labels).double().mean())


@torch.no_grad()
def predictions(
    model: nn.Module, data: Data, device: torch.device, part: slice = slice(None), split: Split | None = None
) -> Tensor:
    """The class of each image, int64 [images], in eval mode; afterwards the model is in the mode it was in.

    part: which of the images; split: of these images; None: data.judged.
    """
    images = (split or data.judged).images[part]
    training = model.training
    model.eval()
    with plan.measure(False):  # too few passes to be worth timing plans for
        answers = [model(data.normalised(x.to(device))).argmax(1).cpu() for x in images.split(EVALUATION_BATCH)]
    model.train(training)
    return torch.cat(answers)


def _line(epoch: int, epochs: int, row: Mapping[str, float]) -> str:
    right = "" if math.isnan(row["accuracy"]) else f"accuracy {row['accuracy']:.4f}  "
    return (
        f"epoch {epoch:>{len(str(epochs))}}/{epochs}  loss {row['loss']:.4f}  {right}"
        f"live {row['live']:.3f}  {row['seconds']:.2f} s  {row['images_per_s']:.0f} images/s"
    )
