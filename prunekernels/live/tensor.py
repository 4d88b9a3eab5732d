"""LiveTensor: the live channels of a tensor, passed from layer to layer as if they were the whole tensor."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ..ops import autograd
from . import fallbacks
from .channel_list import LiveList
from .channel_ops import to_dense
from .deferred import Deferred, Reader
from .frames import never_inline, skip_frames
from .saving import unhooked

_without_rules = torch._C.DisableTorchFunctionSubclass
_transforms_active = torch._C._are_functorch_transforms_active
RULES: dict[Any, Any] = {}  # torch function -> rule(func, args, kwargs); NotImplemented: not these arguments
FILLED_RULES: dict[Any, Any] = {}  # the same, of functions of which a FilledTensor is among the arguments
ABOUT: set[Any] = set()  # those that tell a property of a tensor and compute nothing


class LiveTensor(Tensor):
    """A tensor [N, C, ...] of which only the live channels are stored; every other channel is exactly zero.

    Behind a sigmoid, or another function of which f(0) is not 0, every other channel holds the number `fill` instead.

    It behaves as the full-width tensor: shape, dtype, device, isinstance and autograd are those of [N, C, ...]. An
    operation that has a rule (prunekernels/live/rules) computes the live channels alone and gives a live tensor. Any
    other operation gets the full-width tensor, whether it is called from Python or below it, in C++. The autograd
    history leads back to `compact`.

    Masked layers make live tensors in live mode (`prunekernels.flow`). The network returns plain tensors to its caller.

    Attributes:
        live: The sorted list of the live channels (`live.count` of `live.channels`).
        fill: What every other channel holds, 0.0 unless said above.

    Examples:
        >>> layer = pk.MaskedConv2d(3, 8, 3)
        >>> layer.set_masks(filter=torch.arange(8) > 3)
        >>> model = pk.flow(torch.nn.Sequential(layer, torch.nn.ReLU()))
        >>> y = layer(torch.randn(2, 3, 6, 6))
        >>> type(y).__name__, tuple(y.shape), tuple(y.compact.shape)
        ('LiveTensor', (2, 8, 4, 4), (2, 4, 4, 4))
        >>> y.to_dense()[:, :4].any().item()
        False
    """

    live: LiveList
    fill: float = 0.0
    _rules: dict[Any, Any] = RULES
    _compact: Tensor
    _dense: Tensor | None  # what to_dense() made
    _dense_version: int  # of compact, when _dense was made
    _may_get_history: bool  # made without gradients, maybe in an autograd.Function, which sets a history when it ends
    _history: Any = None  # the history at that time
    _view_group: ViewGroup | weakref.ref[ViewGroup] | None = None  # weak in the tensor that the others are views of
    _before_use: Deferred | Reader | None = None  # to be called before the values are read or written

    @staticmethod
    def __new__(cls, compact: Tensor, live: LiveList) -> LiveTensor:
        size = compact.shape
        full_size = (size[0], live.channels, *size[2:])
        strides = None if compact.is_contiguous() else _strides(compact, full_size)
        self: LiveTensor = autograd.live_wrapper(cls, compact, live.index(compact.device), full_size, strides)
        self._hold(compact, live)
        return self

    def _hold(self, compact: Tensor, live: LiveList) -> None:
        self._compact, self.live, self._dense, self._before_use = compact, live, None, None
        self._may_get_history = not torch.is_grad_enabled()

    @property
    def compact(self) -> Tensor:
        """The stored values, [N, live.count, ...]: channel `live.host[i]` is at place i.

        Examples:
            >>> layer = pk.MaskedConv2d(3, 8, 3)
            >>> layer.set_masks(filter=torch.arange(8) > 3)
            >>> y = pk.flow(torch.nn.Sequential(layer))[0](torch.randn(2, 3, 6, 6))
            >>> torch.equal(y.compact, y.to_dense()[:, 4:])
            True
        """
        before = self._before_use
        if before is not None:
            values = before()
            if self._before_use is before:  # no other thread was faster
                self._compact, self._before_use = self._compact if values is None else values, None
        if self._may_get_history and torch.is_grad_enabled():
            self._take_history()
        return self._compact

    @property
    def deferred(self) -> Deferred | None:
        """What is still to be done for the values of this tensor, if anything is and its history is that of them."""
        before = self._before_use
        if type(before) is not Deferred or (self._may_get_history and torch.is_grad_enabled()):
            return None
        return before

    def _take_history(self) -> None:
        self._may_get_history = False
        with _without_rules():
            if self.grad_fn is not self._history:
                self._compact = self.index_select(1, self.live.rows(self._compact.device))
                self._dense = None  # made of what had no history

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = cls._rules.get(func)
        if rule is not None and _transforms_active() and func not in ABOUT:  # C++ operators cannot be transformed
            rule = None
        if rule is not None and args and not (kwargs and "out" in kwargs):
            result = rule(func, args, kwargs)
            if result is not NotImplemented:
                return result
        return _on_full_width(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Below autograd, for calls that did not pass __torch_function__ (C++ code, autograd.Function)."""
        fallbacks.record(func)
        with torch.no_grad():
            if func._schema.is_mutable:
                return _write_below(func, args, kwargs or {})
            args, kwargs = tree_map_only(LiveTensor, LiveTensor.to_dense, (args, kwargs or {}))
            return func(*args, **kwargs)

    def to_dense(self, dtype: torch.dtype | None = None, *, masked_grad: bool | None = None) -> Tensor:
        """The full-width tensor [N, C, ...], with `fill` (zeros) in dead channels. Kept, so that a second call is free.

        Args:
            dtype: Of the result; None: that of this tensor.
            masked_grad: Only there because `torch.Tensor.to_dense` has it, for sparse tensors; has no effect.

        Returns:
            A plain tensor [N, C, ...].

        Examples:
            >>> layer = pk.MaskedConv2d(3, 8, 3)
            >>> layer.set_masks(filter=torch.arange(8) > 3)
            >>> y = pk.flow(torch.nn.Sequential(layer))[0](torch.randn(2, 3, 6, 6))
            >>> tuple(y.to_dense().shape)
            (2, 8, 4, 4)
        """
        dense = self._cached_dense()
        return dense if dtype is None else dense.to(dtype)

    full = to_dense

    def _cached_dense(self) -> Tensor:
        compact = self.compact
        if self.live.full:
            return compact
        if self._dense is not None and self._dense_version == compact._version:
            return self._dense
        # The result is cached, so it is made with grad enabled: a later caller may need its history. It is made outside
        # of inference mode, so that writes to it change its version, and not as a tensor of a torch.func transform.
        mode = torch.inference_mode(False) if torch.is_inference_mode_enabled() else torch.enable_grad()
        with _without_rules(), mode, torch._C._DisableFuncTorch(), unhooked():
            dense = to_dense(compact, self.live, self.fill)
        if dense.requires_grad == compact.requires_grad and not compact.is_inference():
            self._dense, self._dense_version = dense, compact._version
        return dense

    def replace_storage(self, compact: Tensor, live: LiveList) -> LiveTensor:
        """Gives this object other values, as an operation in place does.

        Args:
            compact: The new values, [N, live.count, ...].
            live: Their channels.

        Returns:
            This tensor.

        Examples:
            >>> from prunekernels.live import LiveList
            >>> from prunekernels.live.tensor import wrap
            >>> x = wrap(torch.ones(1, 1, 2, 2), LiveList.of_mask(torch.tensor([True, False])))
            >>> x.replace_storage(torch.full((1, 1, 2, 2), 3.0), x.live) is x, x.sum().item()
            (True, 12.0)
        """
        with _without_rules():
            if compact.requires_grad:
                autograd.attach_live(self, compact, live.index(compact.device))
            self._history = None if torch.is_grad_enabled() else self.grad_fn
        self._hold(compact, live)
        return self

    def to_dense_(self) -> Tensor:
        """Makes this object store the full-width tensor; its views become views of that tensor.

        Returns:
            The full-width tensor [N, C, ...], whose memory this object shares from now on.

        Examples:
            >>> from prunekernels.live import LiveList
            >>> from prunekernels.live.tensor import wrap
            >>> x = wrap(torch.ones(1, 1, 2, 2), LiveList.of_mask(torch.tensor([True, False])))
            >>> x.to_dense_().shape == x.compact.shape == x.shape
            True
        """
        if self.live.full:
            return self.compact
        group = self._group()
        if group is not None and group.shared():
            group.to_dense_()
            return self.compact
        dense = self.to_dense()
        self.replace_storage(dense, LiveList.all(self.live.channels))
        return dense

    def store_dense(self, dense: Tensor) -> None:
        """Stores this full-width tensor from now on, after an operation wrote to it.

        Examples:
            >>> from prunekernels.live import LiveList
            >>> from prunekernels.live.tensor import wrap
            >>> x = wrap(torch.ones(1, 1, 2, 2), LiveList.of_mask(torch.tensor([True, False])))
            >>> x.store_dense(torch.ones(1, 2, 2, 2))
            >>> x.live.full
            True
        """
        self.replace_storage(dense, LiveList.all(self.live.channels))

    def shares_memory(self) -> bool:
        """Whether a write to this tensor could be read through another tensor, one a view of the other.

        Examples:
            >>> from prunekernels.live import LiveList
            >>> from prunekernels.live.tensor import wrap
            >>> x = wrap(torch.ones(1, 1, 2, 2), LiveList.of_mask(torch.tensor([True, False])))
            >>> view = x[:1]
            >>> x.shares_memory()
            True
        """
        group = self._group()
        return group is not None and group.shared()

    def _group(self) -> ViewGroup | None:
        group = self._view_group
        return group() if isinstance(group, weakref.ref) else group

    def view_of(self, compact: Tensor, live: LiveList, replay: Callable[[Tensor], Tensor]) -> Tensor:
        """A view of this tensor, as the rules of views make it.

        Args:
            compact: The live channels of the view, which share the memory of this tensor.
            live: Its channels.
            replay: Makes the same view of the full-width tensor.

        Returns:
            A live tensor; `compact` itself if nothing is dead.

        Examples:
            >>> from prunekernels.live import LiveList
            >>> from prunekernels.live.tensor import wrap
            >>> x = wrap(torch.ones(1, 1, 2, 2), LiveList.of_mask(torch.tensor([True, False])))
            >>> view = x.view_of(x.compact[..., :1], x.live, lambda dense: dense[..., :1])
            >>> tuple(view.shape), x.shares_memory()
            ((1, 2, 2, 1), True)
        """
        if self.live.full:
            return compact
        view = _hollow(compact, live, self.fill)
        (self._group() or ViewGroup(self)).add(view, self, replay)
        return view

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.live.count}/{self.live.channels} live, {self.to_dense()!r})"


class FilledTensor(LiveTensor):
    """A LiveTensor whose other channels hold the number `fill`, which is not zero: sigmoid(0), say.

    Only rules that are registered with filled=True get it. A product with a live tensor is live again: what is zero
    there stays zero.
    """

    _rules = FILLED_RULES

    def unfilled(self, op: str) -> Tensor:
        """The full-width tensor, recorded as a fallback of an operation that reads channels of zeros alone."""
        fallbacks.record(f"{op} (channels that hold {self.fill:.4g})")
        return self.to_dense()


class ViewGroup:
    """A live tensor and its views. They share memory as long as each of them keeps its list of live channels.

    An operation in place that changes the list of one first brings all of them to full width, where they share memory
    again.
    """

    def __init__(self, root: LiveTensor) -> None:
        self.root = root  # it refers to this group weakly: only the views keep the group alive
        root._view_group = weakref.ref(self)
        self.views: list[tuple[weakref.ref[LiveTensor], Callable[[Tensor], Tensor]]] = []

    def add(self, view: LiveTensor, parent: LiveTensor, replay: Callable[[Tensor], Tensor]) -> None:
        """Takes in a view of the root or of another view. replay: makes it of the parent at full width."""
        outer = next((made for ref, made in self.views if ref() is parent), None)
        self.views = [each for each in self.views if each[0]() is not None]
        self.views.append((weakref.ref(view), replay if outer is None else lambda dense: replay(outer(dense))))
        view._view_group = self

    def shared(self) -> bool:
        """Whether two tensors of the group are in use."""
        alive = sum(ref() is not None for ref, _ in self.views)
        return alive > 1 or (alive == 1 and sys.getrefcount(self.root) > 2)

    @torch.enable_grad()
    def to_dense_(self) -> None:
        """Brings every tensor of the group to full width; the group ends, as plain views need none."""
        root, dense = self.root, self.root.to_dense()
        root.replace_storage(dense, LiveList.all(root.live.channels))
        root._view_group = None
        for ref, replay in self.views:
            view = ref()
            if view is not None:
                made = replay(dense)
                view.replace_storage(made, LiveList.all(made.shape[1]))
                view._view_group = None


def can_flow(x: Tensor) -> bool:
    """Whether a layer that is not compiled or transformed may make live tensors of x: not while torch traces it."""
    return (type(x) is Tensor or type(x) is LiveTensor) and not torch._C._is_tracing()


def wrap(compact: Tensor, live: LiveList, fill: float = 0.0) -> Tensor:
    """The tensor [N, live.channels, ...] whose live channels are `compact`; compact itself if nothing is dead.

    fill: The number in the other channels.
    """
    return compact if live.full else _hollow(compact, live, fill)


def wrap_deferred(deferred: Deferred, live: LiveList) -> LiveTensor:
    """The live tensor of values that are not written yet. Something has to be dead."""
    assert deferred.y is not None
    x = _hollow(deferred.y, live, 0.0)
    x._before_use = deferred
    return x


def _hollow(compact: Tensor, live: LiveList, fill: float) -> LiveTensor:
    with _without_rules():
        if not fill:
            return LiveTensor(compact, live)
        filled = FilledTensor(compact, live)
        filled.fill = fill
        return filled


def full_width(tree: Any) -> Any:
    """A tree of containers in which the full-width tensor stands in place of every live tensor."""
    return tree_map_only(LiveTensor, LiveTensor.to_dense, tree)


def _strides(compact: Tensor, size: tuple[int, ...]) -> tuple[int, ...] | None:
    if compact.dim() != 4 or not compact.is_contiguous(memory_format=torch.channels_last):
        return None
    _, C, H, W = size
    return (C * H * W, 1, C * W, C)


def _on_full_width(func: Any, args: Any, kwargs: Any) -> Any:
    """The fallback of an operation without a rule: func of full-width tensors.

    A live tensor that func wrote to, or whose memory the result shares, stores its full-width tensor from then on.
    """
    fallbacks.record(func)
    used: list[tuple[LiveTensor, Tensor, int]] = []

    def densify(x: LiveTensor) -> Tensor:
        dense = x.to_dense_() if x.shares_memory() else x.to_dense()
        used.append((x, dense, _version(dense)))
        return dense

    args, kwargs = tree_map_only(LiveTensor, densify, (args, kwargs))
    result = func(*args, **kwargs)
    for x, dense, version in used:
        if dense.shape != x.shape:
            raise NotImplementedError(
                f"{fallbacks.name(func)}: expected a plain tensor to reshape in place, got a live one"
            )
        if _version(dense) != version or any(_shares_memory(each, dense) for each in tree_leaves(result)):
            x.store_dense(dense)
        if result is dense:
            result = x
    return result


def _write_below(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation in place below __torch_function__: the live tensors that it writes to have full width afterwards."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    to_write = [given.get(a.name) for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    written = [(x, x.to_dense().clone()) for x in to_write if isinstance(x, LiveTensor)]
    if any(x.shares_memory() for x, _ in written):
        raise NotImplementedError(f"{func}: expected a tensor without views to write to, got a live tensor with some")

    def densify(x: LiveTensor) -> Tensor:
        return next((values for live, values in written if live is x), x.to_dense())

    result = func(*tree_map_only(LiveTensor, densify, args), **tree_map_only(LiveTensor, densify, kwargs))
    for x, values in written:
        x.store_dense(values)
        x._history = NotImplemented  # autograd sets a new history when this returns, or keeps that of this object
        result = x if result is values else result
    return result


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _shares_memory(value: Any, dense: Tensor) -> bool:
    return isinstance(value, Tensor) and torch._C._is_alias_of(value, dense)  # type: ignore[attr-defined]


def store_full_width(tree: Any) -> Any:
    """A tree of containers with plain tensors in place of live ones, which share their memory from now on."""
    return tree_map_only(LiveTensor, lambda x: x.to_dense_(), tree)


_methods: list[Any] = [LiveTensor.__torch_function__, LiveTensor.__torch_dispatch__]
_functions = [*(method.__func__ for method in _methods), LiveTensor.to_dense]
skip_frames(*_functions)
never_inline(
    "compiled code got a live tensor; call pk.flow(model) again, after torch.compile of parts of the model: they then "
    "get full-width tensors",
    *_functions,
)
