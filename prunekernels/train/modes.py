"""Modes: what a run trains with at each step, as its settings say or as measurements do."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from ..methods import Method
from ..nn.flow import flow
from ..nn.mask_buffers import MaskBuffers
from ..nn.masked_filters import MaskedFilters
from ..nn.process_groups import world_size
from . import distributed
from .compiling import Compiled, step_times
from .config import Config
from .dense_step import FORMATS, DenseStep, autocast, in_layout, masked_layout
from .form_trials import FormTrials, likeliest_first

TIMED = ("masked", "live", "compacted")
TIMED_ALL_LIVE = ("masked", "live")  # compacted mode has nothing to leave out
ALL_LIVE = "all"  # in the place of a share
SHARES = 10  # a choice serves all masks that leave about as many tenths of the filters live
_UNCHANGING = ("kernel_mask", "hard_mask")  # what hard-dead filters compute, filter_mask says as well
KEPT = 4  # sets of masks whose DDP wrappers and compiled forms are kept


@dataclass
class _Form:
    """One network that trains: the small one of a set of masks, or the model itself."""

    net: nn.Module
    eager: nn.Module  # with ranks in DistributedDataParallel, as is the next one
    compiled: nn.Module | None = None


class Modes:
    """What a run trains with: the model in masked or live mode, or the small network; eager or compiled.

    Args:
        config: The run's settings.
        model: The network.
        optimizer: Its optimizer.
        method: The pruning method, None without one.
        say: Prints a line.
        dense: The form of dense steps.

    Attributes:
        now: The mode that the network is in.
        bf16: Whether its steps autocast to bfloat16.
        layout: That of the images on the CPU, where masked layers take theirs from them.
        is_compiled: Whether torch.compile serves while masks stand still as they do now; None: not known yet.
        whole: The model itself, for passes outside of training steps; with ranks in DistributedDataParallel.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        optimizer: Optimizer,
        method: Method | None,
        say: Callable[[str], object],
        dense: DenseStep,
    ) -> None:
        self.config, self.model, self.optimizer, self.method, self.say = config, model, optimizer, method, say
        self.dense, self.bf16, self.layout = dense, dense.bf16, self._usual_layout(dense.bf16)
        self.device = next(model.parameters()).device
        self.ranks = world_size()
        self._live = distributed.live_gradients(model, config.timeout) if config.live_gradients else None
        self.whole = distributed.wrapped(model, live=self._live)
        self.now = "masked" if config.mode == "auto" and method is not None else config.mode
        self._chosen: dict[str, str] = {}  # by share of live filters, the mode, with amp also the numbers
        self._times: dict[str, dict[str, float]] = {}  # by share, milliseconds of a step by mode and numbers
        self._trials: dict[str, FormTrials] = {}  # by share, until one is chosen
        self._trial: FormTrials | None = None  # that of the masks that there are now
        self._begun = 0.0  # of a step that is on trial
        self._compiles: dict[str, bool] = {}  # by mode and share, whether compiling pays
        self.is_compiled: bool | None = None
        self._still = 0  # steps since the masks changed
        self._phase: tuple[int, int] | None = None
        self._masks: Tensor | None = None
        self._forms: OrderedDict[Any, _Form] = OrderedDict()

    # ---- a step

    def at_step(self, x: Tensor, y: Tensor) -> tuple[nn.Module, Optimizer]:
        """Returns the network to call and the optimizer to step now. x, y: the batch, to time compiled steps with."""
        self.look_at_masks()
        self._still += 1
        net, optimizer = self._next_form()
        form = self._form(net)
        waits = self._trial is not None or self._still <= self.config.compile_after
        if self.config.compile and not waits and self.is_compiled is None:
            self.is_compiled = self._compile(form, self.laid_out(x), y)
        found = form.compiled if self.is_compiled and form.compiled is not None else form.eager
        if self._trial is not None:
            self._begun = self._clock()
        return found, optimizer

    def step_ended(self) -> None:
        """Takes the time of the step that at_step began, if its mode is on trial."""
        if self._trial is None:
            return
        self._trial.add(distributed.from_rank_0(self._step_ms))
        if self._trial.settled:
            self._choose(self._trial)

    def end(self) -> None:
        """Chooses the mode for the masks that the run leaves, as far as its steps have told."""
        self.look_at_masks()
        if self._trial is not None:
            self._next_form()
        if self._trial is not None:
            self._choose(self._trial)

    def look_at_masks(self) -> None:
        """Chooses the mode, if masks are others than at the last look and the settings leave it open."""
        phase = None if self.method is None else (self.method.epoch, self.method.phase)
        if phase is None or phase == self._phase:
            return
        self._phase, masks = phase, self._current_masks()
        if self._masks is not None and torch.equal(masks, self._masks):
            return
        if self._masks is not None:
            self._still = 0
        self._masks, self.is_compiled = masks, None
        if self.config.mode == "auto":
            self._trial = None
            if self._all_live() and (self.config.deterministic or self.config.compile):
                self._run_in("masked", self.dense.bf16)
            elif (form := self._choice()) is not None:
                self._run_in_form(form)

    def _current_masks(self) -> Tensor:
        """All masks of live filters and channels in a row, bool, on the CPU."""
        layers = [module for module in self.model.modules() if isinstance(module, MaskBuffers)]
        masks = [getattr(m, name) for m in layers for name in m._mask_names if name not in _UNCHANGING]
        return torch.cat([mask.flatten() for mask in masks]).cpu()

    def _all_live(self) -> bool:
        return self._masks is not None and bool(self._masks.all())

    def _run_in(self, mode: str, bf16: bool, layout: str | None = None) -> None:
        self.bf16, self.layout = bf16, layout or self._usual_layout(bf16)
        if mode != self.now:
            assert self.method is not None
            flow(self.model, mode == "live")
            self.method.mode = "compacted" if mode == "compacted" else "masked"
            self.now = mode

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocasts to bfloat16, if the steps that are made now do."""
        return autocast(self.device, self.bf16)

    def laid_out(self, x: Tensor) -> Tensor:
        """Images as the next step takes them. On the CPU masked layers have the layout of their inputs."""
        if x.device.type == "cuda" or self.method is None or self.now not in ("masked", "live"):
            return self.dense.laid_out(x)
        return in_layout(x, self.layout)

    def _usual_layout(self, bf16: bool) -> str:
        return masked_layout(bf16) if self.config.layout == "auto" or not bf16 else self.config.layout

    def _run_in_form(self, form: str) -> None:
        """form: a mode, with amp its numbers, and the layout, if that is another than usual."""
        mode, *words = form.split()
        self._run_in(mode, self.config.amp and "fp32" not in words, next((w for w in words if w in FORMATS), None))

    # ---- the mode

    def _choice(self) -> str | None:
        """What was chosen for about as many live filters; None while that is on trial."""
        key = self._key()
        if key not in self._chosen and self.config.deterministic:
            self._chosen[key], line = distributed.from_rank_0(self._first_that_runs)
            self._say_choice(line)
        if key not in self._chosen:
            if key in self._trials:
                self._trials[key].restart()
            else:
                self._trials[key] = FormTrials(*self._contenders())
            self._trial = self._trials[key]
            if self._trial.settled:
                self._choose(self._trial)
        return self._chosen.get(key)

    def _contenders(self) -> tuple[list[str], dict[str, str]]:
        """Modes, with amp each in both numbers, that may be the fastest for the masks that there are; and of some of
        them the same in the other layout.
        """
        modes = TIMED_ALL_LIVE if self._all_live() else TIMED
        numbers = (" bf16", " fp32") if self.config.amp else ("",)
        forms = [mode + number for number in numbers for mode in modes]
        variants = {form: self._in_other_layout(form) for form in forms if self._has_layouts(form)}
        here = _tenths(self._key())
        nearest = sorted(self._times, key=lambda key: abs(_tenths(key) - here))
        nearby = [self._times[key] for key in nearest]
        known = [form for form in variants.values() if any(form in times for times in nearby)]
        unknown = {form: other for form, other in variants.items() if other not in known}
        return likeliest_first([*forms, *known], nearby), unknown

    def _has_layouts(self, form: str) -> bool:
        """Whether the layout of images decides in which one layers compute, and is left open."""
        return self.device.type == "cpu" and self.config.layout == "auto" and not form.startswith("compacted")

    def _in_other_layout(self, form: str) -> str:
        usual = self._usual_layout(self.config.amp and not form.endswith("fp32"))
        return f"{form} {next(name for name in FORMATS if name != usual)}"

    def _next_form(self) -> tuple[nn.Module, Optimizer]:
        """The network and the optimizer of the next step, in the mode whose turn it is."""
        if self.method is None:
            return self.model, self.optimizer
        while self._trial is not None and not self._trial.settled:
            reason, form = "", self._trial.now
            try:
                self._run_in_form(form)
                found = self.method.net, self.method.opt
            except Exception as error:  # whatever a network raises that has no small form
                if not form.startswith("compacted"):
                    raise
                reason = _first_line(error)
            if not distributed.any_rank(bool(reason), self.device):
                return found
            self.now = "compacted"
            self._run_in("masked", self.bf16)
            self._trial.drop(reason or "on another rank")
        if self._trial is not None:
            self._choose(self._trial)
        return self.method.net, self.method.opt

    def _choose(self, trial: FormTrials) -> None:
        """Ends a trial."""
        key = self._key()
        self._chosen[key], self._times[key] = trial.best, trial.ms
        self._trials.pop(key, None)
        self._trial = None
        self._run_in_form(trial.best)
        self._say_choice(f"{_told(trial)}: {trial.best}")

    def _say_choice(self, line: str) -> None:
        assert self.method is not None
        self.say(f"epoch {self.method.epoch + 1}: {self._live_share():.2f} of the filters live: {line}")

    def _key(self) -> str:
        return ALL_LIVE if self._all_live() else self._share_key()

    def _live_share(self) -> float:
        return computed_share(m for m in self.model.modules() if isinstance(m, nn.Conv2d))

    def _share_key(self) -> str:
        return str(round(SHARES * self._live_share()))

    def _step_ms(self) -> float:
        """Milliseconds since at_step returned."""
        return 1e3 * (self._clock() - self._begun)

    def _clock(self) -> float:
        """Seconds, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _first_that_runs(self) -> tuple[str, str]:
        """Compacted mode where that is possible, and a line with the reason where it is not. Nothing is timed."""
        assert self.method is not None
        before, self.method.mode = self.method.mode, "compacted"
        try:
            self.method.net.train()
        except Exception as error:  # whatever a network raises
            return "masked", f"masked; compacted not possible ({_first_line(error)})"
        finally:
            self.method.mode = before
        return "compacted", "compacted; not timed, as the run is deterministic"

    # ---- wrappers and compiled forms

    def _form(self, net: nn.Module) -> _Form:
        """The wrappers of a network; the small one is wrapped anew for each set of masks, as its parameters change."""
        is_small = net is not self.model
        compaction = self.method.compaction if is_small and self.method is not None else None
        key = None if compaction is None else compaction.cut
        form = self._forms.get(key)
        if form is None or form.net is not net:
            eager = distributed.wrapped(net, synchronize=False) if is_small else self.whole
            form = self._forms[key] = _Form(net, eager)
        self._forms.move_to_end(key)
        while len(self._forms) > KEPT:
            self._forms.popitem(last=False)
        return form

    def _compile(self, form: _Form, x: Tensor, y: Tensor) -> bool:
        """Compiles a network, if that makes it faster, and says so. A choice made before for such masks stays."""
        key = f"{self.now} {self._share_key()}"
        if form.compiled is not None:
            return True
        told = f"the same masks for {self._still - 1} steps"
        if self.now == "live" and key not in self._compiles:
            self._compiles[key] = False
            self.say(f"{told}: eager, as live mode runs without torch.compile")
        known = self._compiles.get(key, True if self.config.deterministic else None)
        if known is False:
            return False
        compiled = Compiled(form.net)
        forms = {"compiled": compiled} if known else {"eager": form.net, "compiled": compiled}
        times: dict[str, float] = {}
        reason = ""
        try:
            times = step_times(form.net, forms, self._loss_of(x, y), self.device)
        except Exception as error:  # whatever a compiler raises
            reason = _first_line(error)
        if distributed.any_rank(not times, self.device):
            told += f": eager, as torch.compile failed ({reason or 'on another rank'})"
            pays = False
        elif known:
            told += ": compiled; not timed, as the run is deterministic"
            pays = True
        else:
            pays = distributed.from_rank_0(lambda: times["compiled"] < times["eager"])
            told += f": eager {times['eager']:.1f} ms, compiled {times['compiled']:.1f} ms a step"
            told += f": {'compiled' if pays else 'eager'}"
        if self._compiles.get(key) is not pays:
            self.say(told)
        self._compiles[key] = pays
        if pays:
            live = self._live if form.net is self.model else None
            form.compiled = compiled if self.ranks == 1 else distributed.wrapped(compiled, synchronize=False, live=live)
        return pays

    def _loss_of(self, x: Tensor, y: Tensor) -> Callable[[nn.Module], Tensor]:
        def loss_of(form: nn.Module) -> Tensor:
            with self.autocast():
                return F.cross_entropy(form(x).float(), y)

        return loss_of

    @property
    def told(self) -> str:
        """What trains now, in words."""
        if self.method is None and self.now not in ("masked", "live"):
            told = "plain network"
        else:
            told = f"{self.now} mode" + (", by auto" if self.config.mode == "auto" else "")
        told += ", in float32" if self.config.amp and not self.bf16 else ""
        return told + (", compiled" if self.is_compiled else "")

    def leave_ranks(self) -> None:
        """Ends DistributedDataParallel, whose process group ends; training is over."""
        self.whole = self.model
        self._forms.clear()

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Returns the choices, so that a run that resumes makes the same ones, as plain values."""
        is_same = self._masks is None or torch.equal(self._current_masks(), self._masks)
        return {
            "chosen": dict(self._chosen), "times": {key: dict(ms) for key, ms in self._times.items()},
            "compiles": dict(self._compiles), "still": self._still if is_same else 0,
            "dense": self.dense.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what state_dict returned; an empty one leaves everything to be chosen."""
        self._chosen, self._compiles = dict(state.get("chosen", {})), dict(state.get("compiles", {}))
        self._still, self._times = state.get("still", 0), dict(state.get("times", {}))


def computed_share(layers: Iterable[nn.Conv2d]) -> float:
    """The share of all filters that a forward pass computes now."""
    live = total = 0
    for layer in layers:
        total += layer.out_channels
        live += int(layer.filter_mask.sum()) if isinstance(layer, MaskedFilters) else layer.out_channels
    return live / total


def _tenths(key: str) -> int:
    return SHARES if key == ALL_LIVE else int(key)


def _told(trial: FormTrials) -> str:
    reasons = [f", {form} not possible ({why})" for form, why in trial.reasons.items()]
    if not trial.ms:
        return f"not timed{''.join(reasons)}"
    return "".join([", ".join(f"{form} {ms:.1f} ms" for form, ms in trial.ms.items()), " a step", *reasons])


def _first_line(error: Exception) -> str:
    error = getattr(error, "inner_exception", error)  # a compiler's own, in torch's
    return (str(error).strip() or type(error).__name__).splitlines()[0]
