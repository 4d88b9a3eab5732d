"""CoarsePruning: draws many random masks and keeps the one that costs the least accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import plan
from ..nn.adapted import computes_weight
from ..nn.example import Example
from ..nn.flow import flow
from ..nn.mask_buffers import MaskBuffers
from ..nn.masked_filters import MaskedFilters
from . import ranks
from .arguments import is_share
from .base import Method
from .channel_masks import find_norms
from .ranking import pruned_count
from .schedules import progressive
from .trials import Batches, Trials, batch_statistics

TUNED_PRUNINGS = 2  # of filters, where duty is below 1
STATISTICS = ("stored", "batch")  # of norms, while masks are tried


class Kernels(NamedTuple):
    """The kernels of a layer that can be pruned."""

    live: Tensor  # bool [K, C / groups]
    blocks: Tensor  # int64 [live kernels]: the block of each
    block_count: int


class CoarsePruning(Method):
    """Draws random masks of the whole network, keeps the one with the fewest errors, and retrains with it.

    Feature maps (filters) are pruned at the end of epoch `start`, then kernels of what is left at the end of
    `kernel_start`. Each time, `masks` masks M_n are drawn, and the least adversarial one stays:

        argmin over n of the share of images of `data` that the network under M_n misclassifies, without retraining

    What is pruned is hard-dead: zero and frozen.

    Our reconstruction: the abstract and summaries tell of the random masks, their number and the choice by errors. That
    all layers are masked at once, that feature maps come before kernels and that retraining freezes what is pruned is
    inferred. Masks inside a kernel are not offered. Ours, and the default where duty is below 1: halving, statistics
    of the batch, pruning early and in two steps, and no pruning of kernels.

    Args:
        model: See Method.
        optimizer: See Method.
        rate: The share of filters that is pruned.
        epochs: See Method.
        data: Batches (x, y) of held-out images with integer labels: an iterable that can be gone through again, or a
            function that returns one. A pass loads each batch once and tries all masks on it, in live mode. Of several
            ranks each tries them on its own data, and the errors are added up.
        masks: How many masks are drawn: about 100 are published for a rate of 0.4, more for higher rates.
        kernel_rate: The share of live kernels that is pruned; 0: none. None: rate, and 0 where duty is below 1.
        start: The epoch at whose end filters are pruned; -1: at once, for a trained network. None: after a third, and
            after an eighth (one epoch at least) where duty is below 1.
        prunings: In how many steps filters are pruned, an epoch apart; each draws masks anew and prunes the same share
            of what is left. None: 1, and 2 where duty is below 1 and the epochs suffice.
        kernel_start: The epoch at whose end kernels are pruned. None: halfway between the last filters and the end.
        block: (r, c): kernels are pruned in blocks of r live filters and c live channels, which block-sparse kernels
            can skip. The last filters and channels may make smaller ones. It has no effect on filters.
        layerwise: Whether the masks are drawn for one layer after another: `masks` draws for each layer.
        halving: Whether all masks are tried on a few images of `data`, the half with the fewest errors on twice as
            many, and so on, so that the last few are tried on all. False: all masks on all images, as in the paper.
            None: False, and True where duty is below 1.
        statistics: What batch norms go by while masks are tried: "stored", their running statistics, or "batch", those
            of the images at hand. The stored ones are of the whole network: without half of its filters it may answer
            at chance by them, whatever the mask. None: "stored", and "batch" where duty is below 1.
        **options: Keywords of Method. criterion has no effect, and duty decides about defaults alone. Give
            example_input: without it, kernels that read dead channels count as live.

    Attributes:
        error_rates: By pruning (and layer, if layerwise), the share of errors under each mask that was drawn.
        tried_on: Likewise, on how many labels each mask was tried.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 2, 3), torch.nn.Flatten())
        >>> report = pk.convert(net)
        >>> optimizer = torch.optim.SGD(net.parameters(), 0.1)
        >>> data = [(torch.randn(8, 1, 5, 5), torch.randint(2, (8,)))]
        >>> method = pk.methods.CoarsePruning(net, optimizer, rate=0.5, epochs=2, data=data, masks=10, start=-1)
        >>> len(method.error_rates[0]), int(net[0].filter_mask.sum())
        (10, 2)
    """

    has_warm_up = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rate: float = 0.5,
        epochs: int = 200,
        *,
        data: Batches | Callable[[], Batches] | None = None,
        masks: int = 100,
        kernel_rate: float | None = None,
        start: int | None = None,
        prunings: int | None = None,
        kernel_start: int | None = None,
        block: Sequence[int] = (1, 1),
        layerwise: bool = False,
        halving: bool | None = None,
        statistics: str | None = None,
        **options: Any,
    ) -> None:
        total = self._epochs_that_prune(epochs, options.get("fine_tune"))
        self._expect(
            prunings is None or type(prunings) is int and prunings >= 1, "prunings", "an integer from 1", prunings
        )
        is_tuned = options.get("preset") is None and is_share(duty := options.get("duty", 1)) and duty < 1
        early = max(total // 8, 1 if total > 1 else 0) - 1
        self.start = start if start is not None else early if is_tuned else total // 3 - 1
        self.prunings = prunings or (TUNED_PRUNINGS if is_tuned and self.start + TUNED_PRUNINGS < total else 1)
        last = self.start + self.prunings - 1
        self.kernel_start = last + (total - last) // 2 if kernel_start is None else kernel_start
        self.kernel_rate = rate if kernel_rate is None else kernel_rate
        self._expect(data is not None, "data", "batches (x, y) or a function that returns them", None)
        self._expect(isinstance(masks, int) and masks >= 1, "masks", "an integer from 1", masks)
        holds = kernel_rate is None or (is_share(kernel_rate) and kernel_rate < 1)
        self._expect(holds, "kernel_rate", "a number in [0, 1)", kernel_rate)
        holds, got = -1 <= self.start and last < self.kernel_start < total, (self.start, self.kernel_start)
        rule = "" if self.prunings == 1 else f", start + {self.prunings - 1}"
        self._expect(holds, "start, kernel_start", f"-1 <= start{rule} < kernel_start < {total}", got)
        holds = (
            isinstance(block, Sequence)
            and len(block) == 2
            and all(isinstance(size, int) and size >= 1 for size in block)
        )
        self._expect(holds, "block", "two integers from 1", block)
        pointless = self.kernel_rate == 0 and tuple(block) != (1, 1)
        self._expect(not pointless, "block", "none where kernel_rate is 0, which prunes filters alone", block)
        self._expect(halving in (None, True, False), "halving", "True, False or None", repr(halving))
        holds, expected = statistics in (None, *STATISTICS), f"one of {', '.join(STATISTICS)}"
        self._expect(holds, "statistics", expected, repr(statistics))
        self.data, self.masks, self.block, self.layerwise = data, masks, tuple(block), layerwise
        self.halving, self.statistics = bool(halving), statistics or STATISTICS[0]
        self.error_rates: list[list[float]] = []
        self.tried_on: list[list[int]] = []
        super().__init__(model, optimizer, rate, epochs, **options)

    @classmethod
    def tuned(cls, epochs: int) -> dict[str, Any]:
        return super().tuned(epochs) | {"kernel_rate": 0.0, "halving": True, "statistics": "batch"}

    def _begin(self, is_new: bool) -> None:
        super()._begin(is_new)
        if is_new and self.start == -1:
            self._prune_first()

    def pruned_share(self, epoch: int) -> float:
        return progressive(self.rate, epoch - self.start, self.prunings)

    @torch.no_grad()
    def _prune(self, epoch: int) -> None:
        prunes = self.rate or any(self.rates.values())
        if 0 <= epoch - self.start < self.prunings and prunes:
            self._prune_filters(epoch)
        if epoch == self.kernel_start and self.kernel_rate:
            self._prune_kernels()

    # ---- feature maps

    def _prune_filters(self, epoch: int) -> None:
        draw = partial(self._draw_filters, epoch)
        self.filters.dead = self._choose(draw, self._try_filters, self.filters.hard)
        self.filters.hard = [dead.clone() for dead in self.filters.dead]
        for name in self.layers:
            self._zero(name, self._rows(self.filters.hard, name))

    def _draw_filters(self, epoch: int, seed: int) -> list[Tensor]:
        """By unit, the filters that this seed prunes, those that are gone already among them: bool [width]."""
        generator = torch.Generator().manual_seed(seed)
        keys = [torch.rand(unit.width, generator=generator, dtype=torch.float64) for unit in self.units]
        rankings = self._ranked(keys)
        amounts = self._counts(rankings, epoch)
        return [ranking.first(amount) for ranking, amount in zip(rankings, amounts, strict=True)]

    def _try_filters(self, dead: list[Tensor]) -> None:
        live = {name: ~self.filters.of_layer(dead, name) for name in self.layers}
        not_hard = {name: torch.ones_like(mask) for name, mask in live.items()}
        self.channel_masks.set_masks(live, not_hard, self.with_norms)

    # ---- kernels

    def _prune_kernels(self) -> None:
        layers = list(self.layers.values())
        kernels = [self._kernels_of(layer) for layer in layers]
        before = [layer.kernel_mask.cpu() for layer in layers]
        draw = partial(self._draw_kernels, kernels, before)
        for layer, keep in zip(layers, self._choose(draw, self._try_kernels, before), strict=True):
            keep = keep.to(layer.weight.device)
            layer.set_masks(kernel=keep)
            if computes_weight(layer):  # zeros in the weight that it stores would change its live kernels
                continue
            dead = layer._like_weight(~keep)
            for tensor in (layer.weight, *self.optimizer_states(layer.weight)):
                tensor.masked_fill_(dead, 0)

    def _kernels_of(self, layer: MaskedFilters) -> Kernels:
        """The layer's live kernels and their blocks, which count live rows and columns only."""
        K, Cg = layer.kernel_mask.shape
        inputs = layer.input_mask.view(layer.groups, 1, Cg).expand(-1, K // layer.groups, -1).reshape(K, Cg)
        live = (layer.kernel_mask & inputs & layer.filter_mask[:, None]).cpu()
        r, c = self.block
        rows, columns = ((live.any(dim).cumsum(0) - 1) // size for dim, size in ((1, r), (0, c)))
        blocks = (rows[:, None] * Cg + columns)[live].unique(return_inverse=True)[1]
        return Kernels(live, blocks, int(blocks.max()) + 1 if len(blocks) else 0)

    def _draw_kernels(self, kernels: list[Kernels], before: list[Tensor], seed: int) -> list[Tensor]:
        """By layer, the kernels that this seed leaves: bool [K, C / groups]."""
        generator = torch.Generator().manual_seed(seed)
        drawn = []
        for (live, blocks, block_count), mask in zip(kernels, before, strict=True):
            order = torch.randperm(block_count, generator=generator)
            stays = torch.ones(block_count, dtype=torch.bool)
            stays[order[: pruned_count(block_count, self.kernel_rate)]] = False
            keep = mask.clone()
            keep[live] = stays[blocks]
            drawn.append(keep)
        return drawn

    def _try_kernels(self, masks: list[Tensor]) -> None:
        for layer, mask in zip(self.layers.values(), masks, strict=True):
            layer.set_masks(kernel=mask.to(layer.weight.device))

    # ---- the choice

    def _choose(
        self, draw: Callable[[int], list[Tensor]], attempt: Callable[[list[Tensor]], None], none: list[Tensor]
    ) -> list[Tensor]:
        """Returns the draw with the fewest errors.

        Args:
            draw: From a seed, the masks of all units or layers.
            attempt: Sets such masks.
            none: The masks that prune nothing.
        """
        if not self.layerwise:
            return draw(self._best_seed(lambda seed: attempt(draw(seed))))
        chosen = list(none)

        def with_one(at: int, seed: int) -> list[Tensor]:
            return [*chosen[:at], draw(seed)[at], *chosen[at + 1 :]]

        for at in range(len(chosen)):
            seed = self._best_seed(lambda seed, at=at: attempt(with_one(at, seed)))  # type: ignore[misc]
            chosen[at] = draw(seed)[at]
        return chosen

    def _best_seed(self, attempt: Callable[[int], None]) -> int:
        """The seed with the fewest errors, of equal ones the first.

        Masks are drawn again at each attempt: all together they would need more memory than the network.
        """
        seeds: list[int] = torch.randint(2**62, (self.masks,), generator=self.generator).tolist()
        seeds = ranks.of_rank_0(seeds, self.process_group)
        assert self.data is not None
        trials = Trials(
            type(self).__name__, self.data, self._answer, self._ensure_norms, self._on_device.device, self.process_group
        )
        with self._evaluating():
            best, errors, labels = trials.run(len(seeds), lambda i: attempt(seeds[i]), halving=self.halving)
        self.error_rates.append([wrong / of for wrong, of in zip(errors, labels, strict=True)])
        self.tried_on.append(labels)
        return seeds[best]

    def _answer(self, x: Tensor) -> Tensor:
        answer: Tensor = self.model(x).argmax(1)
        return answer

    def _ensure_norms(self, x: Tensor) -> None:
        """Finds which norms are behind which filters, where neither example_input nor a training step has told."""
        if self.with_norms and self.channel_masks.norms is None:
            self._find_norms()
            self.channel_masks.norms = find_norms(self.model, Example(x))

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluates in live mode; afterwards masks, training mode and mode are as before.

        Plans are chosen by cost, not by time, so that the choice between masks does not depend on the clock.
        """
        was_training = {module: module.training for module in self.model.modules()}
        kernels = {name: layer.kernel_mask.clone() for name, layer in self.layers.items()}
        is_live = any(module._flow for module in self.model.modules() if isinstance(module, MaskBuffers))
        self.model.eval()
        if not is_live:
            flow(self.model)
        try:
            with plan.measure(False), batch_statistics(self.model) if self.statistics == "batch" else nullcontext():
                yield
        finally:
            if not is_live:
                flow(self.model, False)
            for module, training in was_training.items():
                module.training = training
            for name, mask in kernels.items():
                self.layers[name].set_masks(kernel=mask)
            self._set_masks()

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        kernels = {name: layer.kernel_mask.cpu().clone() for name, layer in self.layers.items()}
        return super().state_dict() | {
            "kernels": kernels, "error_rates": [list(rates) for rates in self.error_rates],
            "tried_on": [list(labels) for labels in self.tried_on],
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        kernels: Mapping[str, Tensor] = state_dict["kernels"]
        for name, layer in self.layers.items():
            layer.set_masks(kernel=kernels[name].to(layer.weight.device))
        self._set_masks()
        self.error_rates = [list(rates) for rates in state_dict["error_rates"]]
        self.tried_on = [list(labels) for labels in state_dict.get("tried_on", [])]  # an older state has none
