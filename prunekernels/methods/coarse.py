"""CoarsePruning: of many random masks the one that costs the least accuracy, first of feature maps, then of kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import plan
from ..nn.conv import MaskedConv2d
from ..nn.flow import flow
from ..nn.mask_buffers import MaskBuffers
from .base import Method, is_share
from .channel_masks import find_norms
from .ranking import Ranking, counts, pruned_count

Batches = Iterable[tuple[Tensor, Tensor]]
HELD = 64 << 20  # bytes of images that are held while all masks are tried on them


class Kernels(NamedTuple):
    """What can go of a layer: its live kernels, bool [K, C / groups], and the block of each, int64 [live]."""

    live: Tensor
    blocks: Tensor
    number: int  # of blocks


class CoarsePruning(Method):
    """Draws random masks of the whole network, keeps the least adversarial one, and retrains with it.

    Least adversarial: the lowest share of misclassified images of data, without any retraining. Feature maps (filters)
    go first, at the end of epoch `start` (-1: at once, for a trained network), then kernels of what is left, at the end
    of kernel_start; by default after one and two thirds of the epochs. What is gone is hard-dead: zero and frozen.

        >>> method = pk.methods.CoarsePruning(model, optimizer, 0.5, epochs=90, data=DataLoader(held_out, 256))

    data: batches (x, y) of held-out images, labels as integers: an iterable that can be gone through again, or a
    function that returns one. A pass loads each batch once and tries all masks on it, in the network gear. rate: the
    share of filters; kernel_rate: that of live kernels (None: rate; 0: none). masks: how many are drawn; about 100 are
    published for 40 %, more for more. block (r, c): kernels go in blocks of r live filters and c live channels, which
    block-sparse kernels can skip. layerwise: one layer after another, so many masks for each. error_rates: by draw, the
    share of errors under each mask. Give example_input: else kernels that read dead channels count as live.

    Our reconstruction: abstract and summaries have the random masks, their number and their choice by errors; that all
    layers are masked jointly, that feature maps come first and that retraining freezes is inferred. Masks inside a
    kernel are not offered. Other options are Method's; criterion and duty mean nothing here.
    """

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
        kernel_start: int | None = None,
        block: Sequence[int] = (1, 1),
        layerwise: bool = False,
        **options: Any,
    ) -> None:
        total = self._epochs_that_prune(epochs, options.get("fine_tune"))
        self.start = total // 3 - 1 if start is None else start
        self.kernel_start = self.start + (total - self.start) // 2 if kernel_start is None else kernel_start
        self.kernel_rate = rate if kernel_rate is None else kernel_rate
        self._expect(data is not None, "data", "batches (x, y) or a function that returns them", None)
        self._expect(isinstance(masks, int) and masks >= 1, "masks", "an integer from 1", masks)
        holds = kernel_rate is None or (is_share(kernel_rate) and kernel_rate < 1)
        self._expect(holds, "kernel_rate", "a number in [0, 1)", kernel_rate)
        holds, got = -1 <= self.start < self.kernel_start < total, (self.start, self.kernel_start)
        self._expect(holds, "start, kernel_start", f"-1 <= start < kernel_start < {total}", got)
        holds = (
            isinstance(block, Sequence)
            and len(block) == 2
            and all(isinstance(size, int) and size >= 1 for size in block)
        )
        self._expect(holds, "block", "two integers from 1", block)
        self.data, self.masks, self.block, self.layerwise = data, masks, tuple(block), layerwise
        self.error_rates: list[list[float]] = []
        super().__init__(model, optimizer, rate, epochs, **options)
        if self.start == -1:
            try:
                self._prune(-1)
            except BaseException:
                self.detach()
                raise
            self._mask()

    @torch.no_grad()
    def _prune(self, epoch: int) -> None:
        if epoch == self.start and self.rate:
            self._prune_maps()
        if epoch == self.kernel_start and self.kernel_rate:
            self._prune_kernels()

    # ---- feature maps

    def _prune_maps(self) -> None:
        self._dead = self._choose(self._draw_maps, self._try_maps, [torch.zeros_like(dead) for dead in self._dead])
        self._hard = [dead.clone() for dead in self._dead]
        for name in self.layers:
            self._bury(name, self._rows(self._hard, name))

    def _draw_maps(self, seed: int) -> list[Tensor]:
        """By unit, which filters die: bool [width]."""
        generator = torch.Generator().manual_seed(seed)
        rankings = []
        for unit, hard in zip(self.units, self._hard, strict=True):
            scores = torch.rand(unit.width, generator=generator, dtype=torch.float64)
            rankings.append(Ranking.of(scores, hard, hard, list(unit.filters.values())))
        amounts = counts(rankings, (self.rate,), self.budget, self.round_to)
        return [ranking.first(amount) for ranking, amount in zip(rankings, amounts, strict=True)]

    def _try_maps(self, dead: list[Tensor]) -> None:
        live = {name: ~self._of(dead, name) for name in self.layers}
        hard = {name: torch.ones_like(mask) for name, mask in live.items()}
        self.structure.set_masks(live, hard, self.with_norms)

    # ---- kernels

    def _prune_kernels(self) -> None:
        layers = list(self.layers.values())
        kernels = [self._kernels_of(layer) for layer in layers]
        before = [layer.kernel_mask.cpu() for layer in layers]
        draw = partial(self._draw_kernels, kernels, before)
        for layer, keep in zip(layers, self._choose(draw, self._try_kernels, before), strict=True):
            keep = keep.to(layer.weight.device)
            layer.set_masks(kernel=keep)
            layer.weight[~keep] = 0
            for held in self.optimizer.state.get(layer.weight, {}).values():
                if isinstance(held, Tensor) and held.shape == layer.weight.shape:
                    held[~keep] = 0

    def _kernels_of(self, layer: MaskedConv2d) -> Kernels:
        K, Cg = layer.kernel_mask.shape
        inputs = layer.input_mask.view(layer.groups, 1, Cg).expand(-1, K // layer.groups, -1).reshape(K, Cg)
        live = (layer.kernel_mask & inputs & layer.filter_mask[:, None]).cpu()
        r, c = self.block
        rows, columns = ((live.any(dim).cumsum(0) - 1) // size for dim, size in ((1, r), (0, c)))
        blocks = (rows[:, None] * Cg + columns)[live].unique(return_inverse=True)[1]
        return Kernels(live, blocks, int(blocks.max()) + 1 if len(blocks) else 0)

    def _draw_kernels(self, kernels: list[Kernels], before: list[Tensor], seed: int) -> list[Tensor]:
        """By layer, the kernels that stay: bool [K, C / groups]."""
        generator = torch.Generator().manual_seed(seed)
        drawn = []
        for (live, blocks, number), mask in zip(kernels, before, strict=True):
            stays = torch.ones(number, dtype=torch.bool)
            stays[torch.randperm(number, generator=generator)[: pruned_count(number, self.kernel_rate)]] = False
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
        """The best of what draw gives for so many seeds, under attempt. none: nothing pruned, by layer."""
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
        """The seed with the fewest errors, of equal ones the first. Masks are drawn again for each part of the data:
        all of them together would need more memory than the network."""
        seeds: list[int] = torch.randint(2**62, (self.masks,), generator=self.generator).tolist()
        errors, answers = [0] * len(seeds), 0
        with self._evaluating():
            for part in self._parts():
                answers += sum(y.numel() for _, y in part)
                for i, seed in enumerate(seeds):
                    attempt(seed)
                    errors[i] += int(torch.stack([self._errors(x, y) for x, y in part]).sum())
        expected = "batches with images in every pass (of an iterator: a function that makes it)"
        self._expect(answers > 0, "data", expected, "none")
        self.error_rates.append([count / answers for count in errors])
        return seeds[errors.index(min(errors))]

    def _errors(self, x: Tensor, y: Tensor) -> Tensor:
        answer = self.model(x).argmax(1)
        self._expect(answer.shape == y.shape, "data", f"labels {list(answer.shape)}", list(y.shape))
        return (answer != y).sum()

    def _parts(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """The data, some batches at a time, so that a mask is set once for several."""
        device = next(iter(self.layers.values())).weight.device
        part: list[tuple[Tensor, Tensor]] = []
        size = 0
        for batch in self.data() if callable(self.data) else self.data or ():
            is_pair = isinstance(batch, (tuple, list)) and [isinstance(t, Tensor) for t in batch] == [True, True]
            self._expect(is_pair, "data", "batches (x, y) of tensors", type(batch).__name__)
            x, y = batch
            if not len(x):
                continue
            if size and size + x.nbytes > HELD:
                yield part
                part, size = [], 0
            part.append((x.to(device), y.to(device)))
            size += x.nbytes
            self._see_norms(part[0][0])
        if part:
            yield part

    def _see_norms(self, x: Tensor) -> None:
        """Before any training, and without example_input, nobody has seen which norms are behind which filters."""
        if self.with_norms and self.structure.norms is None:
            self._find_norms()
            self.structure.norms = find_norms(self.model, (x,))

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Eval mode and the network gear; masks and all else are put back. Plans go by cost, so that a choice between
        masks does not depend on the clock."""
        was_training = {module: module.training for module in self.model.modules()}
        kernels = {name: layer.kernel_mask.clone() for name, layer in self.layers.items()}
        in_flow = any(module._flow for module in self.model.modules() if isinstance(module, MaskBuffers))
        self.model.eval()
        if not in_flow:
            flow(self.model)
        try:
            with plan.measure(False):
                yield
        finally:
            if not in_flow:
                flow(self.model, False)
            for module, training in was_training.items():
                module.training = training
            for name, mask in kernels.items():
                self.layers[name].set_masks(kernel=mask)
            self._mask()

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        kernels = {name: layer.kernel_mask.cpu().clone() for name, layer in self.layers.items()}
        return super().state_dict() | {"kernels": kernels, "error_rates": [list(rates) for rates in self.error_rates]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        kernels: Mapping[str, Tensor] = state_dict["kernels"]
        for name, layer in self.layers.items():
            layer.set_masks(kernel=kernels[name].to(layer.weight.device))
        self.error_rates = [list(rates) for rates in state_dict["error_rates"]]
