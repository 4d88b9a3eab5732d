"""FirstPruning: what a pruning before the first epoch changed, so that a state loaded after it can take that back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..nn.batch_norm import MaskedBatchNorm2d


class FirstPruning:
    """Within a `with` block, remembers the values of all tensors that the block changes.

    Methods such as SFP prune when they are made. Where a checkpoint was loaded into the network and the optimizer
    before, that changes what was loaded; `take_back` writes the old values over every tensor that nothing else has
    written to since. The order in which network, optimizer and method are made and loaded then does not matter.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, copies: Iterable[nn.Module] = ()) -> None:
        """copies: Networks or layers that a pruning changes as well, such as averages of the model."""
        states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        of_copies = [tensor for copy in copies for tensor in _of_model(copy)]
        self._tensors = {"weights": list(_of_model(model)), "momenta": states, "copies": of_copies}
        self._before: dict[str, list[Tensor]] = {}
        self._changed: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}  # tensors, their values before and after

    def __enter__(self) -> FirstPruning:
        self._before = {part: [t.detach().clone() for t in tensors] for part, tensors in self._tensors.items()}
        return self

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for part, tensors in self._tensors.items():
            both = zip(tensors, self._before[part], strict=True)
            self._changed[part] = [(t, old, t.detach().clone()) for t, old in both if not torch.equal(t, old)]
        self._before = {}

    @torch.no_grad()
    def take_back(self, saved: Mapping[str, int], now: Mapping[str, int]) -> None:
        """Restores the values before the block, where the values are still those after it.

        saved: The checksums of the state that is loaded. now: Those of the network. A part in which they agree stays:
        it belongs to the state already. Copies have none.
        """
        for part, changed in self._changed.items():
            belongs = part in now and saved.get(part) == now[part]
            for tensor, before, after in changed:
                if not belongs and torch.equal(tensor, after):
                    tensor.copy_(before)
        self._changed = {}


def _of_model(model: nn.Module) -> Iterator[Tensor]:
    """What a pruning may write: parameters, and statistics of masked norms."""
    yield from model.parameters()
    for module in model.modules():
        if isinstance(module, MaskedBatchNorm2d):
            yield from (t for t in (module.running_mean, module.running_var) if t is not None)
