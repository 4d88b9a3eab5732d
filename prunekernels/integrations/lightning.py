"""PruningCallback for Lightning's Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback, LightningModule, Trainer
    except ImportError:  # the other name of the same library
        from pytorch_lightning import Callback, LightningModule, Trainer

from ..methods import Method
from ..nn.masked_filters import MaskedFilters
from ..optim.unwrap import unwrap
from .pruning import OP, Pruning


class PruningCallback(Callback):
    """Prunes the LightningModule that a Trainer fits: `Trainer(callbacks=[PruningCallback("ghfp", rate=0.5)])`.

    Its layers are converted when fitting, validating, testing or predicting is set up. Checkpoints hold the masks with
    the weights and the method's state with the callbacks'. Averages of WeightAveraging callbacks follow.

    Args:
        method: A name ("ghfp", "pgp", ...) or a class of `prunekernels.methods`.
        rate: The share of filters that is pruned in the end.
        mode: "auto", "masked" or "live".
        options: The others of `prunekernels.integrations.pruning.Pruning`: epochs (the Trainer's max_epochs by
            default), followers, filter_fn, and keywords of the method; example_input is the LightningModule's
            example_input_array by default.
    """

    def __init__(
        self, method: str | type[Method] = "ghfp", *, rate: float = 0.5, mode: str = "auto", **options: Any
    ) -> None:
        self.pruning = Pruning(method, rate=rate, mode=mode, **options)
        self._steps = 0  # of this batch

    @property
    def method(self) -> Method | None:
        """The pruning method; None before fitting."""
        return self.pruning.method

    @property
    def state_key(self) -> str:
        return "prunekernels.PruningCallback"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.pruning.reset()
        averages = (average.module for callback in _averaging(trainer) if (average := callback._average_model))
        self.pruning.convert(pl_module, *averages)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = {p for module in pl_module.modules() if isinstance(module, MaskedFilters) for p in module.parameters()}
        held = [sum(p in layers for group in o.param_groups for p in group["params"]) for o in trainer.optimizers]
        optimizer = trainer.optimizers[held.index(max(held))] if held else None
        self.pruning.begin(
            pl_module, unwrap(OP, optimizer, pl_module), trainer.max_epochs, epoch=trainer.current_epoch,
            example_input=getattr(pl_module, "example_input_array", None), followers=_averaging(trainer),
        )  # fmt: skip

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.pruning.begin_epoch(trainer.current_epoch)  # no hook of an epoch's start is called after each resumption

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self.method is not None and optimizer is self.method.optimizer:
            self._steps += 1
            self.pruning.before_clipping()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for _ in range(self._steps):  # none while gradients accumulate, several in manual optimization
            self.pruning.step()
        self._steps = 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pruning.end_epoch()

    def state_dict(self) -> dict[str, Any]:
        return self.pruning.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.pruning.load_state_dict(state_dict)


def _averaging(trainer: Trainer) -> list[Any]:
    """The callbacks that average the weights."""
    callbacks: list[Any] = getattr(trainer, "callbacks")  # noqa: B009  # set where no checker looks
    return [callback for callback in callbacks if hasattr(callback, "_average_model")]
