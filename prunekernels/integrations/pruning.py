"""Pruning: what the callbacks of all training libraries share. Each calls it when its library says that it is time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..inspect.modes import time_modes
from ..methods import Method
from ..methods.arguments import expect, keyword_options
from ..nn.convert import convert
from ..nn.example import Example
from ..nn.flow import flow
from ..train.distributed import from_rank_0
from ..train.setup import known_methods
from .caught import CaughtCall

MODES = ("auto", "masked", "live")
SHARES = 10  # a choice of auto serves all masks that leave about as many tenths of the filters live
OP = "PruningCallback"
OWN = ("state", "followers", "mode")  # keywords of methods that are not handed on as they are

_log = logging.getLogger("prunekernels")


class Pruning:
    """A pruning method in a training that someone else's loop runs. The arguments are those of every callback.

    Args:
        method: The method, by its name on the command line ("ghfp", "prune-while-training") or by its class.
        rate: The share of filters that is pruned in the end.
        epochs: How many epochs prune. None: as many as the trainer has, or has left where pruning comes to a training
            that resumes.
        mode: "masked" or "live"; "auto" measures both on a step of the training, when masks leave another tenth of the
            filters live. Compacted mode trains a network that these trainers do not hold.
        followers: Averages of the model that get every change of masks as well. Those that a trainer keeps by itself
            (ultralytics' EMA, Lightning's WeightAveraging) follow without being named.
        filter_fn: filter_fn(name, module) says which layers are converted, as in `prunekernels.convert`. None: all.
        options: Other keywords of the method: duty, coupling, example_input, skip, ...

    Attributes:
        method: The method; None before training begins.
        now: The mode that the network is in.
        chosen: By tenths of the filters that are live, the mode that was measured to be the faster one.
    """

    def __init__(
        self,
        method: str | type[Method] = "ghfp",
        *,
        rate: float = 0.5,
        epochs: int | None = None,
        mode: str = "auto",
        followers: Sequence[Any] = (),
        filter_fn: Callable[[str, nn.Module], bool] | None = None,
        **options: Any,
    ) -> None:
        known = {name: cls for name, cls in known_methods().items() if cls is not None}
        found = known.get(method) if isinstance(method, str) else method
        expect(OP, found is not None, "method", f"one of {', '.join(known)} or a class", repr(method))
        assert found is not None
        expect(OP, mode in MODES, "mode", f"one of {', '.join(MODES)}", repr(mode))
        names = [name for name in keyword_options(found) if name not in OWN]
        for name in options:
            expect(OP, name in names, "options", f"some of {', '.join(names)}", repr(name))
        self.cls, self.rate, self.epochs, self.mode, self.options = found, rate, epochs, mode, options
        self.followers, self.filter_fn = list(followers), filter_fn
        self.method: Method | None = None
        self.now, self.chosen = "masked", dict[str, str]()
        self._state: dict[str, Any] | None = None  # to begin from
        self._before = 0  # epochs that were over when pruning began
        self._caught: CaughtCall | None = None
        self._may_lag = False  # whether the state may be from before the end of an epoch

    # ---- the training begins

    def reset(self) -> None:
        """Ends an earlier training's method."""
        if self.method is not None:
            self.method.detach()
        self.method, self._state, self._before, self._may_lag = None, None, 0, False
        self._stop_catching()

    def convert(self, *networks: nn.Module) -> None:
        """Gives networks masked layers, in place; what has them stays as it is."""
        for network in networks:
            convert(network, filter_fn=self.filter_fn)

    def begin(
        self,
        model: nn.Module,
        optimizer: Any,
        epochs: int | None,
        *,
        epoch: int = 0,
        example_input: Any = None,
        followers: Sequence[Any] = (),
    ) -> Method:
        """Makes the method, from a loaded state if there is one.

        Args:
            model: The network, converted.
            optimizer: Its optimizer, in whatever wrapper.
            epochs: What the trainer says, if the user said nothing; those that are over count.
            epoch: Epochs that are over.
            example_input: What the trainer knows that the network takes, if the user said nothing.
            followers: Averages that the trainer keeps.
        """
        state = self._state
        before = epoch if state is None else state["before"]
        if self.epochs is not None:
            epochs = self.epochs
        elif isinstance(epochs, int) and epochs > 0:
            epochs -= before
        is_known = isinstance(epochs, int) and epochs > 0
        expect(OP, is_known, "epochs", "a number of epochs, as the trainer has none", epochs)
        options = {"example_input": example_input, **self.options}
        if options["example_input"] is not None:
            device = next(model.parameters()).device
            options["example_input"] = Example.of(OP, options["example_input"]).map(lambda x: x.to(device))
        self.method = self.cls(
            model, optimizer, self.rate, epochs, followers=[*self.followers, *followers],  # type: ignore[arg-type]
            state=None if state is None else state["method"], **options,
        )  # fmt: skip
        self._state, self._before = None, before
        self._take(state)
        self._run_in("live" if self.mode == "live" else "masked")
        self._masks_changed()
        return self.method

    # ---- while it lasts

    def begin_epoch(self, epoch: int) -> None:
        """An epoch goes on, of which `epoch` are over: a checkpoint may be from just before the end of the last one."""
        assert self.method is not None
        if self._may_lag and self._before + self.method.epoch < epoch:
            self.end_epoch()
        self._may_lag = False

    def before_clipping(self) -> None:
        """The step's gradients are there, and are not yet clipped."""
        assert self.method is not None
        self.method.clip_soft()

    def step(self) -> None:
        """The optimizer has made a step."""
        assert self.method is not None
        if self._caught is not None:
            self._choose(self._caught)
        phase = self.method.phase
        self.method.step()
        if self.method.phase != phase:
            self._masks_changed()

    def end_epoch(self) -> None:
        """An epoch is over."""
        assert self.method is not None
        self._stop_catching()
        self.method.end_epoch()
        self._masks_changed()

    def state_dict(self) -> dict[str, Any]:
        """Returns what training needs to go on, as plain values and tensors; nothing before it began."""
        if self.method is None:
            return self._state or {}
        return {"method": self.method.state_dict(), "chosen": dict(self.chosen), "before": self._before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what state_dict returned, now or when training begins."""
        if self.method is None:
            self._state = state
        else:
            self.method.load_state_dict(state["method"])
            self._take(state)
            self._masks_changed()

    def _take(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            self.chosen, self._before, self._may_lag = dict(state["chosen"]), state["before"], True

    # ---- the mode

    def _masks_changed(self) -> None:
        """Goes on in the mode that was chosen for about as many live filters, or begins to choose one."""
        assert self.method is not None
        if self.mode != "auto":
            return
        masks = torch.cat([layer.filter_mask.flatten() for layer in self.method.layers.values()])
        self._key = str(round(SHARES * float(masks.float().mean())))
        self._stop_catching()
        if bool(masks.all()):
            self._run_in("masked")
        elif self._key in self.chosen:
            self._run_in(self.chosen[self._key])
        elif torch.are_deterministic_algorithms_enabled():
            self._run_in("live")
        else:
            self._caught = CaughtCall(self.method.model)

    def _choose(self, caught: CaughtCall) -> None:
        self._stop_catching()
        best = from_rank_0(lambda: self._fastest(caught))
        self.chosen[self._key] = best
        self._run_in(best)

    def _fastest(self, caught: CaughtCall) -> str:
        if caught.module is None or caught.example is None:
            return "live"
        with caught.autocast():
            times = time_modes(caught.module, caught.example, modes=("masked", "live"))
        _log.info("%s tenths of the filters live: %s", self._key, times)
        return times.best or "masked"

    def _stop_catching(self) -> None:
        if self._caught is not None:
            self._caught.stop()
        self._caught = None

    def _run_in(self, mode: str) -> None:
        assert self.method is not None
        flow(self.method.model, mode == "live")
        self.now = mode
