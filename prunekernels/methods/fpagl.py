"""FPAGL: C-SGD whose centres and gradients adapt to the filters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..filter_ops import mask_grad_
from .arguments import is_share
from .centripetal import CSGD, STEPS, ClusteredTensor

ADAPTIVE = ("filter", "element", None)


class FPAGL(CSGD):
    """Filter pruning with adaptive gradient learning: C-SGD with weighted centres, and gradients kept where they serve.

    A cluster H has the centre c_H, and the optimizer sees for its filter W_i with gradient g_i

        c_H = sum over k in H of I_k W_k / sum over k in H of I_k,  I_k = |sum over steps and weights of w g|
        dW_i = g_i where <g_i, c_H - W_i> <= 0, else mean over j in H of g_j + strength (W_i - c_H)

    so that filters that matter move least, and a step -g_i that does not lead away from the centre is left as it is.
    After the share `collapse` of the epochs the filters are put on their centres and stay equal from then on. A merge
    before that (see CSGD) does so too; with strength="auto" no g_i is kept in the last half of the steps before it.

    Our reconstruction from the abstract, over a C-SGD that is exact; no result is claimed for the paper. With taylor,
    adaptive and collapse all off it is C-SGD, whose rule biases and norms, clusters and merging follow in any case.

    Args:
        model: See Method.
        optimizer: See Method.
        rate: See CSGD.
        epochs: See Method.
        taylor: Whether centres are weighted by the importance I_k. False: plain means, as in C-SGD.
        adaptive: Where g_i stays as it is: decided by "filter" (the product <g_i, c_H - W_i>) or by "element" (each
            term of it). None: nowhere, as in C-SGD.
        collapse: The share of the epochs, in [0, 1], after which the filters are put on their centres. None: never.
        **options: Keywords of CSGD and Method.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 2, 3), torch.nn.Flatten())
        >>> net = torch.nn.Sequential(*net, torch.nn.Linear(32, 2))
        >>> report = pk.convert(net)
        >>> optimizer = torch.optim.SGD(net.parameters(), 0.01)
        >>> images = torch.randn(2, 1, 8, 8)
        >>> method = pk.methods.FPAGL(net, optimizer, rate=0.5, epochs=4, example_input=images)
        >>> for epoch in range(3):
        ...     optimizer.zero_grad(); net(images).sum().backward(); optimizer.step(); method.step()
        ...     counts = method.end_epoch()
        >>> method.collapsed, method.deviations()["0"]
        (True, 0.0)
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
        self.pulled_share = 1.0 if adaptive is None else 0.5
        self.collapsed = False
        self.importance: dict[Tensor, Tensor] = {}
        self._same_of: list[ClusteredTensor] | None = None  # which clusters _matrices are of
        self._matrices: dict[tuple[int, ...], Tensor] = {}
        super().__init__(model, optimizer, rate, epochs, **options)

    def _pull(self, batch: list[ClusteredTensor], strength: float) -> None:
        if self.collapsed or not batch[0].is_filters or not (self.taylor or self.adaptive):
            super()._pull(batch, strength)
            return
        grads: list[Tensor] = [clustered.tensor.grad for clustered in batch]  # type: ignore[misc]
        if self.taylor:
            self._add_importance([clustered.tensor.detach() for clustered in batch], grads, batch)
        for alike in _by_shape(batch):
            self._pull_alike(alike, strength)

    def _pull_alike(self, alike: list[ClusteredTensor], strength: float) -> None:
        """The same for weights of one shape, so that a few operations serve all of them."""
        grads: list[Tensor] = [clustered.tensor.grad for clustered in alike]  # type: ignore[misc]
        grad = _in_sum_type(torch.stack(grads)).flatten(2)  # [layers, K, C / groups R S], as are the next three
        weight = _in_sum_type(torch.stack([clustered.tensor for clustered in alike])).flatten(2)
        same = self._same(alike, weight)
        inward = torch.baddbmm(weight, self._shares(alike, same), weight, beta=-1)
        new = torch.baddbmm(inward, _shares_of(same), grad, beta=-strength)
        if self.adaptive is not None and not self._pulls_all():
            away = grad * inward
            if self.adaptive == "filter":
                away = away.sum(2, keepdim=True)
            new = torch.where(away <= 0, grad, new)
        torch._foreach_copy_(grads, list(new.view(-1, *grads[0].shape)))

    def _pulls_all(self) -> bool:
        """Whether the merge is so near that no gradient is kept any more, where strength is to make filters equal."""
        done = (self.epoch - self.start - 1) * (self.steps_per_epoch or STEPS) + self.steps
        return self.strength == "auto" and done >= (1 - self.pulled_share) * self._steps_to_merge()

    def _same(self, alike: list[ClusteredTensor], like: Tensor) -> Tensor:
        """[layers, K, K]: 1 where two filters are of one cluster, else 0. A filter of no cluster is one by itself."""
        if self._same_of is not self._clustered:
            self._same_of, self._matrices = self._clustered, {}
        key = tuple(id(clustered.tensor) for clustered in alike)
        if key not in self._matrices:
            ids = torch.stack([clustered.ids for clustered in alike])
            clusters = (ids[:, :, None] == ids[:, None]) & (ids >= 0)[:, :, None]
            self._matrices[key] = (clusters | torch.eye(ids.shape[1], dtype=torch.bool)).to(like)
        return self._matrices[key]

    def _shares(self, alike: list[ClusteredTensor], same: Tensor) -> Tensor:
        """[layers, K, K]: by filter, the share that each filter has in the centre of its cluster."""
        known = [self.importance.get(clustered.tensor) for clustered in alike] if self.taylor else [None]
        if all(each is None for each in known):
            return _shares_of(same)
        each = torch.stack([same.new_zeros(same.shape[1]) if one is None else one for one in known])
        total = (same * each[:, None]).sum(2)
        return _shares_of(same * torch.where(total > 0, each, 1.0)[:, None])  # without any importance, the plain mean

    def _add_importance(self, weights: list[Tensor], grads: list[Tensor], batch: list[ClusteredTensor]) -> None:
        """Adds this step's |sum of w g| of each filter, [K] by weight."""
        terms = [_in_sum_type(weight).new_zeros(len(weight)) for weight in weights]
        mask_grad_(grads, weights=weights, product_sums=terms)
        for clustered, term in zip(batch, terms, strict=True):
            known = self.importance.get(clustered.tensor)
            self.importance[clustered.tensor] = term.abs() if known is None else known + term.abs()

    def _centres(self, clustered: ClusteredTensor) -> Tensor:
        """[K, C / groups, R, S]: by filter, the centre of its cluster; a filter of no cluster is its own centre."""
        weight = _in_sum_type(clustered.tensor)[None].flatten(2)
        same = self._same([clustered], weight)
        return (self._shares([clustered], same) @ weight).view_as(clustered.tensor)

    def _collapse(self, clustered: ClusteredTensor) -> None:
        if clustered.is_filters:
            clustered.tensor.copy_(self._centres(clustered))
        super()._collapse(clustered)  # rows of one cluster are equal to the bit

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
        saved = state_dict["importance"].items()
        self.importance = {weights[name]: value.to(weights[name].device).clone() for name, value in saved}


def _in_sum_type(tensor: Tensor) -> Tensor:
    """The tensor in the type that sums are made in: float64, or float32 for all others."""
    return tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()


def _by_shape(batch: list[ClusteredTensor]) -> list[list[ClusteredTensor]]:
    by_shape: dict[torch.Size, list[ClusteredTensor]] = {}
    for clustered in batch:
        by_shape.setdefault(clustered.tensor.shape, []).append(clustered)
    return list(by_shape.values())


def _shares_of(weights: Tensor) -> Tensor:
    """[..., K, K]: each row over its sum."""
    return weights / weights.sum(-1, keepdim=True)
