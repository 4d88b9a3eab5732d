"""PruningCallback for the Trainer of transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..methods import Method
from ..train.checkpoint import read_plain
from .pruning import OP, Pruning

FILE = "pruning.pt"  # in the folder of each checkpoint


class PruningCallback(TrainerCallback):
    """Prunes the model of a Trainer: `Trainer(model, args, callbacks=[PruningCallback("ghfp", rate=0.5)])`.

    The model's layers are converted when the Trainer is made. Checkpoints hold the masks with the weights, and the
    method's state in a file of its own.

    Args:
        method: A name ("ghfp", "pgp", ...) or a class of `prunekernels.methods`.
        rate: The share of filters that is pruned in the end.
        mode: "auto", "masked" or "live".
        resume_from: The folder of the checkpoint to resume from, where that is neither in the Trainer's output_dir nor
            in its arguments. False: pruning begins now, whatever the Trainer resumes from.
        options: The others of `prunekernels.integrations.pruning.Pruning`: epochs (the Trainer's by default),
            followers, filter_fn, and keywords of the method.
    """

    def __init__(
        self,
        method: str | type[Method] = "ghfp",
        *,
        rate: float = 0.5,
        mode: str = "auto",
        resume_from: str | os.PathLike[str] | bool | None = None,
        **options: Any,
    ) -> None:
        self.pruning, self.resume_from = Pruning(method, rate=rate, mode=mode, **options), resume_from
        self._max_norm: float | None = None  # the Trainer's max_grad_norm, while this clips in its stead

    @property
    def method(self) -> Method | None:
        """The pruning method; None before training."""
        return self.pruning.method

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if kwargs.get("model") is not None:
            self.pruning.convert(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        self.pruning.reset()
        self.pruning.convert(model)
        if state.global_step > 0 and self.resume_from is not False:
            self.pruning.load_state_dict(self._saved(args, state.global_step))
        self.pruning.begin(model, kwargs["optimizer"], state.num_train_epochs, epoch=_epochs_over(state))

    def _saved(self, args: TrainingArguments, step: int) -> dict[str, Any]:
        folders = [self.resume_from, args.resume_from_checkpoint, Path(str(args.output_dir), f"checkpoint-{step}")]
        files = [Path(folder) / FILE for folder in folders if isinstance(folder, (str, os.PathLike))]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            tried = ", ".join(str(file.parent) for file in files)
            raise FileNotFoundError(f"{OP}: resume_from: expected a folder with {FILE}, got none among {tried}")
        saved: dict[str, Any] = read_plain(file, f"{OP}: {file}: expected what this callback wrote")
        return saved

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.pruning.begin_epoch(_epochs_over(state))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Where gradients of soft-dead filters are scaled down, that comes first: the Trainer clips before it asks."""
        if self.method is not None and self.method.clip is not None and self.method.clip.is_due:
            self._max_norm, args.max_grad_norm = args.max_grad_norm, 0.0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._max_norm is None:
            return
        args.max_grad_norm, self._max_norm = self._max_norm, None
        self.pruning.before_clipping()
        if args.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(kwargs["model"].parameters(), args.max_grad_norm)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.pruning.step()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.pruning.end_epoch()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            torch.save(self.pruning.state_dict(), Path(str(args.output_dir), f"checkpoint-{state.global_step}", FILE))


def _epochs_over(state: TrainerState) -> int:
    return int((state.epoch or 0) + 1e-6)
