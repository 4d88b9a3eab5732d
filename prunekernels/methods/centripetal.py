"""C-SGD: filters of a cluster are drawn together until they are equal, then merged. FPAGL: another way there."""

from __future__ import annotations

from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..filter_ops import cluster_mean_, mask_grad_
from .base import Method, is_share
from .clusters import CLUSTERINGS, Clustering
from .merging import Stream, streams
from .ranking import pruned_count, rounded

ADAPTIVE = ("filter", "element", None)


class Rows(NamedTuple):
    """A tensor with a row per filter or channel, and the cluster of each: int32 [rows], -1 = none."""

    tensor: Tensor
    ids: Tensor

    @property
    def are_filters(self) -> bool:
        """Of a convolution's weight; else of a bias, a norm's parameter or statistic."""
        return self.tensor.dim() > 1


class CSGD(Method):
    """Centripetal SGD: nothing is zeroed; gradients make the filters of a cluster equal, and equal ones are merged.

        dW_i = mean of the cluster's gradients + weight_decay W_i + strength (W_i - mean of the cluster's weights)

    The optimizer adds the middle term itself (its weight_decay, not AdamW's, in the group of these parameters: the same
    sum). Biases and norms of clustered filters get the same with 0.1 strength. Under plain SGD the deviation from the
    cluster's mean shrinks by exactly 1 - lr (weight_decay + strength) a step.

    At the end of the last epoch, or by merge(), the first filter of each cluster stays, whoever reads the others reads
    it instead (its weights there are added up), and those are hard-dead. That is exact once the filters are equal:
    deviations() tells how far they are from it, collapse() makes them so. Before the merge nothing is dead or faster.

    rate: the share of filters merged away. strength: published are 3e-3 (600 epochs on CIFAR) and 0.05 (ImageNet).
    clusters: "kmeans" (of our own), "even" (neighbours) or a function (rows, count, generator) -> cluster by row. They
    are made once, at the end of epoch `start` (-1: at once, for a trained network), and stay. Filters that meet in an
    add take the clusters of the pacesetter: the convolution among them that is nearest to the input (a stage's first
    or its projection). coupling "independent": filters that meet in an add are left alone. What cannot be merged is in
    left_out. Other options are Method's; criterion and duty mean nothing here. example_input is needed.
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
        self.leaders: list[Tensor] | None = None  # by stream and channel, the channel it will be merged into
        self.merged = False
        self._rows_of: list[Rows] = []
        coupling = "joint" if self._alone else coupling
        super().__init__(model, optimizer, rate, epochs, example_input=example_input, coupling=coupling, **options)
        self._hook = self.before_step(self.pull)
        try:
            self._find_streams(example_input)
            if start < 0:
                self._cluster()
        except BaseException:
            self.detach()
            raise

    def _find_streams(self, example_input: Any) -> None:
        """Leaves what can be merged."""
        groups = {group.layers: group for group in self.structure.groups}
        wanted = [unit.layers for unit in self.units if not (self._alone and len(unit.layers) > 1)]
        found = streams(type(self).__name__, self.model, example_input, [groups[layers] for layers in wanted])
        for unit in self.units:
            if unit.layers not in found:
                why = "merging its filters would change outputs" if unit.layers in wanted else "it meets others"
                self.left_out |= dict.fromkeys(unit.layers, why)
        self.units = [unit for unit in self.units if unit.layers in found]
        self.streams: list[Stream] = [found[unit.layers] for unit in self.units]
        self.layers = {name: layer for name, layer in self.layers.items() if name not in self.left_out}
        self._expect(bool(self.layers), "model", "layers whose filters can be merged", f"{self.left_out}")
        self._dead = [torch.zeros(unit.width, dtype=torch.bool) for unit in self.units]
        self._hard = [dead.clone() for dead in self._dead]

    # ---- clusters

    def _cluster(self) -> None:
        self.leaders = [self._leader(stream) for stream in self.streams]
        self._rows_of = self._all_rows(self.leaders)

    def _leader(self, stream: Stream) -> Tensor:
        leader = torch.arange(stream.width)
        for channels in stream.classes():
            pacesetter = next(n for n in stream.layers if int(channels[0]) in stream.filters[n].tolist())
            row_of = {int(channel): row for row, channel in enumerate(stream.filters[pacesetter])}
            rows = torch.tensor([row_of[int(channel)] for channel in channels])
            weight = self.layers[pacesetter].weight.detach().cpu()[rows]
            pruned = min(pruned_count(len(rows), self.rate), len(rows) - 1)
            count = len(rows) - rounded(len(rows), pruned, self.round_to)
            ids = self.clustering(weight, count, self.generator)
            is_right = ids.shape == rows.shape and len(ids.unique()) == count
            self._expect(is_right, "clusters", f"{count} clusters of {len(rows)} rows", f"{ids.tolist()}")
            for cluster in ids.unique():
                members = channels[ids == cluster]
                leader[members] = members[0]
        return leader

    def _all_rows(self, leaders: list[Tensor]) -> list[Rows]:
        """A norm behind a concatenation has rows of several streams."""
        found: dict[int, Rows] = {}
        first = 0
        for stream, leader in zip(self.streams, leaders, strict=True):
            for tensor, channels, _ in stream.rows(self.model):
                rows = found.setdefault(id(tensor), Rows(tensor, torch.full((len(channels),), -1, dtype=torch.int32)))
                own = channels >= 0
                rows.ids[own] = (leader[channels[own]] + first).int()
            first += stream.width
        return list(found.values())

    @torch.no_grad()
    def pull(self) -> None:
        """Changes the gradients; a hook calls it before each optimizer.step()."""
        if self.merged:
            return
        batches: dict[tuple[Any, ...], list[Rows]] = {}
        for rows in self._rows_of:
            p = rows.tensor
            if p.grad is not None:
                batches.setdefault((rows.are_filters, p.device, p.dtype), []).append(rows)
        for (are_filters, *_), batch in batches.items():
            self._pull(batch, self.strength if are_filters else 0.1 * self.strength)

    def _pull(self, batch: list[Rows], strength: float) -> None:
        grads: list[Tensor] = [rows.tensor.grad for rows in batch]  # type: ignore[misc]
        weights = [rows.tensor.detach() for rows in batch]
        cluster_mean_(grads, [rows.ids for rows in batch], weights=weights, strength=strength)

    @torch.no_grad()
    def deviations(self) -> dict[str, float]:
        """By layer, the largest difference of a weight from its cluster's mean over the largest weight."""
        found = {}
        for name, layer in self.layers.items():
            rows = next((rows for rows in self._rows_of if rows.tensor is layer.weight), None)
            weight = layer.weight.detach()
            mean = weight.clone()
            if rows is not None and not self.merged:
                cluster_mean_([mean], [rows.ids])
            found[name] = float((weight - mean).abs().max() / weight.abs().max().clamp(min=1e-30))
        return found

    # ---- the end

    @torch.no_grad()
    def collapse(self) -> None:
        """Makes the filters of each cluster equal: weights, biases, norms, their statistics and momentum, by means."""
        if self.merged or self.leaders is None:
            return
        for rows in self._all_rows(self.leaders):
            beside = [s for s in self.optimizer.state.get(rows.tensor, {}).values() if _is_like(s, rows.tensor)]
            self._collapse(rows)
            for state in beside:
                cluster_mean_([state], [rows.ids])

    def _collapse(self, rows: Rows) -> None:
        cluster_mean_([rows.tensor.detach()], [rows.ids])

    @torch.no_grad()
    def merge(self) -> None:
        """Keeps the first filter of each cluster; the end of the last epoch does it too."""
        self._expect(self.leaders is not None, "start", "an epoch that is over, before a merge", self.start)
        if self.merged:
            return
        self.merged = True
        for stream, leader in zip(self.streams, self.leaders or (), strict=True):
            for weight, columns in stream.merge(self.model, leader):
                for state in self.optimizer.state.get(weight, {}).values():
                    if _is_like(state, weight):
                        state[:, columns] = 0
        self._dead = [leader != torch.arange(len(leader)) for leader in self.leaders or ()]
        self._hard = [dead.clone() for dead in self._dead]
        for name in self.layers:
            self._bury(name, self._rows(self._hard, name))
        self._mask()

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
        self._rows_of = [] if self.leaders is None else self._all_rows(self.leaders)
        self.merged = state_dict["merged"]

    def detach(self) -> None:
        super().detach()
        self._hook.remove()


class FPAGL(CSGD):
    """Filter pruning with adaptive gradient learning: C-SGD with kinder centres, and gradients kept where they serve.

    Our reconstruction from the abstract, over a C-SGD that is exact; no result is claimed for the paper. Its parts:

    taylor: a cluster's centre is the mean of its weights by importance I_k = |sum of w g| (added up over the steps), so
    that filters that matter move least. adaptive: where the descent step -g has no component away from the centre, by
    "filter" or "element", the gradient stays as it is; elsewhere (None: everywhere) it is C-SGD's with that centre.
    collapse: after that share of the epochs the filters are put on their centres and stay equal from then on; None:
    never. All three off is C-SGD, whose rule biases and norms follow always, as do clusters and merging.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rate: float = 0.5,
        epochs: int = 200,
        *,
        taylor: bool = True,
        adaptive: str | None = "filter",
        collapse: float | None = 0.75,
        **options: Any,
    ) -> None:
        self._expect(adaptive in ADAPTIVE, "adaptive", "filter, element or None", repr(adaptive))
        holds = collapse is None or is_share(collapse)
        self._expect(holds, "collapse", "a share of the epochs in [0, 1] or None", collapse)
        self.taylor, self.adaptive, self.collapse_at = taylor, adaptive, collapse
        self.collapsed = False
        self.importance: dict[Tensor, Tensor] = {}
        super().__init__(model, optimizer, rate, epochs, **options)

    def _pull(self, batch: list[Rows], strength: float) -> None:
        if self.collapsed or not batch[0].are_filters or not (self.taylor or self.adaptive):
            super()._pull(batch, strength)
            return
        grads: list[Tensor] = [rows.tensor.grad for rows in batch]  # type: ignore[misc]
        if self.taylor:
            self._weigh([rows.tensor.detach() for rows in batch], grads, batch)
        mean_grads = [grad.clone() for grad in grads]
        cluster_mean_(mean_grads, [rows.ids for rows in batch])
        for rows, grad, mean in zip(batch, grads, mean_grads, strict=True):
            inward = self._centres(rows) - _wide(rows.tensor)
            new = _wide(mean) - strength * inward
            if self.adaptive is not None:
                away = _wide(grad) * inward
                if self.adaptive == "filter":
                    away = away.sum(tuple(range(1, away.dim())), keepdim=True)
                new = torch.where(away <= 0, _wide(grad), new)
            grad.copy_(new)

    def _weigh(self, weights: list[Tensor], grads: list[Tensor], batch: list[Rows]) -> None:
        terms = [_wide(weight).new_zeros(len(weight)) for weight in weights]
        mask_grad_(grads, weights=weights, product_sums=terms)
        for rows, term in zip(batch, terms, strict=True):
            known = self.importance.get(rows.tensor)
            self.importance[rows.tensor] = term.abs() if known is None else known + term.abs()

    def _centres(self, rows: Rows) -> Tensor:
        """By row, its cluster's centre; a row of no cluster is its own."""
        weight = _wide(rows.tensor)
        importance = self.importance.get(rows.tensor) if self.taylor else None
        if importance is None:
            mean = weight.clone()
            cluster_mean_([mean], [rows.ids])
            return mean
        alone = rows.ids.max() + 1 + torch.arange(len(weight))
        index = torch.where(rows.ids < 0, alone, rows.ids).unique(return_inverse=True)[1].to(weight.device)
        total = importance.new_zeros(len(weight)).index_add_(0, index, importance)
        share = torch.where(total[index] > 0, importance, 1.0)  # where none matters all matter the same
        share = share / share.new_zeros(len(weight)).index_add_(0, index, share)[index]
        flat = weight.flatten(1)
        return torch.zeros_like(flat).index_add_(0, index, flat * share[:, None])[index].view_as(weight)

    def _collapse(self, rows: Rows) -> None:
        if rows.are_filters:
            rows.tensor.copy_(self._centres(rows))
        super()._collapse(rows)  # rows of one cluster are equal to the bit

    def _prune(self, epoch: int) -> None:
        is_late = self.collapse_at is not None and epoch + 1 >= self.collapse_at * self.epochs
        if is_late and self.leaders is not None and not self.collapsed:
            self.collapse()
        super()._prune(epoch)

    def collapse(self) -> None:
        super().collapse()
        self.collapsed = True

    def state_dict(self) -> dict[str, Any]:
        of = {name: self.importance.get(layer.weight) for name, layer in self.layers.items()}
        importance = {name: value.clone() for name, value in of.items() if value is not None}
        return super().state_dict() | {"collapsed": self.collapsed, "importance": importance}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.collapsed = state_dict["collapsed"]
        weights = {name: layer.weight for name, layer in self.layers.items()}
        kept = state_dict["importance"].items()
        self.importance = {weights[name]: value.to(weights[name].device).clone() for name, value in kept}


def _is_like(state: object, parameter: Tensor) -> bool:
    return isinstance(state, Tensor) and state.shape == parameter.shape


def _wide(tensor: Tensor) -> Tensor:
    """In the type that sums are made in."""
    return tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()
