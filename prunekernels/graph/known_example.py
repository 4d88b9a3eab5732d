"""Which arguments a small network takes, as shrink had them: save_small needs some."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..nn.example import Example

_examples: WeakKeyDictionary[nn.Module, Example] = WeakKeyDictionary()


def remember_example(network: nn.Module, example: Example) -> None:
    """Keeps sizes and kinds of a network's arguments for as long as it lives; of integers and bools also the values."""
    _examples[network] = example.map(lambda x: x.detach().to("meta") if x.is_floating_point() else x.detach().clone())


def recall_example(network: nn.Module) -> Example | None:
    """Arguments of the kind that was remembered, on the CPU, with numbers drawn at random, zeros for integers."""
    example = _examples.get(network)
    generator = torch.Generator().manual_seed(0)

    def drawn(x: Tensor) -> Tensor:
        if not x.is_meta:
            return x.cpu()
        if not x.is_floating_point():
            return torch.zeros(x.shape, dtype=x.dtype)
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)

    return None if example is None else example.map(drawn)
