"""MovedTensor: a live tensor with its dimensions in another order, or with its channels in several dimensions."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import autograd
from .channel_list import LiveList
from .fallbacks import record
from .tensor import FilledTensor, LiveTensor, _hollow, _without_rules, wrap

MOVED_RULES: dict[Any, Any] = {}  # torch function -> rule(func, args, kwargs), where a MovedTensor is an argument


class Axes(NamedTuple):
    """Where the channels of a tensor [A, C, *B] are once its dimensions are rearranged; A and B stay in their order.

    [N, C, H, W] in channels_last order [N, H, W, C] has split (C,) and places (3,). Seen as [N, C / 2, 2, H, W] with
    channel c at [:, c % (C / 2), c // (C / 2)] it has split (2, C / 2) and places (2, 1).
    """

    split: tuple[int, ...]  # the factors of C, the slowest first
    places: tuple[int, ...]  # the dimension of each factor

    @property
    def home(self) -> bool:
        """Whether all channels are dimension 1: nothing is rearranged."""
        return self.places == (1,)

    def rest(self, rank: int) -> list[int]:
        """The dimensions without channels, of a rearranged tensor of so many dimensions."""
        return [dim for dim in range(rank) if dim not in self.places]

    def source_dim(self, dim: int) -> int | None:
        """The dimension of [A, C, *B] that a dimension of the rearranged tensor is; None for one of several factors."""
        if dim in self.places:
            return 1 if len(self.places) == 1 else None
        before = dim - sum(place < dim for place in self.places)
        return before + 1 if before else 0


@functools.lru_cache(maxsize=1024)
def _order(axes: Axes, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The permutation of [A, *split, *B] that gives the rearranged tensor of so many dimensions, and its inverse."""
    order, factors = [0] * rank, len(axes.split)
    for factor, place in enumerate(axes.places):
        order[place] = 1 + factor
    for i, dim in enumerate(axes.rest(rank)):
        order[dim] = i + factors if i else 0
    return tuple(order), tuple(sorted(range(rank), key=order.__getitem__))


def arrange(x: Tensor, axes: Axes) -> Tensor:
    """[A, C, *B] -> the rearranged view. Where C is not split, x may also have the live channels alone."""
    if len(axes.split) > 1:
        x = x.view(x.shape[0], *axes.split, *x.shape[2:])
    return x.permute(_order(axes, x.dim())[0])


def _arranged(size: tuple[int, ...], strides: tuple[int, ...], axes: Axes) -> tuple[list[int], list[int]]:
    """The size and the strides of arrange(x) for an x of this size and these strides."""
    if len(axes.split) > 1:
        of_factors = [strides[1] * math.prod(axes.split[i + 1 :]) for i in range(len(axes.split))]
        size, strides = (size[0], *axes.split, *size[2:]), (strides[0], *of_factors, *strides[2:])
    order = _order(axes, len(size))[0]
    return [size[dim] for dim in order], [strides[dim] for dim in order]


def undo(x: Tensor, axes: Axes) -> Tensor:
    """The rearranged tensor -> [A, C, *B]."""
    x, factors = x.permute(_order(axes, x.dim())[1]), len(axes.split)
    if factors == 1:
        return x
    return x.reshape(x.shape[0], math.prod(x.shape[1 : 1 + factors]), *x.shape[1 + factors :])


class MovedTensor(FilledTensor):
    """A LiveTensor whose channels are not dimension 1: [N, H, W, C], or [N, 2, C / 2, H, W].

    It holds a live tensor [A, C, *B], on which its rules compute, and shows it rearranged. To rearrange it back gives
    that live tensor. An operation without a rule of its own gets the full-width tensor.

    Attributes:
        axes: How `source` is rearranged.
    """

    # A subclass of FilledTensor, so that its rules come before those of both other classes.
    _rules = MOVED_RULES
    axes: Axes
    _source: LiveTensor
    _dense_of: Tensor | None = None  # the full-width source tensor of which _dense is a view

    @staticmethod
    def __new__(cls, source: LiveTensor, axes: Axes) -> MovedTensor:  # type: ignore[misc]
        size, strides = _arranged(source.shape, source.stride(), axes)
        self: MovedTensor = autograd._bare(cls, source._compact, size, strides)
        self.axes, self._source, self._dense = axes, source, None
        self._attach()
        self._may_get_history = not torch.is_grad_enabled()
        return self

    def _attach(self) -> None:
        """Gives this object an autograd history that leads its gradients on to the source tensor."""
        if self._source._compact.requires_grad:
            _Attach.apply(self, self._source, self.axes)

    @property
    def source(self) -> LiveTensor:
        """The live tensor [A, C, *B]."""
        if self._may_get_history and torch.is_grad_enabled():
            self._take_history()
        return self._source

    def _take_history(self) -> None:
        self._may_get_history = False
        with _without_rules():
            if self.grad_fn is not self._history:
                full, live = undo(self.clone(), self.axes), self._source.live
                compact = full if live.full else full.index_select(1, live.rows(full.device))
                self._source, self._dense = _hollow(compact, live, self._source.fill), None

    @property
    def live(self) -> LiveList:  # type: ignore[override]
        """The live channels of the source tensor."""
        return self._source.live

    @property
    def fill(self) -> float:  # type: ignore[override]
        """What every other channel holds."""
        return self._source.fill

    @property
    def compact(self) -> Tensor:
        """The stored values of the source tensor, [A, live.count, *B]."""
        return self.source.compact

    def _cached_dense(self) -> Tensor:
        full = self.source._cached_dense()
        if self._dense is None or self._dense_of is not full:
            mode = torch.inference_mode(False) if torch.is_inference_mode_enabled() else torch.enable_grad()
            with mode, torch._C._DisableFuncTorch():
                self._dense, self._dense_of = arrange(full, self.axes), full
        return self._dense

    def to_dense_(self) -> Tensor:
        self.source.to_dense_()
        return self.to_dense()

    def store_dense(self, dense: Tensor) -> None:
        self._source.store_dense(undo(dense, self.axes))
        self.written()

    def written(self) -> MovedTensor:
        """This object, after an operation in place on the source tensor gave that a new history."""
        with _without_rules():
            self._attach()
            self._history = None if torch.is_grad_enabled() else self.grad_fn
        self._may_get_history = not torch.is_grad_enabled()
        return self

    def shares_memory(self) -> bool:
        return self._source.shares_memory()

    def unfilled(self, op: str) -> Tensor:
        """The full-width tensor, recorded as a fallback of an operation that reads channels in dimension 1."""
        record(f"{op} (channels that hold {self.fill:.4g})" if self.fill else f"{op} (channels in other dimensions)")
        return self.to_dense()


class _Attach(torch.autograd.Function):
    """Makes the gradients of a MovedTensor go on to its source tensor."""

    @staticmethod
    def forward(ctx: Any, wrapper: Tensor, source: Tensor, axes: Axes) -> Tensor:
        ctx.axes = axes
        ctx.mark_dirty(wrapper)
        return wrapper

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[override]
        return None, undo(grad, ctx.axes), None


def moved(source: Tensor, axes: Axes) -> Tensor:
    """The tensor [A, C, *B], plain or live, rearranged. A live one must not be a tensor that others hold: see alias."""
    if axes.home:
        return source
    if not isinstance(source, LiveTensor):
        return arrange(source, axes)
    with _without_rules():
        return MovedTensor(source, axes)


def alias(x: LiveTensor) -> LiveTensor:
    """A view of all of a live tensor in which something is dead: an object, and an autograd history, of its own."""
    view = x.view_of(x.compact.view_as(x.compact), x.live, lambda dense: dense.view_as(dense))
    assert isinstance(view, LiveTensor)
    return view


def channels_last_of(x: Tensor) -> tuple[Tensor, LiveList] | None:
    """What is stored of a tensor [..., C] with live channels in its last dimension.

    Args:
        x: Any tensor.

    Returns:
        The live channels [..., live.count] and their list, or None: if x is plain, if its channels are in another
        dimension, or if the other channels hold a constant that is not zero.

    Examples:
        >>> from prunekernels.live import LiveList, channels_last_of
        >>> from prunekernels.live.tensor import wrap
        >>> x = wrap(torch.ones(2, 3, 5, 5), LiveList.of_mask(torch.arange(8) > 4))
        >>> compact, live = channels_last_of(x.permute(0, 2, 3, 1))
        >>> tuple(compact.shape), live.count
        ((2, 5, 5, 3), 3)
    """
    if type(x) is LiveTensor:
        return (x.compact, x.live) if x.compact.dim() == 2 else None
    if type(x) is not MovedTensor or type(x.source) is not LiveTensor:
        return None
    compact = x.compact
    if len(x.axes.split) > 1 or x.axes.places[0] != compact.dim() - 1:
        return None
    return arrange(compact, x.axes), x.live


def wrap_last(compact: Tensor, live: LiveList) -> Tensor:
    """The tensor [..., live.channels] whose live channels are `compact`, every other being zero.

    Args:
        compact: [..., live.count], two dimensions or more.
        live: The live channels.

    Returns:
        A live tensor; `compact` itself if nothing is dead.

    Examples:
        >>> from prunekernels.live import LiveList, wrap_last
        >>> y = wrap_last(torch.ones(2, 5, 5, 3), LiveList.of_mask(torch.arange(8) > 4))
        >>> tuple(y.shape), y.permute(0, 3, 1, 2).compact.is_contiguous(memory_format=torch.channels_last)
        ((2, 5, 5, 8), True)
    """
    if live.full:
        return compact
    if compact.dim() < 2:
        raise ValueError(f"wrap_last: compact: expected 2 dimensions or more, got {compact.dim()}")
    return moved(wrap(compact.movedim(-1, 1), live), Axes((live.channels,), (compact.dim() - 1,)))
