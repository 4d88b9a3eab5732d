"""Method: what all pruning methods share. Methods know masks, never kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..graph import Group
from ..nn.batch_norm import MaskedBatchNorm2d
from ..nn.conv import MaskedConv2d
from ..optim import bind
from ..optim.step import MaskedStep
from . import checkpoint
from .channel_masks import NormFinder, Structure, units_of
from .clip import SoftClip
from .criteria import make_criterion
from .ranking import BUDGETS, Ranking, counts

COUPLINGS = ("independent", "joint")
FUNCTION = "a function (final, epoch, epochs), as those of schedules"


class Counts(NamedTuple):
    """Filters of a layer at an epoch's end; returned: those that were soft-dead and are live again."""

    live: int
    soft: int
    hard: int
    returned: int


class Method:
    """Call step after each optimizer.step and end_epoch after each epoch; after the last, what is dead stays dead.

        >>> method = pk.methods.GHFP(model, optimizer, rate=0.5, epochs=200, example_input=images)
        >>> for epoch in range(200):
        ...     for x, y in data:
        ...         optimizer.zero_grad(); loss(model(x), y).backward(); optimizer.step(); method.step()
        ...     method.end_epoch()

    Make it before a checkpoint is loaded into the model, since SFP and its kin prune once before the first epoch. It
    binds the optimizer (freeze="dead"): what is masked neither moves nor loses its momentum.

    rate: the share of filters that is pruned in the end, after `epochs` less fine_tune epochs; in those at the end what
    is left trains on (0 but for PGP; worth some where the last pruning takes much at once). criterion: a name in
    criteria.CRITERIA, a function of weights or a Criterion. skip: names of layers left alone. round_to: live filters
    stay a multiple of it. coupling "joint" (needs example_input): filters that meet in an add are pruned together, by
    the mean of their scores, each over its layer's mean. budget "global": the share is that of all filters, by score
    over their layer's mean score.

    norms: a masked filter takes its channel in the masked norms behind it along, so that nothing downstream computes
    it; False: norms are left as the papers leave them, and a dead filter gives a constant. Which norms those are is
    seen in the first forward pass (not of a compiled model), or, like the inputs that read a channel, in the graph that
    example_input gives.

    duty: share of an epoch's steps in the dense phase, which comes last; in the sparse phase before it soft-dead
    filters are masked. 1: no filter is masked unless it is hard-dead, as in the papers; 0: all are, always. Between,
    the method must know an epoch's length: steps_per_epoch, or else that of the last epoch (the first is all dense).
    In the end all dead filters are hard-dead. masked() masks them for a while, say for validation.

    clip: gradients of soft-dead filters are scaled down to the mean length of their layer's live ones (see SoftClip);
    None: where duty is below 1, as the papers have no such thing. Without it batch norms throw filters of zeros so far
    that short trainings end where the network guesses.

    history: by epoch, and in it by layer, Counts.
    """

    prunes_first = False  # once before the first epoch

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rate: float = 0.5,
        epochs: int = 200,
        *,
        criterion: Any = "l2",
        skip: Sequence[str] = (),
        round_to: int = 1,
        coupling: str = "independent",
        budget: str = "layer",
        example_input: Any = None,
        norms: bool = True,
        duty: float = 1.0,
        clip: bool | None = None,
        steps_per_epoch: int | None = None,
        fine_tune: int | None = None,
        seed: int = 0,
    ) -> None:
        self._expect(is_share(rate) and rate < 1, "rate", "a number in [0, 1)", rate)
        self._expect(is_share(duty), "duty", "a number in [0, 1]", duty)
        self._expect(coupling in COUPLINGS, "coupling", f"one of {', '.join(COUPLINGS)}", repr(coupling))
        self._expect(budget in BUDGETS, "budget", f"one of {', '.join(BUDGETS)}", repr(budget))
        for name, value in (("round_to", round_to), ("steps_per_epoch", steps_per_epoch)):
            self._expect(value is None or (isinstance(value, int) and value >= 1), name, "an integer from 1", value)
        self._expect(isinstance(norms, bool), "norms", "True or False", repr(norms))
        self._expect(clip is None or isinstance(clip, bool), "clip", "True, False or None", repr(clip))
        self._expect(isinstance(seed, int), "seed", "an integer", repr(seed))
        is_known = coupling == "independent" or example_input is not None
        self._expect(is_known, "example_input", "an input, which joint coupling needs", None)
        self.epochs = self._epochs_that_prune(epochs, fine_tune)
        self.model, self.optimizer, self.rate, self.duty = model, optimizer, rate, duty
        self.round_to, self.budget, self.with_norms = round_to, budget, norms
        self.steps_per_epoch, self._fixed_steps = steps_per_epoch, steps_per_epoch is not None
        self.generator = torch.Generator().manual_seed(seed)
        self.epoch = self.steps = 0  # epochs that are over, steps of this one
        self.history: list[dict[str, Counts]] = []

        self.criterion = make_criterion(type(self).__name__, criterion)
        masked = self._masked_layers(skip)
        self.structure = Structure(model, example_input)
        self.units, self.left_out = units_of(masked, self.structure.groups if coupling == "joint" else None, skip)
        names = {name for unit in self.units for name in unit.layers}
        self.layers = {name: layer for name, layer in masked.items() if name in names}
        self._check_optimizer()
        self._dead = [torch.zeros(unit.width, dtype=torch.bool) for unit in self.units]
        self._hard = [dead.clone() for dead in self._dead]
        self._finder: NormFinder | None = None
        self._masks_all = False
        self._begin(duty < 1 if clip is None else clip)

    def _begin(self, clips: bool) -> None:
        freeze = None if isinstance(self.optimizer, MaskedStep) else "dead"
        if freeze is None:
            for group in (self.optimizer.defaults, *self.optimizer.param_groups):  # the first: of groups to come
                group["freeze"] = "dead"
        self.binding = bind(self.optimizer, self.model, freeze=freeze)
        self.clip = SoftClip(self) if clips else None
        self.criterion.start(self)
        try:
            self.criterion.begin_epoch()
            if self.prunes_first and not self.criterion.needs_steps:
                self._prune(-1)
        except BaseException:
            self.detach()
            raise
        if self.with_norms and self.structure.norms is None:
            self._finder = NormFinder(self.model)
        self._mask()

    # ---- checks

    def _epochs_that_prune(self, epochs: int, fine_tune: int | None) -> int:
        """Those before the ones that only train; a subclass may ask before it is made."""
        self._expect(isinstance(epochs, int) and epochs >= 1, "epochs", "an integer from 1", epochs)
        fine_tune = self.default_fine_tune(epochs) if fine_tune is None else fine_tune
        is_less = isinstance(fine_tune, int) and 0 <= fine_tune < epochs
        self._expect(is_less, "fine_tune", f"fewer than the {epochs} epochs", fine_tune)
        return epochs - fine_tune

    def _expect(self, holds: bool, argument: str, expected: str, got: object) -> None:
        if not holds:
            raise ValueError(f"{type(self).__name__}: {argument}: expected {expected}, got {got}")

    def _masked_layers(self, skip: Iterable[str]) -> dict[str, MaskedConv2d]:
        masked = {name: m for name, m in self.model.named_modules() if isinstance(m, MaskedConv2d)}
        self._expect(bool(masked), "model", "MaskedConv2d layers (see pk.convert)", "none")
        self._expect(not isinstance(skip, str), "skip", "a list of names", repr(skip))
        for name in skip:
            self._expect(name in masked, "skip", "names of MaskedConv2d layers", repr(name))
        return masked

    def _check_optimizer(self) -> None:
        held = {p for group in self.optimizer.param_groups for p in group["params"]}
        for name, layer in self.layers.items():
            is_held = layer.weight in held
            self._expect(is_held, "optimizer", "one over the model's parameters", f"one without {name}.weight")
        self._expect(bool(self.layers), "skip", "some layers left to prune", "none")

    # ---- what a subclass decides

    @staticmethod
    def default_fine_tune(epochs: int) -> int:
        """How many of the epochs only train."""
        return 0

    def pruned_share(self, epoch: int) -> float:
        """The share of filters that is dead from the end of this epoch on; epoch -1: before the first."""
        return self.rate

    def hard_counts(self, epoch: int, rankings: list[Ranking], dead: list[int]) -> list[int]:
        """By unit, how many of its dead filters are hard-dead; those that are so stay so."""
        return [0] * len(rankings)

    def soften(self, name: str, rows: Tensor, epoch: int) -> None:
        """Changes the weights of a layer's soft-dead filters rows (indices), once, at an epoch's end."""
        self.layers[name].weight[rows] = 0

    # ---- a training loop calls

    def step(self) -> None:
        """After each optimizer.step()."""
        self.steps += 1
        found = self._find_norms()
        if found or self.steps == self._sparse_steps():
            self._mask()

    def end_epoch(self) -> dict[str, Counts]:
        """After each epoch: ranks the filters anew, prunes and sets the next epoch's masks. Returns the counts."""
        self._find_norms()
        before = {name: self._of(self._dead, name) for name in self.layers}
        if not self.finished:
            self._prune(self.epoch)
        self.epoch += 1
        if not self._fixed_steps and self.steps:
            self.steps_per_epoch = self.steps
        self.steps = 0
        self.criterion.begin_epoch()
        self._mask()
        self.history.append({name: self._count(name, was_dead) for name, was_dead in before.items()})
        return self.history[-1]

    def before_step(self, work: Callable[[], None]) -> Any:
        """A hook that calls work before each optimizer.step(), which must find the gradients there."""

        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            closure = (*args[1:], kwargs.get("closure"))[0]
            expected = "steps without a closure, with the gradients there before"
            self._expect(closure is None, "optimizer", expected, "one")
            work()

        return self.optimizer.register_step_pre_hook(hook)

    @contextmanager
    def masked(self) -> Iterator[None]:
        """Within it all dead filters are masked, as they will be in the end."""
        before, self._masks_all = self._masks_all, True
        self._mask()
        try:
            yield
        finally:
            self._masks_all = before
            self._mask()

    @property
    def finished(self) -> bool:
        """Whether the epochs of pruning are over: what is dead stays so."""
        return self.epoch >= self.epochs

    @property
    def states(self) -> dict[str, Tensor]:
        """By layer, int8 [K]: 0 live, 1 soft-dead, 2 hard-dead."""
        return {n: self._of(self._dead, n).to(torch.int8) + self._of(self._hard, n).to(torch.int8) for n in self.layers}

    @property
    def hides_soft(self) -> bool:
        """Whether soft-dead filters are masked at this step."""
        return self.finished or self.steps < self._sparse_steps()

    # ---- pruning

    @torch.no_grad()
    def _prune(self, epoch: int) -> None:
        rankings = self._rankings()
        gone = [ranking.hard for ranking in rankings]
        dead = counts(rankings, (self.pruned_share(epoch),), self.budget, self.round_to)
        dead = list(map(max, dead, gone))
        hard = dead if epoch + 1 >= self.epochs else self.hard_counts(epoch, rankings, dead)
        hard = [min(d, max(h, g)) for d, h, g in zip(dead, hard, gone, strict=True)]
        newly_hard = [r.first(h) & ~was for r, h, was in zip(rankings, hard, self._hard, strict=True)]
        self._dead = [r.first(d) for r, d in zip(rankings, dead, strict=True)]
        self._hard = [r.first(h) for r, h in zip(rankings, hard, strict=True)]
        for name in self.layers:
            self._bury(name, self._rows(newly_hard, name))
            soft = [d & ~h for d, h in zip(self._dead, self._hard, strict=True)]
            rows = self._rows(soft, name)
            if len(rows):
                self.soften(name, rows, epoch)

    def _rankings(self) -> list[Ranking]:
        scores = self.criterion.scores()
        for name in self.layers:
            wrong = (~scores[name].isfinite()).nonzero().flatten().tolist()
            self._expect(not wrong, name, "finite scores", f"others for filters {wrong}")
        rankings = []
        for unit, dead, hard in zip(self.units, self._dead, self._hard, strict=True):
            rankings.append(Ranking.of(of_unit(unit, scores), dead, hard, list(unit.filters.values())))
        return rankings

    def _bury(self, name: str, rows: Tensor) -> None:
        """Zeros for hard-dead filters, their norms' parameters and the optimizer's state of both."""
        for parameter in self.parameters_of(name) if len(rows) else ():
            parameter[rows] = 0
            self.forget(parameter, rows)

    def norms_of(self, name: str) -> list[MaskedBatchNorm2d]:
        """The masked norms behind a layer that die with its filters."""
        names = (self.structure.norms or {}).get(name, []) if self.with_norms else []
        return [m for n in names if isinstance(m := self.model.get_submodule(n), MaskedBatchNorm2d)]

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """Parameters with a row per filter of a layer."""
        modules = [self.layers[name], *self.norms_of(name)]
        return [p for m in modules for p in (m.weight, m.bias) if isinstance(p, nn.Parameter)]

    def forget(self, parameter: nn.Parameter, rows: Tensor) -> None:
        """Zeros in the optimizer's state (momentum, averages) of these rows."""
        for held in self.optimizer.state.get(parameter, {}).values():
            if isinstance(held, Tensor) and held.shape == parameter.shape:
                held[rows] = 0

    # ---- masks

    def _of(self, by_unit: list[Tensor], name: str) -> Tensor:
        """bool [K]: a layer's filters."""
        unit, mask = next((u, m) for u, m in zip(self.units, by_unit, strict=True) if name in u.filters)
        return mask[unit.filters[name]]

    def _rows(self, by_unit: list[Tensor], name: str) -> Tensor:
        return self._of(by_unit, name).nonzero().flatten().to(self.layers[name].weight.device)

    def _count(self, name: str, was_dead: Tensor) -> Counts:
        dead, hard = int(self._of(self._dead, name).sum()), int(self._of(self._hard, name).sum())
        returned = int((was_dead & ~self._of(self._dead, name)).sum())
        return Counts(len(was_dead) - dead, dead - hard, hard, returned)

    def _sparse_steps(self) -> float:
        """How many steps the sparse phase at the start of an epoch has."""
        if self.duty in (0, 1):
            return torch.inf if self.duty == 0 else 0
        if self.steps_per_epoch is None:
            return 0
        return self.steps_per_epoch - max(1, round(self.duty * self.steps_per_epoch))

    def _mask(self) -> None:
        hidden = self._dead if self._masks_all or self.hides_soft else self._hard
        live = {name: ~self._of(hidden, name) for name in self.layers}
        hard = {name: ~self._of(self._hard, name) for name in self.layers}
        self.structure.set_masks(live, hard, self.with_norms)

    def _find_norms(self) -> bool:
        if self._finder is None:
            return False
        self.structure.norms, self._finder = self._finder.stop(), None
        return True

    # ---- the rest

    def state_dict(self) -> dict[str, Any]:
        """Of plain values and tensors."""
        return checkpoint.save(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What state_dict gave, for the same method and network; sets the masks. On an error nothing changes."""
        checkpoint.load(self, state_dict)

    def detach(self) -> None:
        """Takes its hooks off optimizer and model; masks stay, but nothing keeps the optimizer from what is dead."""
        self._find_norms()
        if self.clip is not None:
            self.clip.stop()
        self.criterion.stop()
        self.binding.remove()

    def __repr__(self) -> str:
        states = torch.cat(list(self.states.values()))
        live, soft, hard = (int((states == value).sum()) for value in range(3))
        return (
            f"{type(self).__name__}(epoch {self.epoch}/{self.epochs}; filters: {live} live, {soft} soft, {hard} hard)"
        )


def is_share(value: object) -> bool:
    """Whether it is a number in [0, 1]."""
    return isinstance(value, Real) and 0 <= float(value) <= 1


def of_unit(unit: Group, scores: Mapping[str, Tensor]) -> Tensor:
    """float64 [width]. A mean, since in some networks a channel inside meets more layers than one at the edge."""
    if len(unit.layers) == 1:
        return unit.combine({name: scores[name] for name in unit.layers})
    relative = {}
    for name in unit.layers:
        score = scores[name].double()
        mean = score.mean()
        relative[name] = score / mean if mean > 0 else score
    return unit.combine(relative) / unit.combine({name: torch.ones_like(s) for name, s in relative.items()})
