"""Example: the arguments of one call of a network, whatever they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

KINDS = (
    "a tensor, a tuple of arguments, a dict of arguments by name, a list (which is one argument) or a pk.Example of "
    "any arguments"
)


class Example:
    """The arguments of one call of a network: of any number and kind, by position and by name.

    Where a function of this package takes an example_input, it takes an Example, or one of the short forms of it:

    | example_input | the network is called as |
    |---|---|
    | a tensor `x` | `model(x)` |
    | a tuple `(x, y)` | `model(x, y)` |
    | a dict, such as a batch of transformers | `model(**batch)` |
    | a list, such as the images of a detector of torchvision | `model(images)` |
    | `pk.Example(x, y, scale=2)` | `model(x, y, scale=2)` |

    Arguments may be nested in tuples, lists and dicts; numbers, strings and None may be among them.

    Args:
        args: The arguments by position.
        kwargs: The arguments by name.

    Examples:
        >>> class Scaled(torch.nn.Sequential):
        ...     def forward(self, batch, scale=1.0):
        ...         return {"out": scale * super().forward(batch["image"])}
        >>> example = pk.Example({"image": torch.randn(1, 3, 8, 8)}, scale=2.0)
        >>> pk.count_flops(Scaled(torch.nn.Conv2d(3, 4, 1)), example).dense
        768
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    @classmethod
    def of(cls, op: str, example_input: Any) -> Example:
        """Reads an example_input in any of its forms. op: the caller, for errors."""
        if isinstance(example_input, Example):
            return example_input
        if isinstance(example_input, (Tensor, list)):
            return cls(example_input)
        if isinstance(example_input, tuple):
            return cls(*example_input)
        if isinstance(example_input, Mapping) and all(isinstance(name, str) for name in example_input):
            return cls(**example_input)
        got = type(example_input).__name__
        if isinstance(example_input, Mapping):
            got += " with keys that are no names"
        raise TypeError(f"{op}: example_input: expected {KINDS}, got {got}")

    @property
    def leaves(self) -> list[Any]:
        """Tensors and all else that is in the arguments, in the order in which the exporter numbers them."""
        return pytree.tree_leaves((self.args, self.kwargs))

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the leaves."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @property
    def is_flat(self) -> bool:
        """Whether all arguments are given by position, and none of them holds others."""
        leaves = self.leaves
        return len(leaves) == len(self.args) and all(x is y for x, y in zip(leaves, self.args, strict=True))

    def with_leaves(self, leaves: list[Any]) -> Example:
        """The same arguments with other leaves."""
        args, kwargs = pytree.tree_unflatten(leaves, pytree.tree_structure((self.args, self.kwargs)))
        return Example(*args, **kwargs)

    def map(self, function: Callable[[Tensor], Tensor]) -> Example:
        """The same arguments with function(tensor) for every tensor."""
        return self.with_leaves([function(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves])

    def double(self) -> Example:
        """The same arguments with floating-point tensors in float64."""
        return self.map(lambda x: x.double() if x.is_floating_point() else x)

    def call(self, model: Callable[..., Any]) -> Any:
        """Calls a network. It gets copies of the tensors and containers, since it may write into them."""
        copies = self.map(torch.clone)
        return model(*copies.args, **copies.kwargs)

    def __repr__(self) -> str:
        """Names tensors by their sizes."""
        told = self.with_leaves([_Told(leaf) for leaf in self.leaves])
        arguments = [*map(repr, told.args), *(f"{name}={value!r}" for name, value in told.kwargs.items())]
        return f"Example({', '.join(arguments)})"


class _Told:
    """A leaf as repr shows it."""

    def __init__(self, leaf: Any) -> None:
        self.text = f"{leaf.dtype}{list(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)

    def __repr__(self) -> str:
        return self.text
