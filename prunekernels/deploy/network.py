"""ByMode: two graphs over the same layers, where a network computes something else when it trains."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

SHARED = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")


class ByMode(nn.Module):
    """A network with a graph of its own for training: one that drops whole paths, or has more outputs then.

    Args:
        root: Holds the layers and tensors of both graphs.
        train: The graph in training mode.
        evaluating: The graph in eval mode.
    """

    _graphs: tuple[fx.GraphModule, fx.GraphModule]  # in eval mode, in training

    def __init__(self, root: nn.Module, train: fx.GraphModule, evaluating: fx.GraphModule) -> None:
        super().__init__()
        for name in SHARED:
            self.__dict__[name] = root.__dict__[name]
        self.__dict__["_graphs"] = (evaluating, train)
        self._share()

    def _share(self) -> None:
        """Makes the layers and tensors of both graphs those of this module."""
        for graph in self._graphs:
            for name in SHARED:
                graph.__dict__[name] = self.__dict__[name]

    def graph_of(self, training: bool) -> fx.GraphModule:
        """The graph of a mode."""
        return self._graphs[training]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._share()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._graphs[1 if self.training else 0](*args, **kwargs)  # torch.compile of 2.11 takes no bool here
