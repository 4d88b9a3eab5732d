"""Method: what all pruning methods share. Methods know masks, never kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..graph import Group
from ..nn.copy_masks import copy_masks, matched_layers
from ..optim.freezing import freeze_dead
from ..optim.unwrap import unwrap
from . import arguments, ranks
from .budgeted import Budgeted
from .channel_masks import ChannelMasks, NormFinder, units_of
from .checkpoint import Checkpoints
from .clip import SoftClip
from .criteria import make_criterion
from .defaults import WithDefaults
from .filter_states import FilterStates
from .filter_tensors import FilterTensors
from .first_pruning import FirstPruning
from .phases import Phases
from .ranking import Counts, Ranking, of_unit
from .reporting import report_of
from .running import Running
from .schedules import Schedule


class Method(Running, Budgeted, Checkpoints, FilterTensors, metaclass=WithDefaults):
    """Base of all methods: ranks the filters after each epoch, prunes the weakest and masks them.

    A training loop calls `step` after each optimizer.step() and `end_epoch` after each epoch. After the last epoch what
    is dead stays dead. The optimizer is bound to the model (pk.optim.bind, freeze="dead"): a masked filter neither
    moves nor loses its momentum. To resume, load network, optimizer and method in any order, before or after the method
    is made: what SFP and its subclasses prune before the first epoch is taken back where a state is loaded.

    A new method overrides `pruned_share`, and where it differs `hard_counts`, `soften`, `default_fine_tune` and
    `tuned`.

    Args:
        model: A network with masked layers (see pk.convert).
        optimizer: Trains the model's parameters. A wrapper (Accelerate's, Lightning's) stands for the one inside.
        rate: The share of filters that is pruned in the end, in [0, 1).
        epochs: How many epochs the training has.
        criterion: A name in criteria.CRITERIA, a function of weights or a criteria.Criterion. None: the method's own.
        skip: Names of layers that are left alone.
        prune_outputs: Whether layers whose channels are outputs of the network (the classes and boxes of convolutional
            heads, features that it returns) are pruned too, or names of those that are. They are known where
            example_input is given, and left out by default.
        round_to: The number of live filters of a layer stays a multiple of it.
        coupling: "independent": each layer is pruned by itself. "joint" (needs example_input): filters that meet in an
            add are pruned together, by the mean of their scores, each over its layer's mean.
        budget: "layer": the same share of each layer, also where some of the layers that meet in adds lack channels,
            as behind a shortcut that pads: filters then compete with those that the same layers have. "global": that
            share of all filters together, by their scores over their layer's mean score. "flops" (needs example_input):
            as many filters of all layers as save that share of the network's multiply-adds, by scores over the sum of
            those that are left of their layer. A dict, {"flops": 0.5}, {"params": 0.5} or {"latency": 0.5} (needs
            example_input): what is left of the network in the end. The method then finds the rate, the same in each
            layer, as rate_for does, whose `timer` the dict may have; `rate` has no effect.
        rates: By name or pattern of names ("stage1.*"), a rate for these layers; the last pattern that matches counts.
            The other layers have `rate`, or meet the budget of all.
        floor: The smallest share of a layer's filters that stays with budget "global" or "flops", unless rates has the
            layer. None: 0 with "global", 0.1 with "flops".
        example_input: What the model takes (see Example). From it the graph tells which norms and inputs belong to a
            filter's channel; without it, the first forward pass tells which norms do (not of a compiled model).
        mode: "masked": the network trains as it is, in masked or live mode. "compacted" (needs example_input): while
            masks kill anything, a small plain network trains in its place (see compacted). A loop that serves both
            reads `net` and `opt` in each step.
        norms: Whether a masked filter takes its channel in the masked norms behind it along, so that nothing downstream
            computes it. False: norms stay as the papers leave them, and a dead filter gives a constant.
        duty: The share of an epoch's steps in which a soft-dead filter trains along; in the others it is masked. 1:
            only hard-dead filters are ever masked, as in the papers. 0: all dead filters always are. In the end all
            dead filters are hard-dead.
        wake: Which steps these are. "together": the last ones of an epoch (dense phase, after a sparse one), for all of
            them. "in_turns": at any step another small group of the soft-dead filters trains along, each in its turn.
            None: "together".
        clip: Whether gradients of soft-dead filters are scaled down to the mean length of their layer's live ones:
            ours, not the papers'. Without it, a batch norm behind a filter of zeros makes its gradient so long that
            short trainings end at chance. None: where duty is below 1.
        steps_per_epoch: Length of an epoch, which a duty between 0 and 1 needs. None: that of the last epoch; the first
            one is then all dense.
        warm_up: How many epochs train before the first pruning, where the method has a schedule over the epochs: that
            runs over the others. None: 0, as in the papers.
        fine_tune: How many of the epochs, at the end, only train what is left. None: the method's own, 0 but for PGP.
        preset: "paper": what is not given is the paper's, with duty 1 (see presets.PAPER). None: the paper's where duty
            is 1; below, the best values that we found (see `tuned`).
        seed: Of the random generator.
        process_group: The ranks that decide together, where torch.distributed is initialized: scores are means over
            them, so that masks stay the same on all. Each makes the method, steps it and ends its epochs. None: the
            default group.
        followers: Averages of the model (or other copies) that get every change of masks as well, as by pk.copy_masks,
            which says what each may be.
        state: What state_dict returned, to go on from: the method is made without a pruning and changes no weight.

    Attributes:
        history: By epoch, and in it by layer name, Counts.
        left_out: By name, the layers that are not pruned, and why.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 2, 3))
        >>> report = pk.convert(net)
        >>> optimizer = torch.optim.SGD(net.parameters(), 0.1)
        >>> method = pk.methods.GHFP(net, optimizer, rate=0.5, epochs=3, example_input=torch.randn(1, 1, 8, 8))
        >>> for epoch in range(3):
        ...     for x in torch.randn(2, 5, 1, 8, 8):
        ...         small, opt = method.net, method.opt  # in the default mode, net and optimizer themselves
        ...         opt.zero_grad()
        ...         small(x).square().mean().backward()
        ...         opt.step()
        ...         method.step()
        ...     counts = method.end_epoch()
        >>> method
        GHFP(epoch 3/3; filters: 2 live, 0 soft, 2 hard)
        >>> counts["0"].live, net[0].density
        (2, 0.5)
    """

    prunes_first = False  # whether to prune once before the first epoch
    has_warm_up = True  # whether warm_up says when pruning starts; False: an argument of the class's own does
    default_criterion: ClassVar[Any] = "l2"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rate: float = 0.5,
        epochs: int = 200,
        *,
        criterion: Any = None,
        skip: Sequence[str] = (),
        prune_outputs: bool | Sequence[str] = False,
        round_to: int = 1,
        coupling: str = "independent",
        budget: str | Mapping[str, Any] = "layer",
        rates: Mapping[str, float] | None = None,
        floor: float | None = None,
        example_input: Any = None,
        mode: str = "masked",
        norms: bool = True,
        duty: float = 1.0,
        wake: str | None = None,
        clip: bool | None = None,
        steps_per_epoch: int | None = None,
        warm_up: int | None = None,
        fine_tune: int | None = None,
        preset: str | None = None,
        seed: int = 0,
        process_group: Any = None,
        followers: Sequence[Any] = (),
        state: dict[str, Any] | None = None,
    ) -> None:
        op = type(self).__name__
        model = arguments.unwrapped(model)
        arguments.check_options(
            op, rate=rate, duty=duty, coupling=coupling, budget=budget, floor=floor, round_to=round_to, norms=norms,
            wake=wake, clip=clip, steps_per_epoch=steps_per_epoch, seed=seed, example_input=example_input,
        )  # fmt: skip
        optimizer = unwrap(op, optimizer, model)
        self.all_epochs, self.epochs = epochs, self._epochs_that_prune(epochs, fine_tune)
        self.warm_up = arguments.warm_up_epochs(op, warm_up, self.epochs, self.has_warm_up)
        self.model, self.optimizer, self.rate = model, optimizer, rate
        self.round_to, self.budget, self.with_norms, self.preset = round_to, budget, norms, preset
        self.process_group = process_group
        self.phases, self._fixed_steps = Phases(duty, wake or "together", steps_per_epoch), steps_per_epoch is not None
        self.generator = torch.Generator().manual_seed(seed)
        self.epoch = self.steps = 0  # epochs that are over, steps of this one
        self.history: list[dict[str, Counts]] = []

        self.criterion = make_criterion(op, self.default_criterion if criterion is None else criterion)
        masked = arguments.masked_layers(op, model, skip)
        self.channel_masks = ChannelMasks(model, example_input)
        arguments.check_prune_outputs(op, prune_outputs, masked)
        groups, joint = self.channel_masks.groups, coupling == "joint"
        units, self.left_out = units_of(masked, groups, skip, joint=joint, prune_outputs=prune_outputs)
        self.filters = FilterStates(units)
        names = {name for unit in units for name in unit.layers}
        self.layers = {name: layer for name, layer in masked.items() if name in names}
        arguments.check_optimizer(op, optimizer, self.layers, self.left_out)
        self._start_budget(units, budget, rates, floor, example_input)
        self.followers = arguments.checked_followers(op, model, followers)
        self._finder: NormFinder | None = None
        self._masks_all = False
        self._first: FirstPruning | None = None
        self._start_running(mode, example_input)
        self.binding = freeze_dead(optimizer, model)
        self.clip = SoftClip(self) if (duty < 1 if clip is None else clip) else None
        self.criterion.start(self)
        try:  # an error leaves no hook behind
            self._begin(state is None)
            if state is not None:
                self.load_state_dict(state)
        except BaseException:
            self.detach()
            raise

    def _begin(self, is_new: bool) -> None:
        """Registers hooks and, if the method does not go on from a state, prunes for the first time."""
        self.criterion.begin_epoch()
        if self.with_norms and self.channel_masks.norms is None:
            self._finder = NormFinder(self.model)
        if is_new and self.prunes_first and not self.warm_up and not self.criterion.needs_steps:
            self._prune_first()
        elif is_new:
            self._set_masks()

    def _epochs_that_prune(self, epochs: int, fine_tune: int | None) -> int:
        """The epochs before those that only train; a subclass may ask before its own __init__ is through."""
        return arguments.epochs_that_prune(type(self).__name__, epochs, fine_tune, self.default_fine_tune)

    def _scheduled(self, schedule: Schedule, final: float, epoch: int) -> float:
        """A schedule's value at the end of an epoch, over the epochs that prune after warm_up; 0 before."""
        return schedule(final, epoch - self.warm_up, self.epochs - self.warm_up) if epoch + 1 >= self.warm_up else 0.0

    def _expect(self, holds: bool, argument: str, expected: str, got: object) -> None:
        arguments.expect(type(self).__name__, holds, argument, expected, got)

    # ---- what a subclass decides

    @staticmethod
    def default_fine_tune(epochs: int) -> int:
        """Returns how many of the epochs, at the end, only train."""
        return 0

    @classmethod
    def tuned(cls, epochs: int) -> dict[str, Any]:
        """Returns the keywords that apply where duty is below 1 and the caller leaves them open (None).

        Args:
            epochs: How many epochs the training has.
        """
        return {}

    def pruned_share(self, epoch: int) -> float:
        """Returns the share of filters that is dead from the end of this epoch on; epoch -1: before the first."""
        return self.rate

    def hard_counts(self, epoch: int, rankings: list[Ranking], dead: list[int]) -> list[int]:
        """Decides how many of the dead filters are hard-dead; a filter that is hard-dead stays so.

        Args:
            epoch: The epoch that ends.
            rankings: By unit, its filters from the first to go to the last.
            dead: By unit, how many of them are dead.

        Returns:
            By unit, how many are hard-dead, from the start of its ranking.
        """
        return [0] * len(rankings)

    def soften(self, name: str, rows: Tensor, epoch: int) -> None:
        """Changes the weights of filters that are soft-dead, once, at an epoch's end. The default zeroes them.

        Args:
            name: The layer.
            rows: int64 indices of its soft-dead filters, never empty.
            epoch: The epoch that ends.
        """
        self.by_filter(name, self.layers[name].weight)[rows] = 0

    # ---- what a training loop calls

    def clip_soft(self) -> None:
        """Scales gradients of soft-dead filters down now, where `clip` is on. Call before clip_grad_norm_ and its like.

        The step does it as well, but then these gradients have had their part in the norm, and the others are the
        shorter for it.
        """
        if self.clip is not None:
            self.clip.clip()

    def step(self) -> None:
        """Counts an optimizer step, and begins the next phase when its time has come. Call after optimizer.step()."""
        self.steps += 1
        self._first = None
        found = self._find_norms()
        if found or (self.phases.at(self.steps) != self.phases.at(self.steps - 1) and self._has_soft):
            self._set_masks()

    def end_epoch(self) -> dict[str, Counts]:
        """Ranks the filters anew, prunes and sets the next epoch's masks. Call after each epoch.

        Returns:
            By layer name, its Counts; also the last entry of `history`.
        """
        self._leave()
        self._find_norms()
        self._first = None
        before = {name: self.filters.of_layer(self.filters.dead, name) for name in self.layers}
        if not self.finished:
            self._prune(self.epoch)
        self.epoch += 1
        steps = ranks.largest(self.steps, self._on_device, self.process_group)
        if not self._fixed_steps and steps:
            self.phases.steps_per_epoch = steps
        self.steps = 0
        self.criterion.begin_epoch()
        self._set_masks()
        self.history.append({name: self.filters.counts(name, was_dead) for name, was_dead in before.items()})
        return self.history[-1]

    def report(self) -> dict[str, float]:
        """Returns where the method is, as numbers by name for any logger: "epoch", "filters" and how many of them are
        "live", "soft" (dead, may come back) and "hard"; "returned" at the last epoch's end; "live_share", and
        "live_share_of/NAME" by layer; "target_share", what the schedule wants dead now, of the filters or of what the
        budget is of; "rate", what it wants dead in the end.

        Examples:
            >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 2, 3))
            >>> report = pk.convert(net)
            >>> method = pk.methods.SFP(net, torch.optim.SGD(net.parameters(), 0.1), rate=0.5, epochs=2)
            >>> counts = method.end_epoch()
            >>> method.report()["live"], method.report()["soft"], method.report()["live_share_of/0"]
            (3, 3, 0.5)
        """
        share = self.pruned_share(min(self.epoch, self.epochs) - 1) if self.epoch or self.prunes_first else 0.0
        return report_of(self.states, self.history, self.epoch, self.rate, share)

    @contextmanager
    def masked(self) -> Iterator[None]:
        """Masks all dead filters within the `with` block, as they will be in the end: say, for validation."""
        before, self._masks_all = self._masks_all, True
        self._set_masks()
        try:
            yield
        finally:
            self._masks_all = before
            self._set_masks()

    @property
    def finished(self) -> bool:
        """Whether the epochs of pruning are over: what is dead stays so."""
        return self.epoch >= self.epochs

    @property
    def prunes_last(self) -> bool:
        """Whether the pruning at the end of this epoch is the last one."""
        return self.epoch + 1 >= self.epochs

    @property
    def states(self) -> dict[str, Tensor]:
        """By layer name, int8 [K]: 0 live, 1 soft-dead, 2 hard-dead."""
        return {name: self.filters.codes(name) for name in self.layers}

    @property
    def hides_soft(self) -> bool:
        """Whether soft-dead filters are masked at this step."""
        return self.finished or self.phases.wakes_none(self.steps)

    @property
    def phase(self) -> int:
        """Which part of the epoch this step is in: masks are others where it is another."""
        return self.phases.at(self.steps)

    @property
    def duty(self) -> float:
        """The share of an epoch's steps in which a soft-dead filter trains along."""
        return self.phases.duty

    @property
    def steps_per_epoch(self) -> int | None:
        """Length of an epoch; None: not known yet."""
        return self.phases.steps_per_epoch

    @property
    def units(self) -> list[Group]:
        """Filters that are pruned together: a layer's, or those of several layers that meet in adds."""
        return self.filters.units

    # ---- pruning

    def _prune_first(self) -> None:
        """Prunes before the first epoch, so that load_state_dict can take it back."""
        pairs = [pair for f in self.followers for pair in matched_layers(type(self).__name__, self.model, f)]
        followers = [layer for _, layer in pairs]
        with FirstPruning(self.model, self.optimizer, followers) as self._first:
            self._prune(-1)
            self._set_masks()
        self.criterion.begin_epoch()

    @torch.no_grad()
    def _prune(self, epoch: int) -> None:
        """Ranks, decides what is dead and hard-dead, and changes the weights of both."""
        rankings = self._rankings()
        gone = [ranking.hard for ranking in rankings]
        dead = list(map(max, self._counts(rankings, epoch), gone))
        hard = dead if epoch + 1 >= self.epochs else self.hard_counts(epoch, rankings, dead)
        hard = [min(d, max(h, g)) for d, h, g in zip(dead, hard, gone, strict=True)]
        newly_hard = [r.first(h) & ~was for r, h, was in zip(rankings, hard, self.filters.hard, strict=True)]
        self.filters.dead = [r.first(d) for r, d in zip(rankings, dead, strict=True)]
        self.filters.hard = [r.first(h) for r, h in zip(rankings, hard, strict=True)]
        soft = self.filters.soft
        if self.phases.deals:
            self.phases.deal(soft, self._random_keys())
        for name in self.layers:
            self._zero(name, self._rows(newly_hard, name))
            rows = self._rows(soft, name)
            if len(rows):
                self.soften(name, rows, epoch)

    def _random_keys(self) -> list[Tensor]:
        """By unit, random numbers [width], the same on all ranks, whatever their seeds."""
        keys = {str(i): torch.rand(unit.width, generator=self.generator) for i, unit in enumerate(self.units)}
        keys = {name: key.to(self._on_device.device) for name, key in keys.items()}
        return [key.cpu() for key in ranks.mean(keys, self.process_group).values()]

    def _rankings(self) -> list[Ranking]:
        scores = ranks.mean(self.criterion.scores(), self.process_group)
        for name in self.layers:
            wrong = (~scores[name].isfinite()).nonzero().flatten().tolist()
            self._expect(not wrong, name, "finite scores", f"others for filters {wrong}")
        return self._ranked([of_unit(unit, scores) for unit in self.units])

    # ---- masks

    def _set_masks(self) -> None:
        self._leave()
        hidden = self.filters.dead
        if not (self._masks_all or self.hides_soft):
            awake = self.phases.awake(self.filters.soft, self.steps)
            hidden = [dead & ~woken for dead, woken in zip(hidden, awake, strict=True)]
        live = {name: ~self.filters.of_layer(hidden, name) for name in self.layers}
        not_hard = {name: ~self.filters.of_layer(self.filters.hard, name) for name in self.layers}
        self.channel_masks.set_masks(live, not_hard, self.with_norms)
        for follower in self.followers:
            copy_masks(self.model, follower)

    # ---- the end

    def detach(self) -> None:
        """Removes the method's hooks from optimizer and model.

        The masks stay, but from now on nothing keeps the optimizer from moving dead filters.
        """
        self._stop_running()
        self._find_norms()
        if self.clip is not None:
            self.clip.stop()
        self.criterion.stop()
        self.binding.remove()

    def __repr__(self) -> str:
        states = torch.cat(list(self.states.values()))
        live, soft, hard = (int((states == value).sum()) for value in range(3))
        where = f"epoch {self.epoch}/{self.all_epochs}"
        return f"{type(self).__name__}({where}; filters: {live} live, {soft} soft, {hard} hard)"
