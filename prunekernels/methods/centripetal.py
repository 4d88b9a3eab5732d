"""C-SGD: the filters of a cluster are drawn together until they are equal, then merged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..filter_ops import cluster_mean_
from . import ranks
from .arguments import is_share
from .base import Method
from .clusters import CLUSTERINGS, Clustering
from .filter_states import FilterStates
from .merged_gradients import MergedGradients
from .merging import MergeGroup, mergeable_groups
from .ranking import pruned_count, rounded

STRENGTH = 0.05  # published for ImageNet
NORM_SHARE = 0.1  # of it for biases and norms, as published
LEFT = 1e-3  # share of the deviations that is left at the merge
PULL_STEPS = 250  # that are enough for it with momentum 0.9
STEPS = 100  # taken for those of an epoch until they are known


class ClusteredTensor(NamedTuple):
    """A tensor with a row per filter or channel, and the cluster of each row."""

    tensor: Tensor
    ids: Tensor  # int32 [rows], -1 = of no cluster

    @property
    def is_filters(self) -> bool:
        """Whether the tensor is a convolution's weight, not a bias, a norm's parameter or statistic."""
        return self.tensor.dim() > 1


class CSGD(Method):
    """Centripetal SGD: gradients make the filters of a cluster equal, and equal filters are merged into one.

    Nothing is zeroed. The optimizer sees, for filter W_i of cluster H and its gradient g_i,

        dW_i = mean over j in H of g_j + weight_decay W_i + strength (W_i - mean over j in H of W_j)

    whose middle term is the optimizer's own weight_decay (not AdamW's, which is decoupled). Biases and norms of
    clustered filters get the same with 0.1 strength. Under plain SGD the deviation from the cluster's mean shrinks by
    exactly 1 - lr (weight_decay + strength) a step.

    At the end of an epoch (`merge_at`), or by `merge`, the first filter of each cluster stays and the others are
    hard-dead. All layers that read a cluster's channels read the first one instead, with their weights for them added
    up. That is exact once the filters are equal; `deviations` tells how far they are from it, `collapse` makes them so.
    Before the merge nothing is dead or faster; from then on a step costs what the merged network costs.

    From the paper and its released code: rule, 0.1 for biases and norms, clusters made once, the merge at the end.
    Ours: the k-means, and the merge before the end, which is the default where duty is below 1 (see `tuned`).

    Args:
        model: See Method.
        optimizer: See Method.
        rate: The share of filters that is merged away.
        epochs: See Method.
        example_input: An input of the model, from which the graph tells which layers read a filter. Needed.
        strength: The factor of the centripetal term. Published: 3e-3 (600 epochs on CIFAR), 0.05 (ImageNet). "auto":
            under SGD as much as makes the filters equal by the merge (see pull_rate), 0.05 otherwise. None: 0.05.
        clusters: "kmeans", "even" (neighbours), or a function (rows, count, generator) that returns int64 [rows], the
            cluster of each row.
        start: The epoch at whose end the clusters are made; -1: at once, for a trained network. None: -1 where merge_at
            is 1; otherwise the last that leaves PULL_STEPS steps to the merge, and at least halfway to it.
        merge_at: The share of the epochs after which the filters are merged, in (0, 1]. Below 1 they are put on their
            means first. None: 1, as in the paper.
        exact: Whether the merged network goes on as its clusters would have, step by step, under SGD: the momentum of
            columns that are added up is added up too, and gradients are scaled (see MergedGradients). False or None: it
            trains as any other network.
        coupling: "joint": filters that meet in an add take the clusters of the one convolution among them that is
            nearest to the input (a stage's first, or its projection). "independent": they are left alone.
        **options: Keywords of Method. criterion has no effect, duty only on defaults; budget must be "layer" or a dict.

    Attributes:
        left_out: By name, the layers whose filters cannot be merged, and why.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 2, 3), torch.nn.Flatten())
        >>> net = torch.nn.Sequential(*net, torch.nn.Linear(32, 2))
        >>> report = pk.convert(net)
        >>> optimizer = torch.optim.SGD(net.parameters(), 0.01)
        >>> images = torch.randn(2, 1, 8, 8)
        >>> method = pk.methods.CSGD(net, optimizer, rate=0.5, epochs=2, example_input=images, strength=10.0)
        >>> for epoch in range(2):
        ...     optimizer.zero_grad(); net(images).sum().backward(); optimizer.step(); method.step()
        ...     counts = method.end_epoch()
        >>> counts["0"].hard, method.merged
        (2, True)
    """

    has_warm_up = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rate: float = 0.5,
        epochs: int = 200,
        *,
        example_input: Any = None,
        strength: float | str | None = None,
        clusters: str | Clustering = "kmeans",
        start: int | None = None,
        merge_at: float | None = None,
        exact: bool | None = None,
        coupling: str = "joint",
        **options: Any,
    ) -> None:
        is_known = callable(clusters) or clusters in CLUSTERINGS
        self._expect(is_known, "clusters", f"one of {', '.join(CLUSTERINGS)} or a function", repr(clusters))
        strength = STRENGTH if strength is None else strength
        is_known = strength == "auto" or (isinstance(strength, Real) and strength >= 0)
        self._expect(is_known, "strength", "a number, at least 0, or auto", strength)
        self._expect(exact is None or isinstance(exact, bool), "exact", "True, False or None", repr(exact))
        merge_at = 1.0 if merge_at is None else merge_at
        self._expect(is_share(merge_at) and merge_at > 0, "merge_at", "a share of the epochs in (0, 1]", merge_at)
        self.merge_at, self.merge_epoch = (
            merge_at,
            epoch_at(merge_at, self._epochs_that_prune(epochs, options.get("fine_tune"))),
        )
        last = max(-1, self.merge_epoch - 1)
        if start is None:
            start = -1 if merge_at == 1 else self._latest_start(options.get("steps_per_epoch"))
        self._expect(-1 <= start <= last, "start", f"an epoch from -1 to {last}", start)
        self._expect(example_input is not None, "example_input", "an input, as merging needs the graph", None)
        budget = options.get("budget", "layer")
        is_uniform = budget == "layer" or isinstance(budget, Mapping)
        self._expect(is_uniform, "budget", "layer or a dict, as clusters do not compare", repr(budget))
        self.strength, self.exact = strength, bool(exact)
        self.start, self._alone = start, coupling == "independent"
        self.clustering: Clustering = CLUSTERINGS[clusters] if isinstance(clusters, str) else clusters
        self.leaders: list[Tensor] | None = None  # by group, int64 [width]: the channel that each is merged into
        self.merged = False
        self._clustered: list[ClusteredTensor] = []
        self._merged_gradients: MergedGradients | None = None
        self._hooks: list[Any] = []
        coupling = "joint" if self._alone else coupling
        super().__init__(model, optimizer, rate, epochs, example_input=example_input, coupling=coupling, **options)

    def _latest_start(self, steps_per_epoch: object) -> int:
        """The last epoch after which there is time to make filters equal; before it the network trains freely."""
        halfway = (self.merge_epoch + 1) // 2 - 1
        if not isinstance(steps_per_epoch, int) or steps_per_epoch < 1:
            return halfway
        return max(halfway, self.merge_epoch - math.ceil(PULL_STEPS / steps_per_epoch))

    pulled_share = 1.0  # of the steps between clusters and merge, the last ones: those in which all filters are pulled

    @classmethod
    def tuned(cls, epochs: int) -> dict[str, Any]:
        return {"strength": "auto", "merge_at": 0.375, "exact": True}

    def _begin(self, is_new: bool) -> None:
        super()._begin(is_new)
        self._hooks = [
            self.before_step(self.pull, when=lambda: not self.merged),
            self.before_step(self._scale_merged, when=lambda: self.merged, full_width=False),
        ]
        self._keep_mergeable(self._example_input)
        if is_new and self.start < 0:
            self._cluster()

    def _keep_mergeable(self, example_input: Any) -> None:
        """Reduces units and layers to those whose filters can be merged."""
        groups = {group.layers: group for group in self.channel_masks.groups}
        wanted = [unit.layers for unit in self.units if not (self._alone and len(unit.layers) > 1)]
        found = mergeable_groups(type(self).__name__, self.model, example_input, [groups[layers] for layers in wanted])
        for unit in self.units:
            if unit.layers not in found:
                why = "merging its filters would change outputs" if unit.layers in wanted else "it meets others"
                self.left_out |= dict.fromkeys(unit.layers, why)
        self.filters = FilterStates([unit for unit in self.units if unit.layers in found])
        self.merge_groups: list[MergeGroup] = [found[unit.layers] for unit in self.units]
        self.layers = {name: layer for name, layer in self.layers.items() if name not in self.left_out}
        self._expect(bool(self.layers), "model", "layers whose filters can be merged", f"{self.left_out}")
        self._find_rate(example_input)

    def _serves(self) -> bool:
        return self.merged  # before, the rule moves all entries, those that the small network lacks too

    # ---- clusters

    def _cluster(self) -> None:
        self.leaders = ranks.of_rank_0([self._leader(group) for group in self.merge_groups], self.process_group)
        self._clustered = self._clustered_tensors(self.leaders)

    def _leader(self, group: MergeGroup) -> Tensor:
        """int64 [width]: the first channel of each channel's cluster; clusters are within classes of the group."""
        leader = torch.arange(group.width)
        for channels in group.classes():
            nearest = next(n for n in group.layers if int(channels[0]) in group.filters[n].tolist())
            row_of = {int(channel): row for row, channel in enumerate(group.filters[nearest])}
            rows = torch.tensor([row_of[int(channel)] for channel in channels])
            weight = self.layers[nearest].weight.detach().cpu()[rows]
            pruned = min(pruned_count(len(rows), self.rates.get(nearest, self.rate)), len(rows) - 1)
            count = len(rows) - rounded(len(rows), pruned, self.round_to)
            ids = self.clustering(weight, count, self.generator)
            is_right = ids.shape == rows.shape and len(ids.unique()) == count
            self._expect(is_right, "clusters", f"{count} clusters of {len(rows)} rows", f"{ids.tolist()}")
            for cluster in ids.unique():
                members = channels[ids == cluster]
                leader[members] = members[0]
        return leader

    def _clustered_tensors(self, leaders: list[Tensor]) -> list[ClusteredTensor]:
        """Every tensor with a row per channel, once: a norm behind a concatenation has rows of several groups."""
        found: dict[int, ClusteredTensor] = {}
        first = 0
        for group, leader in zip(self.merge_groups, leaders, strict=True):
            for tensor, channels, _ in group.tensors(self.model):
                none = torch.full((len(channels),), -1, dtype=torch.int32)
                ids = found.setdefault(id(tensor), ClusteredTensor(tensor, none)).ids
                own = channels >= 0
                ids[own] = (leader[channels[own]] + first).int()
            first += group.width
        return list(found.values())

    @torch.no_grad()
    def pull(self) -> None:
        """Replaces the gradients of clustered filters by the rule's; a hook calls it before each optimizer.step()."""
        if self.merged:
            return
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        batches: dict[tuple[Any, ...], list[ClusteredTensor]] = {}
        for clustered in self._clustered:
            p = clustered.tensor
            if p.grad is not None:
                strength = self._strength_in(groups.get(id(p), {})) * (1 if clustered.is_filters else NORM_SHARE)
                batches.setdefault((strength, clustered.is_filters, p.device, p.dtype), []).append(clustered)
        for (strength, *_), batch in batches.items():
            self._pull(batch, strength)

    def _strength_in(self, group: Mapping[str, Any]) -> float:
        """The strength for parameters of this group of the optimizer, at this step."""
        if isinstance(self.strength, Real):
            return float(self.strength)
        if "momentum" not in group:  # not SGD, whose steps alone are known
            return STRENGTH
        steps = round(self.pulled_share * self._steps_to_merge())
        rate = min(1.0, pull_rate(steps, group["momentum"]) / NORM_SHARE)
        return rate / float(group["lr"]) if group["lr"] > 0 else 0.0

    def _steps_to_merge(self) -> int:
        """How many steps there are between clusters and merge."""
        return (self.merge_epoch - self.start) * (self.steps_per_epoch or STEPS)

    def _pull(self, batch: list[ClusteredTensor], strength: float) -> None:
        """The same for tensors of one kind, device and dtype, all of which have gradients."""
        grads: list[Tensor] = [clustered.tensor.grad for clustered in batch]  # type: ignore[misc]
        weights = [clustered.tensor.detach() for clustered in batch]
        cluster_mean_(grads, [clustered.ids for clustered in batch], weights=weights, strength=strength)

    @torch.no_grad()
    def deviations(self) -> dict[str, float]:
        """Returns by layer how far its filters are from equal.

        Returns:
            By layer name, the largest difference of a weight from its cluster's mean over the largest weight.
        """
        found = {}
        for name, layer in self.layers.items():
            ids = next((clustered.ids for clustered in self._clustered if clustered.tensor is layer.weight), None)
            weight = layer.weight.detach()
            mean = weight.clone()
            if ids is not None and not self.merged:
                cluster_mean_([mean], [ids])
            found[name] = float((weight - mean).abs().max() / weight.abs().max().clamp(min=1e-30))
        return found

    # ---- the end

    @torch.no_grad()
    def collapse(self) -> None:
        """Makes the filters of each cluster equal: weights, biases, norms, statistics and momentum become means."""
        if self.merged or self.leaders is None:
            return
        for clustered in self._clustered_tensors(self.leaders):
            self._collapse(clustered)
            for state in self.optimizer_states(clustered.tensor):
                cluster_mean_([state], [clustered.ids])

    def _collapse(self, clustered: ClusteredTensor) -> None:
        cluster_mean_([clustered.tensor.detach()], [clustered.ids])

    @torch.no_grad()
    def merge(self) -> None:
        """Merges each cluster into its first filter, for good. The end of the last epoch does it too."""
        self._expect(self.leaders is not None, "start", "an epoch that is over, before a merge", self.start)
        if self.merged:
            return
        self.merged = True
        for group, leader in zip(self.merge_groups, self.leaders or (), strict=True):
            for weight, columns in group.merge(self.model, leader, self._momenta):
                for state in self.optimizer_states(weight):
                    if not any(state is momentum for momentum in self._momenta(weight)):
                        state[:, columns] = 0
            for parameter, gone in group.merged_rows(self.model, leader):
                self.forget(parameter, gone)
        self.filters.dead = [leader != torch.arange(len(leader)) for leader in self.leaders or ()]
        self.filters.hard = [dead.clone() for dead in self.filters.dead]
        self._set_masks()
        self._go_on_merged()

    def _momenta(self, weight: Tensor) -> list[Tensor]:
        """The weight's momentum under SGD, if the merge is to go on with it."""
        momentum = self.optimizer.state.get(weight, {}).get("momentum_buffer") if self.exact else None
        return [momentum] if isinstance(momentum, Tensor) else []

    def _go_on_merged(self) -> None:
        is_scaled = self.exact and self.merged and self.leaders is not None
        found = MergedGradients(self.model, self.merge_groups, self.leaders or []) if is_scaled else None
        self._merged_gradients = found

    @torch.no_grad()
    def _scale_merged(self) -> None:
        if self._merged_gradients is not None:
            compaction = self.compaction if self.is_compacted else None
            self._merged_gradients.scale(self.model if compaction is None else compaction.net, compaction)

    def _prune(self, epoch: int) -> None:
        if epoch == self.start and self.leaders is None:
            self._cluster()
        if epoch >= self.merge_epoch:
            if self.merge_at < 1:
                self.collapse()
            self.merge()

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        leaders = None if self.leaders is None else [leader.clone() for leader in self.leaders]
        return super().state_dict() | {"leaders": leaders, "merged": self.merged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        leaders = state_dict["leaders"]
        self.leaders = None if leaders is None else [leader.cpu().clone() for leader in leaders]
        self._clustered = [] if self.leaders is None else self._clustered_tensors(self.leaders)
        self.merged = state_dict["merged"]
        self._go_on_merged()

    def detach(self) -> None:
        super().detach()
        for hook in self._hooks:
            hook.remove()


def epoch_at(share: float, epochs: int) -> int:
    """The epoch at whose end this share of the epochs is over, share in (0, 1]."""
    return max(0, math.ceil(share * epochs - 1e-9) - 1)


def pull_rate(steps: int, momentum: float, left: float = LEFT) -> float:
    """lr times strength that leaves this share of a deviation after some steps of SGD, or as little as can be.

    A deviation d follows d - lr v, v = momentum v + strength d, so that it shrinks by the larger root z of
    z^2 - (1 + momentum - rate) z + momentum a step. Where the roots meet, at z = sqrt(momentum), it shrinks fastest.
    """
    z = max(left ** (1 / max(1, steps)), math.sqrt(momentum))
    return (1 - z) * (1 - momentum / z)
