"""Compiled forms of a network in training, and the time that they save."""

from __future__ import annotations

import time
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

ROUNDS = 5  # steps of each form that are timed


class Compiled(nn.Module):
    """A network that is called through torch.compile. Its parameters are those of the network.

    Attributes:
        net: The network.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

        def call(x: Tensor) -> Tensor:
            return net(x)

        # torch counts recompilations by code object, and gives up after a few: each form has one of its own.
        own = types.FunctionType(call.__code__.replace(), call.__globals__, "call", None, call.__closure__)
        self.call: Callable[[Tensor], Tensor] = torch.compile(own)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def step_times(
    net: nn.Module, forms: Mapping[str, nn.Module], loss_of: Callable[[nn.Module], Tensor], device: torch.device
) -> dict[str, float]:
    """Milliseconds of a forward and a backward pass, of each form of a network; nothing of the network changes.

    Args:
        net: The network, in training mode.
        forms: By name, modules that compute what net does with its parameters and buffers.
        loss_of: From a form to the loss of a batch.
        device: Where they run.
    """
    parameters = [p for p in net.parameters() if p.requires_grad]

    def milliseconds(form: nn.Module) -> float:
        return 1e3 * seconds(lambda: torch.autograd.grad(loss_of(form), parameters, allow_unused=True), device)

    with _left_alone(net, device):
        for form in forms.values():
            for _ in range(2):  # compiles, allocates
                milliseconds(form)
        times = [{name: milliseconds(form) for name, form in forms.items()} for _ in range(ROUNDS)]
    return {name: min(row[name] for row in times) for name in forms}


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """How long a step takes."""
    begun = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


@contextmanager
def _left_alone(net: nn.Module, device: torch.device) -> Iterator[None]:
    """Buffers, such as the statistics of norms, and torch's random state are as before when the block ends."""
    buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:  # norms write without a trace; a write to a mask has its tables made anew
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
