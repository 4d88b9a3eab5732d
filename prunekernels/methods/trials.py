"""Trials: which of many candidates, say masks of a network, makes the fewest errors on labelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..nn.sync_batch_norm import MaskedSyncBatchNorm
from . import ranks
from .arguments import expect

Batch = tuple[Tensor, Tensor]
Batches = Iterable[Batch]
PART_BYTES = 64 << 20  # of images, on the device at a time, while all candidates are tried on them
FIRST = 24  # images that halving tries all candidates on, at least
FINALISTS = 4  # candidates that halving tries on all images, at most
CHUNKS = {"cpu": 64}  # images a pass in halving, by device: on a CPU what a layer makes of more leaves the cache
CHUNK = 1024  # on other devices
RUNNING = ("running_mean", "running_var", "num_batches_tracked")


class Result(NamedTuple):
    """What became of the candidates.

    Attributes:
        best: The candidate with the fewest errors, of equal ones the first.
        errors: By candidate, how many labels it missed.
        labels: By candidate, on how many labels it was tried.
    """

    best: int
    errors: list[int]
    labels: list[int]


class Trials:
    """Tries candidates on batches, on all of them or by successive halving; of several ranks each has its own batches.

    Successive halving tries all candidates on a few images, the half with the fewest errors on as many more, and so on,
    such that the last few are tried on all images.

    Args:
        op: For errors.
        data: Batches (x, y), or a function that returns them.
        answer: From x, the labels that the network gives.
        look: Called with each part's first x before any candidate is tried on the part.
        device: Where the network is.
        process_group: The ranks that try candidates together.
    """

    def __init__(
        self,
        op: str,
        data: Batches | Callable[[], Batches],
        answer: Callable[[Tensor], Tensor],
        look: Callable[[Tensor], None],
        device: torch.device,
        process_group: Any = None,
    ) -> None:
        self.op, self.data, self.answer, self.look = op, data, answer, look
        self.device, self.process_group = device, process_group

    def run(self, candidates: int, attempt: Callable[[int], None], *, halving: bool) -> Result:
        """Returns what became of the candidates.

        Args:
            candidates: How many there are.
            attempt: Puts a candidate in place. It is called again for each part of the data and each round.
            halving: Whether by successive halving.
        """
        self._attempt, self._errors, self._labels = attempt, [0] * candidates, [0] * candidates
        left: Sequence[int] = range(candidates)
        parts = self._parts()
        if halving:
            left = self._halve(next(parts, []), left)
        for part in parts:
            self._try(part, left)
        errors, labels = self._of_all_ranks()
        expected = "batches with images in every pass (of an iterator: a function that makes it)"
        expect(self.op, min(labels) > 0, "data", expected, "none")
        return Result(min(left, key=lambda i: errors[i]), errors, labels)

    def _try(self, batches: Sequence[Batch], left: Sequence[int]) -> None:
        labels = sum(y.numel() for _, y in batches)
        for i in left if labels else ():
            self._attempt(i)
            self._errors[i] += int(torch.stack([self._wrong(x, y) for x, y in batches]).sum())
            self._labels[i] += labels

    def _wrong(self, x: Tensor, y: Tensor) -> Tensor:
        """How many images x are not classified as y, a scalar on their device."""
        answer = self.answer(x)
        expect(self.op, answer.shape == y.shape, "data", f"labels {list(answer.shape)}", list(y.shape))
        return (answer != y).sum()

    def _of_all_ranks(self) -> tuple[list[int], list[int]]:
        """By candidate, errors and labels of all ranks."""
        like = torch.empty(0, device=self.device)
        summed = ranks.summed([*self._errors, *self._labels], like, self.process_group)
        return summed[: len(self._errors)], summed[len(self._errors) :]

    def _parts(self) -> Iterator[list[Batch]]:
        """The data in parts of several batches, so that a candidate is put in place once for all batches of a part."""
        part: list[Batch] = []
        size = 0
        for batch in self.data() if callable(self.data) else self.data:
            is_pair = isinstance(batch, (tuple, list)) and [isinstance(t, Tensor) for t in batch] == [True, True]
            expect(self.op, is_pair, "data", "batches (x, y) of tensors", type(batch).__name__)
            x, y = batch
            expect(self.op, x.shape[:1] == y.shape[:1], "data", f"labels [{len(x)}, ...]", list(y.shape))
            if not len(x):
                continue
            if size and size + x.nbytes > PART_BYTES:
                yield part
                part, size = [], 0
            part.append((x.to(self.device), y.to(self.device)))
            size += x.nbytes
            self.look(part[0][0])
        if part:
            yield part

    # ---- successive halving

    def _halve(self, part: list[Batch], left: Sequence[int]) -> Sequence[int]:
        """Tries ever fewer candidates on ever more of a part's images; returns those that were tried on all of it."""
        images = _Mixed(part, CHUNKS.get(self.device.type, CHUNK))
        [count] = ranks.summed([len(images)], torch.empty(0, device=self.device), self.process_group)
        begin = 0.0
        for end in _shares(len(left), count):
            if begin:
                left = _better_half(left, self._of_all_ranks()[0])
            self._try(images.between(begin, end), left)
            begin = end
        return left


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Within the block batch norms use the statistics of their input; afterwards those that they store are as before.

    Norms that share statistics among ranks are left alone: ranks may try different numbers of batches.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [m for m in norms if m.track_running_stats and not isinstance(m, (nn.SyncBatchNorm, MaskedSyncBatchNorm))]
    stored = [{name: b.clone() for name, b in m.named_buffers(recurse=False) if name in RUNNING} for m in norms]
    for norm in norms:
        norm.training = True
    try:
        yield
    finally:
        for norm, before in zip(norms, stored, strict=True):
            norm.training = False
            for name, value in before.items():
                getattr(norm, name).copy_(value)


class _Mixed:
    """Images and labels in an order that mixes batches, as one class may follow another in them."""

    def __init__(self, part: Sequence[Batch], chunk: int) -> None:
        alike: dict[Any, list[Batch]] = {}
        for x, y in part:
            alike.setdefault((x.shape[1:], x.dtype, y.shape[1:], y.dtype), []).append((x, y))
        self.chunk, self.blocks = chunk, []
        for batches in alike.values():
            x, y = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
            self.blocks.append((x[order], y[order]))

    def __len__(self) -> int:
        return sum(len(x) for x, _ in self.blocks)

    def between(self, begin: float, end: float) -> list[Batch]:
        """The images between two shares of the order, in chunks."""
        taken: list[Batch] = []
        for x, y in self.blocks:
            rows = slice(round(begin * len(x)), round(end * len(x)))
            count = -(-len(x[rows]) // self.chunk)  # even sizes: of a single image a norm knows little
            if count:
                taken += zip(x[rows].tensor_split(count), y[rows].tensor_split(count), strict=True)
        return taken


def _shares(candidates: int, images: int) -> list[float]:
    """By round, the share of the images that its candidates have been tried on at its end; the last is 1."""
    rounds = 1
    while candidates > FINALISTS and images >= FIRST * 2**rounds:
        candidates, rounds = -(-candidates // 2), rounds + 1
    return [0.5**k for k in reversed(range(rounds))]


def _better_half(left: Sequence[int], errors: Sequence[int]) -> list[int]:
    """Of equal candidates the first ones, in their order."""
    order = sorted(left, key=lambda i: (errors[i], i))
    return sorted(order[: -(-len(order) // 2)])
