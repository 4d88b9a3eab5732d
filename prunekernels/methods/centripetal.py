"""C-SGD: the filters of a cluster are drawn together until they are equal, then merged."""

from __future__ import annotations

from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..filter_ops import cluster_mean_
from . import ranks
from .base import Method
from .clusters import CLUSTERINGS, Clustering
from .filter_states import FilterStates
from .merging import MergeGroup, mergeable_groups
from .ranking import pruned_count, rounded


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

    At the end of the last epoch, or by `merge`, the first filter of each cluster stays and the others are hard-dead.
    All layers that read a cluster's channels read the first one instead, with their weights for them added up.
    That is exact once the filters are equal; `deviations` tells how far they are from it, `collapse` makes them so.
    Before the merge nothing is dead or faster.

    From the paper and its released code: rule, 0.1 for biases and norms, clusters made once. Ours: the k-means.

    Args:
        model: See Method.
        optimizer: See Method.
        rate: The share of filters that is merged away.
        epochs: See Method.
        example_input: An input of the model, from which the graph tells which layers read a filter. Needed.
        strength: The factor of the centripetal term. Published: 3e-3 (600 epochs on CIFAR), 0.05 (ImageNet).
        clusters: "kmeans", "even" (neighbours), or a function (rows, count, generator) that returns int64 [rows], the
            cluster of each row.
        start: The epoch at whose end the clusters are made; -1: at once, for a trained network.
        coupling: "joint": filters that meet in an add take the clusters of the one convolution among them that is
            nearest to the input (a stage's first, or its projection). "independent": they are left alone.
        **options: Keywords of Method. criterion and duty have no effect; budget must be "layer".

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

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rate: float = 0.5,
        epochs: int = 200,
        *,
        example_input: Any = None,
        strength: float = 0.05,
        clusters: str | Clustering = "kmeans",
        start: int = -1,
        coupling: str = "joint",
        **options: Any,
    ) -> None:
        is_known = callable(clusters) or clusters in CLUSTERINGS
        self._expect(is_known, "clusters", f"one of {', '.join(CLUSTERINGS)} or a function", repr(clusters))
        self._expect(isinstance(strength, Real) and strength >= 0, "strength", "a number, at least 0", strength)
        last = max(-1, self._epochs_that_prune(epochs, options.get("fine_tune")) - 2)
        self._expect(-1 <= start <= last, "start", f"an epoch from -1 to {last}", start)
        self._expect(example_input is not None, "example_input", "an input, as merging needs the graph", None)
        budget = options.get("budget", "layer")
        self._expect(budget == "layer", "budget", "layer, as clusters do not compare", repr(budget))
        self.strength, self.start, self._alone = strength, start, coupling == "independent"
        self.clustering: Clustering = CLUSTERINGS[clusters] if isinstance(clusters, str) else clusters
        self.leaders: list[Tensor] | None = None  # by group, int64 [width]: the channel that each is merged into
        self.merged = False
        self._clustered: list[ClusteredTensor] = []
        self._hook: Any = None
        coupling = "joint" if self._alone else coupling
        super().__init__(model, optimizer, rate, epochs, example_input=example_input, coupling=coupling, **options)

    def _begin(self, is_new: bool) -> None:
        super()._begin(is_new)
        self._hook = self.before_step(self.pull, when=lambda: not self.merged)
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
        batches: dict[tuple[Any, ...], list[ClusteredTensor]] = {}
        for clustered in self._clustered:
            p = clustered.tensor
            if p.grad is not None:
                batches.setdefault((clustered.is_filters, p.device, p.dtype), []).append(clustered)
        for (is_filters, *_), batch in batches.items():
            self._pull(batch, self.strength if is_filters else 0.1 * self.strength)

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
            for weight, columns in group.merge(self.model, leader):
                for state in self.optimizer_states(weight):
                    state[:, columns] = 0
        self.filters.dead = [leader != torch.arange(len(leader)) for leader in self.leaders or ()]
        self.filters.hard = [dead.clone() for dead in self.filters.dead]
        for name in self.layers:
            self._zero(name, self._rows(self.filters.hard, name))
        self._set_masks()

    def _prune(self, epoch: int) -> None:
        if epoch == self.start and self.leaders is None:
            self._cluster()
        if epoch + 1 >= self.epochs:
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

    def detach(self) -> None:
        super().detach()
        if self._hook is not None:
            self._hook.remove()
