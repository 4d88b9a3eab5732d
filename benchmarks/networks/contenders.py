"""All that network.py times, and their compiled forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from harness.compiled import compiled
from networks.baselines import CompactedMode, Dense, FloatDense, LiveMode, MaskedMode, NetworkContender, Small


class Compiled(NetworkContender):
    """Mixin: the forward pass, and with it the backward pass, of a contender by torch.compile."""

    eager: type[NetworkContender]  # the same without torch.compile

    def make_forward(self) -> Callable[[Tensor], Tensor]:
        model = self.model
        return compiled(lambda images: model(images))


class CompiledDense(Compiled, Dense):
    """Compiled once for a network, layout and pass: it serves all masks."""

    family, eager = "dense+compile", Dense


class CompiledCompacted(Compiled, CompactedMode):
    """As a user compiles the network of compacted mode between two mask changes."""

    family, eager = "compacted+compile", CompactedMode


class CompiledSmall(Compiled, Small):
    """The small network, compiled: the upper bound of compacted+compile."""

    family, eager = "small+compile", Small


EAGER: tuple[Any, ...] = (Dense, MaskedMode, LiveMode, Small, CompactedMode)
COMPILED: tuple[Any, ...] = (CompiledDense, CompiledCompacted, CompiledSmall)
CONTENDERS: tuple[type[NetworkContender], ...] = (*EAGER, *COMPILED, FloatDense)
FAMILIES = tuple(c.family for c in CONTENDERS)
