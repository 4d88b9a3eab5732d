"""SoftClip: gradients of soft-dead filters no longer than those of live ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ..filter_ops import filter_norms, mask_grad_
from .view import MethodView

Masks = tuple[Tensor, Tensor]  # soft-dead and live filters, bool [K]


class SoftClip:
    """Before each optimizer step, scales a soft-dead filter's gradient g_i down to the mean length of live ones:

        g_i * min(1, mean over live j of ||g_j||_2 / ||g_i||_2)

    The outputs of a filter of zeros have no variance, so a batch norm behind it multiplies its gradient by
    1 / sqrt(eps) = 316. One step of that length makes it the largest filter of its layer: it comes back whatever it is
    worth, and is then too long to learn anything more.
    """

    def __init__(self, method: MethodView) -> None:
        self.method = method
        self._seen: list[Tensor] | None = None  # FilterStates.dead, as of the last look
        self._soft: dict[str, Masks] = {}  # by layer that has both
        self._narrow: dict[str, tuple[Tensor, Masks]] = {}  # by layer: the small network's rows, and theirs of _soft
        self._is_done = False  # for the step to come
        self._hook = method.before_step(self._at_step, when=lambda: self.is_due, full_width=False)

    @property
    def is_due(self) -> bool:
        """Whether soft-dead filters train at this step."""
        return not (self.method.finished or self.method.hides_soft)

    def clip(self) -> None:
        """Scales the gradients down now, if that is due, and not once more when the step comes."""
        if self.is_due:
            self._clip()
            self._is_done = True

    def _at_step(self) -> None:
        if not self._is_done:
            self._clip()
        self._is_done = False

    def stop(self) -> None:
        """Removes the hook."""
        self._hook.remove()

    @torch.no_grad()
    def _clip(self) -> None:
        self._find_soft()
        batches: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Masks]]] = {}
        for name in self._soft:
            grad = self.method.gradient(name)
            if grad is not None:
                batches.setdefault((grad.device, grad.dtype), []).append((grad, self._masks(name)))
        for batch in batches.values():
            grads = [grad for grad, _ in batch]
            lengths = zip(filter_norms(grads), batch, strict=True)
            mask_grad_(grads, grad_scales=[_scale(length, *masks) for length, (_, masks) in lengths])

    def _masks(self, name: str) -> Masks:
        """The layer's soft-dead and live filters among those that the network that trains now has."""
        rows = self.method.rows(name)
        if rows is None:
            return self._soft[name]
        known, masks = self._narrow.get(name, (None, self._soft[name]))
        if known is not rows:
            soft, live = self._soft[name]
            is_filter, picked = (index.to(soft.device) for index in (rows >= 0, rows.clamp_min(0)))
            masks = soft[picked] & is_filter, live[picked] & is_filter
            self._narrow[name] = rows, masks
        return masks

    def _find_soft(self) -> None:
        """Fills _soft, once for each pruning: the filters' states do not change in between."""
        filters = self.method.filters
        if self._seen is filters.dead:
            return
        self._seen, self._soft, self._narrow = filters.dead, {}, {}
        for name, layer in self.method.layers.items():
            codes = filters.codes(name)
            if bool((codes == 1).any()) and bool((codes == 0).any()):
                codes = codes.to(layer.weight.device)
                self._soft[name] = codes == 1, codes == 0


def _scale(length: Tensor, soft: Tensor, live: Tensor) -> Tensor:
    """The factors of a layer's gradients, float32 [K], from their lengths [K]."""
    bound = torch.where(live, length, 0).sum() / live.sum()
    return torch.where(soft & (length > bound), bound / length, 1).float()
