"""The second half of a batch norm, put off until it is known what follows: a ReLU, a sum, or a sum and a ReLU.

They then take one pass over memory instead of one each. A live tensor whose values are not written yet holds a
`Deferred`, and has the autograd history of the values: whatever else wants those, gets them written first.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from ..ops import autograd
from .saving import is_hooked

ops = autograd.ops


class Uses:
    """Whether deferring pays for a norm: it stops where what follows is never what can be fused."""

    PATIENCE = 3  # results in a row that were written by themselves

    def __init__(self) -> None:
        self.in_vain = 0

    @property
    def worthwhile(self) -> bool:
        """Whether the next result should be deferred.

        Always where hooks save tensors: a checkpoint expects those of its recomputation to be the same.
        """
        return self.in_vain < self.PATIENCE or (self.PATIENCE > 0 and is_hooked())


@dataclasses.dataclass(eq=False)
class Deferred:
    """Values that a live tensor does not have yet: y = scale (x - mean) + bias, + add.

    Attributes:
        y: Where they go. Its history is theirs. None: what followed has taken the memory, since there is no history.
        x: The norm's input, [N, C, H, W] as y. It must not change until y is written: see `guard`.
        table: Rows of mean, 1 / deviation, scale and bias, [4, C].
        index: The norm's channels, of its `features`.
        features: As many as its parameters have.
        uses: Of the norm.
        gate: Open where a fused ReLU leaves its gradient to the norm. None behind a sum.
        add: Of the same size as y; None: nothing is added.
    """

    y: Tensor | None
    x: Tensor
    table: Tensor
    index: Tensor
    features: int
    uses: Uses
    gate: Tensor | None = None
    add: Tensor | None = None
    written: bool = False
    fused: bool = False

    def __post_init__(self) -> None:
        self.versions = self._versions()
        self.readers: list[Reader] = []
        self.inference = self.y is not None and self.y.is_inference()
        self.lock = threading.RLock()  # several threads may read one tensor

    def __call__(self) -> Tensor:
        """Writes the values, once, and returns them."""
        with self.lock:
            if self.y is not None and self.written:
                return self.y
            self._check_inputs()
            with torch._C._DisableFuncTorch():  # they outlive a transform
                return self._write()

    def _write(self) -> Tensor:
        y = self.y
        if y is None:
            with torch.inference_mode(self.inference):  # as at the norm, for any later use
                y = torch.empty_like(self.x)
        if self.fused and self.gate is not None:  # something else reads the values: the ReLU masks its gradient itself
            self.gate[:1].zero_()
        ops.apply_batch_norm_(y, self.x, self.table, self.index, self.features, self.add, False)
        self.uses.in_vain += not self.fused
        self.y, self.written = y, True
        return y

    def relu(self) -> Tensor | None:
        """relu of the values, which are not written for it; None where they are, or have to be."""
        with self.lock:
            return self._relu() if self._can_fuse() else None

    def _relu(self) -> Tensor:
        assert self.y is not None
        self._check_inputs()
        self._use()
        made_of = (self.x, self.table, self.index, self.features, self.add)
        if self.y.requires_grad:
            return ops.batch_norm_relu(self.y, *made_of, self.gate)
        y, self.y = self.y, None
        ops.apply_batch_norm_(y, *made_of, True)
        return y

    def plus(self, other: Tensor) -> Deferred | None:
        """The sum with a tensor of the same size, deferred too; None where the values have to be written, or a sum."""
        with self.lock:
            return self._plus(other) if self.add is None and self._can_fuse() else None

    def _plus(self, other: Tensor) -> Deferred:
        assert self.y is not None
        self._use()
        if self.y.requires_grad or other.requires_grad:
            y = ops.deferred_sum(self.y, other)
        else:
            y, self.y = self.y, None
        total = Deferred(y, self.x, self.table, self.index, self.features, self.uses, add=other)
        for reader in self.readers:
            reader.add(total)
        return total

    def _can_fuse(self) -> bool:
        """Whether what follows may take the place of the values: it reads them first, and its result is as theirs.

        In place, values keep their history without gradients; and an operation on a tensor of inference mode gives a
        plain one outside.
        """
        y = self.y
        if y is None or self.written or self.fused or self.inference is not torch.is_inference_mode_enabled():
            return False
        return torch.is_grad_enabled() or not y.requires_grad

    def _use(self) -> None:
        self.fused, self.uses.in_vain = True, 0

    def _versions(self) -> list[int]:
        read = [t for t in (self.x, self.add) if t is not None and not t.is_inference()]
        return [t._version for t in read]

    def intact(self) -> bool:
        """Whether what the values are made of is as it was."""
        return self._versions() == self.versions

    def _check_inputs(self) -> None:
        if not self.intact():
            raise RuntimeError(
                "a tensor that a masked batch norm in live mode has read was changed in place through `compact` before "
                "the norm's result was used; change a copy"
            )

    def guard(self, source: Any) -> None:
        """Has the values written before anything else reads, or writes to, the live tensor they are made of.

        So is a sum of them and another tensor. At once where a view shares the memory, since it may be written to.
        """
        if source.shares_memory():
            self()
            return
        reader = Reader(self)
        self.readers.append(reader)
        source._before_use = reader


class Reader:
    """Held by a live tensor of which deferred values are made; does not keep them alive."""

    def __init__(self, deferred: Deferred) -> None:
        self._deferred = [weakref.ref(deferred)]

    def add(self, deferred: Deferred) -> None:
        """These values are made of the tensor too."""
        self._deferred.append(weakref.ref(deferred))

    def __call__(self) -> None:
        """Has the values written that are still in use."""
        for reference in self._deferred:
            deferred = reference()
            if deferred is not None and deferred.intact():  # if not, its own use is the error
                deferred()


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
              running_var: Tensor | None, index: Tensor, features: int, by_batch: bool, factor: float, eps: float,
              uses: Uses) -> Deferred:  # fmt: skip
    """The first half of a batch norm: statistics. Arguments as those of masked_batch_norm; x has no other channels."""
    y, table, gate = ops.deferred_batch_norm(
        x, weight, bias, running_mean, running_var, index, features, by_batch, factor, eps
    )
    return Deferred(y, x, table, index, features, uses, gate=gate if torch.is_grad_enabled() else None)
