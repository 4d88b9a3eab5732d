"""Family: live tensors that are views of one another."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .channel_list import LiveList

if TYPE_CHECKING:
    from .tensor import LiveTensor


class Family:
    """A live tensor and its views, which share memory as long as each keeps its list.

    What changes the list of one in place first gives all of them full width, and shared memory again.
    """

    def __init__(self, root: LiveTensor) -> None:
        self.root = root  # which knows its family weakly: the views keep both
        root._family = weakref.ref(self)
        self.views: list[tuple[weakref.ref[LiveTensor], Callable[[Tensor], Tensor]]] = []

    def add(self, view: LiveTensor, parent: LiveTensor, replay: Callable[[Tensor], Tensor]) -> None:
        outer = next((made for ref, made in self.views if ref() is parent), None)
        self.views.append((weakref.ref(view), replay if outer is None else lambda full: replay(outer(full))))
        view._family = self

    def shared(self) -> bool:
        """Whether two of them are in use."""
        alive = sum(ref() is not None for ref, _ in self.views)
        return alive > 1 or (alive == 1 and sys.getrefcount(self.root) > 2)

    @torch.enable_grad()
    def widen(self) -> None:
        root, full = self.root, self.root.full()
        root.become(full, LiveList.all(root.live.channels))
        root._family = None  # plain views of a plain tensor need none
        for ref, replay in self.views:
            view = ref()
            if view is not None:
                made = replay(full)
                view.become(made, LiveList.all(made.shape[1]))
                view._family = None
