"""FPAGL: C-SGD whose centres and gradients adapt to the filters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..filter_ops import cluster_mean_, mask_grad_
from .arguments import is_share
from .centripetal import CSGD, ClusteredTensor

ADAPTIVE = ("filter", "element", None)


class FPAGL(CSGD):
    """Filter pruning with adaptive gradient learning: C-SGD with weighted centres, and gradients kept where they serve.

    A cluster H has the centre c_H, and the optimizer sees for its filter W_i with gradient g_i

        c_H = sum over k in H of I_k W_k / sum over k in H of I_k,  I_k = |sum over steps and weights of w g|
        dW_i = g_i where <g_i, c_H - W_i> <= 0, else mean over j in H of g_j + strength (W_i - c_H)

    so that filters that matter move least, and a step -g_i that does not lead away from the centre is left as it is.
    After the share `collapse` of the epochs the filters are put on their centres and stay equal from then on.

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
        self.collapsed = False
        self.importance: dict[Tensor, Tensor] = {}
        super().__init__(model, optimizer, rate, epochs, **options)

    def _pull(self, batch: list[ClusteredTensor], strength: float) -> None:
        if self.collapsed or not batch[0].is_filters or not (self.taylor or self.adaptive):
            super()._pull(batch, strength)
            return
        grads: list[Tensor] = [clustered.tensor.grad for clustered in batch]  # type: ignore[misc]
        if self.taylor:
            self._add_importance([clustered.tensor.detach() for clustered in batch], grads, batch)
        mean_grads = [grad.clone() for grad in grads]
        cluster_mean_(mean_grads, [clustered.ids for clustered in batch])
        for clustered, grad, mean in zip(batch, grads, mean_grads, strict=True):
            inward = self._centres(clustered) - _in_sum_type(clustered.tensor)
            new = _in_sum_type(mean) - strength * inward
            if self.adaptive is not None:
                away = _in_sum_type(grad) * inward
                if self.adaptive == "filter":
                    away = away.sum(tuple(range(1, away.dim())), keepdim=True)
                new = torch.where(away <= 0, _in_sum_type(grad), new)
            grad.copy_(new)

    def _add_importance(self, weights: list[Tensor], grads: list[Tensor], batch: list[ClusteredTensor]) -> None:
        """Adds this step's |sum of w g| of each filter, [K] by weight."""
        terms = [_in_sum_type(weight).new_zeros(len(weight)) for weight in weights]
        mask_grad_(grads, weights=weights, product_sums=terms)
        for clustered, term in zip(batch, terms, strict=True):
            known = self.importance.get(clustered.tensor)
            self.importance[clustered.tensor] = term.abs() if known is None else known + term.abs()

    def _centres(self, clustered: ClusteredTensor) -> Tensor:
        """[K, C / groups, R, S]: by filter, the centre of its cluster; a filter of no cluster is its own centre."""
        weight = _in_sum_type(clustered.tensor)
        importance = self.importance.get(clustered.tensor) if self.taylor else None
        if importance is None:
            mean = weight.clone()
            cluster_mean_([mean], [clustered.ids])
            return mean
        alone = clustered.ids.max() + 1 + torch.arange(len(weight))
        index = torch.where(clustered.ids < 0, alone, clustered.ids).unique(return_inverse=True)[1].to(weight.device)
        total = importance.new_zeros(len(weight)).index_add_(0, index, importance)
        share = torch.where(total[index] > 0, importance, 1.0)  # without any importance, the plain mean
        share = share / share.new_zeros(len(weight)).index_add_(0, index, share)[index]
        flat = weight.flatten(1)
        return torch.zeros_like(flat).index_add_(0, index, flat * share[:, None])[index].view_as(weight)

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
